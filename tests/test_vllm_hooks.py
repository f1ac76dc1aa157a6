"""vLLM's smaller hooks, and `tierkv doctor`, inside of a real vLLM on the CPU.

`make engines` installs vLLM beside the project and runs these. Each engine has a process of its
own; tokens are greedy, and compared with those of an engine without a connector.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tierkv.demo.model import checkpoint
from tierkv.testing.life import Ask, Life, Said

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("TIERKV_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
BLOCK = 32
DOCUMENT = 320
WHOLE = DOCUMENT // BLOCK
#: Bytes of a chunk of one block: 30 layers of SmolLM2 in float32.
CHUNK = BLOCK * 46_080
SEED = 2

Prompt = dict[str, Any]
Answer = dict[str, Any]


@pytest.fixture(scope="session")
def model() -> str:
    return str(checkpoint(lambda _what, _part: None))


def prompt(question: int, *, document: int = 0, count: int = 8) -> Prompt:
    rng = random.Random(f"{SEED}/{document}")
    text = [rng.randrange(100, 40_000) for _ in range(DOCUMENT)]
    asked = random.Random(f"{SEED}/{document}/{question}")
    return {
        "tokens": [*text, *(asked.randrange(100, 40_000) for _ in range(10))],
        "count": count,
    }


def offloading(*, chunks: int = 12, **extra: object) -> Answer:
    """vLLM's own connector with our spec, and a CPU tier of so many chunks."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "TierKVOffloadingSpec",
            "spec_module_path": "tierkv.engines.vllm",
            "cpu_bytes_to_use": chunks * CHUNK,
            **extra,
        },
    }


def cold(directory: Path, **more: object) -> dict[str, object]:
    # Of so little host memory that most comes from the disk.
    return {"host": "16MiB", "cold": "2GiB", "directory": str(directory / "kv"), **more}


def life(place: Path, model: str, turns: list[list[Prompt]], **order: object) -> tuple[int, Answer]:
    """One engine: how it ended, and what it said."""
    more: Any = order.get("settings", {})
    settings = {"model": model, "skip_tokenizer_init": True, **more}
    if order.get("connector"):
        settings["kv_transfer_config"] = order["connector"]
    asks = [[Ask(tokens=one["tokens"], count=one["count"]) for one in turn] for turn in turns]
    (place / "order.json").write_bytes(msgspec.json.encode(Life(turns=asks, settings=settings)))
    (place / "answer.json").unlink(missing_ok=True)
    with (place / "log").open("w") as log:
        code = subprocess.run(
            [PYTHON, ROOT / "tools" / "vllm_life.py", place / "order.json", place / "answer.json"],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=600, check=False,
        ).returncode  # fmt: skip
    if code:
        return code, {}
    said = msgspec.json.decode((place / "answer.json").read_bytes(), type=Said)
    return code, {"turns": said.turns, "counters": said.counters}


def run(place: Path, model: str, turns: list[list[Prompt]], **order: object) -> Answer:
    code, answer = life(place, model, turns, **order)
    assert code == 0, (place / "log").read_text()[-4000:]
    return answer


def tokens_of(answer: Answer) -> list[list[list[int]]]:
    return [[one.tokens for one in turn] for turn in answer["turns"]]


def cached_of(answer: Answer) -> list[list[int]]:
    return [[one.reused for one in turn] for turn in answer["turns"]]


#: A document, two others that push it out of 12 chunks, and it again with another question.
TURNS = [[prompt(0)], [prompt(0, document=1)], [prompt(0, document=2)], [prompt(1)]]


@pytest.fixture(scope="session")
def recomputed(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """What an engine without a connector says."""
    return tokens_of(run(tmp_path_factory.mktemp("plain"), model, TURNS, connector=None))


def python(code: str) -> str:
    """What a program says in vLLM's environment."""
    done = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# ---- the spec and the tier


@pytest.mark.slow
def test_vllms_own_tier_works_on_the_cpu_by_our_spec(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    roomy = run(tmp_path, model, TURNS, connector=offloading(chunks=64))
    assert tokens_of(roomy) == recomputed
    assert cached_of(roomy)[-1] == [WHOLE * BLOCK]
    # Without tierkv beneath, what was pushed out is gone: the end of the document.
    small = run(tmp_path, model, TURNS, connector=offloading())
    assert tokens_of(small) == recomputed
    assert cached_of(small)[-1][0] < WHOLE * BLOCK


def test_chunks_of_several_blocks_are_copied_to_and_from_their_places(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    found = run(tmp_path, model, TURNS, connector=offloading(chunks=64, blocks_per_chunk=3))
    assert tokens_of(found) == recomputed
    assert cached_of(found)[-1] == [WHOLE // 3 * 3 * BLOCK]


@pytest.mark.slow
def test_what_vllms_tier_gives_up_comes_back_from_ours_and_after_a_restart(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    connector = offloading(tierkv=cold(tmp_path))
    first = run(tmp_path, model, TURNS, connector=connector)
    assert tokens_of(first) == recomputed
    assert cached_of(first) == [[0], [0], [0], [WHOLE * BLOCK]]
    assert first["counters"]["vllm:kv_offload_tiering_read_bytes"] > 0
    again = run(tmp_path, model, TURNS, connector=connector)
    assert tokens_of(again) == recomputed
    assert cached_of(again) == [[WHOLE * BLOCK]] * 4
    other = run(tmp_path, model, TURNS[:1], connector=offloading(
        tierkv=cold(tmp_path, revision="other")))  # fmt: skip
    assert cached_of(other) == [[0]]


def test_damage_beneath_vllms_tier_costs_a_recompute_and_no_token(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    connector = offloading(tierkv=cold(tmp_path))
    run(tmp_path, model, TURNS, connector=connector)
    rng, flipped = random.Random(SEED), 0
    for file in (tmp_path / "kv").rglob("segment-*"):
        data = bytearray(file.read_bytes())
        for at in range(8192, len(data) - 1024, 1 << 20):
            if rng.random() < 0.3 and any(data[at : at + 64]):
                data[at + 3] ^= 0x40
                flipped += 1
        file.write_bytes(data)
    assert flipped
    damaged = run(tmp_path, model, TURNS, connector=connector)
    assert tokens_of(damaged) == recomputed
    assert 0 < sum(map(sum, cached_of(damaged))) < 4 * WHOLE * BLOCK


# ---- the policy


def test_a_policy_of_ours_rules_vllms_tier(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    extra = {"eviction_policy": "tierkv-lru",
             "cache_policy_module_path": "tierkv.engines.vllm.cache_policy"}  # fmt: skip
    found = run(tmp_path, model, TURNS, connector=offloading(tierkv=cold(tmp_path), **extra))
    assert tokens_of(found) == recomputed
    assert cached_of(found)[-1] == [WHOLE * BLOCK]
    assert "cache policy 'tierkv-lru'" in (tmp_path / "log").read_text()


def test_our_lru_gives_up_what_vllms_does() -> None:
    """By chance, side by side: the same chunks in the same order, the same refusals."""
    said = python("""
import random
import shlex
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy
from tierkv.engines.vllm import TierKVCachePolicy

evicted = 0
for seed in range(60):
    rng, both = random.Random(seed), [LRUCachePolicy(24), TierKVCachePolicy(24)]
    names = [make_offload_key(bytes([n]) * 32, 0) for n in range(40)]
    slots, there, context = list(range(24)), {}, ReqContext("r")
    for n, name in enumerate(names):
        context.set_offload_key_position(name, n)
    for _ in range(400):
        what = rng.randrange(7)
        some = rng.sample(names, rng.randrange(1, 9))
        if what == 0 and slots:
            name = rng.choice([n for n in names if n not in there])
            there[name] = slots.pop()
            pinned = rng.random() < 0.5
            for policy in both:
                chunk = ChunkStatus(there[name])
                chunk.ref_cnt = -1 if pinned else 0
                policy.insert(name, chunk)
        elif what == 1:
            for policy in both:
                policy.touch(some, context)
        elif what == 2:
            for policy in both:
                policy.on_request_finished([some[::2], some[1::2]], set(), set(), context)
        elif what == 3:
            wanted, kept = rng.randrange(0, 6), set(some)
            found = [policy.evict(wanted, kept) for policy in both]
            names_of = [None if f is None else [(k, c.chunk_id) for k, c in f] for f in found]
            assert names_of[0] == names_of[1], (seed, names_of)
            for key, slot in names_of[0] or []:
                assert there.pop(key) == slot
                slots.append(slot)
                evicted += 1
        elif what == 4 and there:
            name = rng.choice(sorted(there))
            chunks = [policy.get(name) for policy in both]
            before = chunks[0].ref_cnt
            assert before == chunks[1].ref_cnt
            for policy, chunk in zip(both, chunks):
                chunk.ref_cnt = 0 if before else 1
                (policy.mark_evictable if before else policy.mark_non_evictable)(name)
        elif what == 5 and there and rng.random() < 0.3:
            name = rng.choice(sorted(there))
            slots.append(there.pop(name))
            for policy in both:
                policy.remove(name)
        elif what == 6 and rng.random() < 0.02:
            slots, there = list(range(24)), {}
            for policy in both:
                policy.clear()
        for name in names:
            assert (both[0].get(name) is None) == (both[1].get(name) is None) == (name not in there)
print(evicted)
""")
    assert int(said.split()[-1]) > 500


def test_a_policy_that_nobody_knows_is_named() -> None:
    said = python("""
from tierkv.engines.vllm import cache_policy
assert getattr(cache_policy, "tierkv-lru").policy_name == "lru"
try:
    getattr(cache_policy, "tierkv-lur")
except AttributeError as error:
    print(error)
""")
    assert "did you mean 'lru'?" in said


# ---- what is refused


@pytest.mark.parametrize(
    ("tier", "words"),
    [({"directroy": "kv"}, "unknown directroy; known: config"), ({"cold": "1G"}, "tiers.cold")],
)
def test_a_mistake_in_the_tiers_options_stops_the_start_with_its_name(
    model: str, tmp_path: Path, tier: dict[str, str], words: str
) -> None:
    wrong = offloading(tierkv={"directory": str(tmp_path / "kv"), **tier})
    code, _ = life(tmp_path, model, TURNS[:1], connector=wrong)
    assert code != 0
    assert words in (tmp_path / "log").read_text()


def test_a_model_that_is_no_directory_needs_a_revision() -> None:
    said = python("""
from types import SimpleNamespace
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import PageTargets
from tierkv.engines.vllm.secondary_tier import layout_of
config = SimpleNamespace(model=SimpleNamespace(name="org/model"))
try:
    layout_of(config, chunk_bytes=4096, revision=None, targets=PageTargets())
except ConfigError as error:
    print(error)
""")
    assert '"revision": "its commit"' in said


# ---- the doctor


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = subprocess.run(
        [PYTHON, "-m", "tierkv.cli", "doctor", "--json", "--engine", "vllm", *arguments],
        capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, {found["name"]: found for found in json.loads(done.stdout)}


def test_the_doctor_looks_into_a_real_vllm(model: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tiers: {host: {capacity: 64MiB}, cold: {capacity: 1GiB, directory: kv}}\n")
    code, found = doctor("--config", str(file), "--model", model, "--arguments", "--block-size 32")
    assert (code, found["vllm"]["state"]) == (0, "ok")
    assert found["vllm"]["detail"].startswith("vllm")
    assert found["adapter"]["detail"] == "loads in it (device cpu, hashes sha256)"
    assert found["block size"]["detail"] == "32 tokens, as asked for"
    assert "its config.json" in found["model"]["detail"]
    wrong = ["--arguments", "--prefix-caching-hash-algo xxhash --block-size 40"]
    code, found = doctor("--config", str(file), *wrong)
    assert code == 1
    assert (found["hashes"]["state"], found["block size"]["state"]) == ("problem", "note")


# ---- what `tierkv init` writes and prints


def test_the_line_that_init_prints_is_what_vllm_takes(model: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tierkv.cli", "init", "--engine", "vllm", "--model", model,
         "--dram", "512MiB", "--nvme", "2GiB"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["vllm", "serve"]
    said = python(f"""
import json
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
asked = make_arg_parser(FlexibleArgumentParser()).parse_args({words[2:]!r})
transfer = AsyncEngineArgs.from_cli_args(asked).kv_transfer_config
print(json.dumps([KVConnectorFactory.get_connector_class(transfer).__name__,
                  transfer.kv_load_failure_policy]))
""")
    assert json.loads(said.splitlines()[-1]) == ["TierKVConnector", "recompute"]
    # And the file is one that its engine serves by, again after a restart.
    connector = json.loads(words[words.index("--kv-transfer-config") + 1])
    for cached in (0, WHOLE * BLOCK):
        answer = run(tmp_path, model, TURNS[:1], connector=connector)
        assert cached_of(answer) == [[cached]]
    assert list((tmp_path / "kv").rglob("segment-*"))
