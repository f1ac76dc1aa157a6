"""`TierKVConnector` inside of a real vLLM: SmolLM2 on the CPU, each engine in a process of its own.

`make engines` installs vLLM beside the project and runs these. Tokens are greedy, and compared with
those of an engine without a connector.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tierkv.demo.model import checkpoint

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("TIERKV_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
BLOCK = 32
DOCUMENT = 1600
SEED = 1

Prompt = dict[str, Any]
Answer = dict[str, Any]


@pytest.fixture(scope="session")
def model() -> str:
    return str(checkpoint(lambda _what, _part: None))


def prompt(question: int, *, document: int = 0, count: int = 12, **more: object) -> Prompt:
    """Token ids that nobody wrote: the same document for each question."""
    rng = random.Random(f"{SEED}/{document}")
    text = [rng.randrange(100, 40_000) for _ in range(DOCUMENT)]
    asked = random.Random(f"{SEED}/{document}/{question}")
    return {
        "tokens": [*text, *(asked.randrange(100, 40_000) for _ in range(20))],
        "count": count,
        **more,
    }


def connector(directory: Path, *, host: str = "512MiB", policy: str = "recompute") -> Answer:
    return {
        "kv_connector": "TierKVConnector",
        "kv_connector_module_path": "tierkv.engines.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {
            "host": host,
            "cold": "2GiB",
            "directory": str(directory / "kv"),
        },
    }


def started(
    place: Path, model: str, turns: list[list[Prompt]], **order: object
) -> subprocess.Popen[bytes]:
    (place / "order.json").write_text(json.dumps({"model": model, "turns": turns, **order}))
    (place / "answer.json").unlink(missing_ok=True)
    with (place / "log").open("w") as log:
        return subprocess.Popen(
            [PYTHON, ROOT / "tools" / "vllm_life.py", place / "order.json", place / "answer.json"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


def run(place: Path, model: str, turns: list[list[Prompt]], **order: object) -> Answer:
    assert started(place, model, turns, **order).wait(600) == 0, (place / "log").read_text()[-4000:]
    answer: Answer = json.loads((place / "answer.json").read_text())
    return answer


def tokens_of(answer: Answer) -> list[list[list[int]]]:
    return [[one["tokens"] for one in turn["said"]] for turn in answer["turns"]]


def cached_of(answer: Answer) -> list[list[int]]:
    return [[one["cached"] for one in turn["said"]] for turn in answer["turns"]]


#: The document alone, again with other questions at once, two other documents, and it again.
TURNS = [
    [prompt(0)],
    [prompt(1), prompt(2)],
    [prompt(0, document=1)],
    [prompt(0, document=2)],
    [prompt(3)],
]


@pytest.fixture(scope="session")
def recomputed(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """What an engine without a connector says."""
    return tokens_of(run(tmp_path_factory.mktemp("plain"), model, TURNS, connector=None))


def flip(directory: Path, *, share: float) -> int:
    """Flip a byte in that share of all places of the size of a KiB; how many."""
    rng, flipped = random.Random(SEED), 0
    for file in directory.rglob("segment-*"):
        data = bytearray(file.read_bytes())
        for at in range(8192, len(data) - 1024, 1024):
            if rng.random() < share and any(data[at : at + 64]):
                data[at + 3] ^= 0x40
                flipped += 1
        file.write_bytes(data)
    return flipped


def test_tokens_are_the_same_from_host_memory_from_disk_and_after_a_restart(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    whole = DOCUMENT // BLOCK * BLOCK
    # Three documents of 74 MB and their answers do not fit in host memory.
    first = run(tmp_path, model, TURNS, connector=connector(tmp_path, host="160MiB"))
    assert tokens_of(first) == recomputed
    assert cached_of(first) == [[0], [whole, whole], [0], [0], [whole]]
    assert first["counters"]["vllm:external_prefix_cache_hits"] == 2 * whole

    again = run(tmp_path, model, TURNS, connector=connector(tmp_path, host="160MiB"))
    assert tokens_of(again) == recomputed
    assert min(min(turn) for turn in cached_of(again)) >= whole


def test_damage_and_a_failing_disk_cost_a_recompute_and_no_token(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    run(tmp_path, model, TURNS, connector=connector(tmp_path))
    assert flip(tmp_path / "kv", share=3e-5)
    damaged = run(tmp_path, model, TURNS, connector=connector(tmp_path))
    assert tokens_of(damaged) == recomputed
    failing = run(tmp_path, model, TURNS, connector=connector(tmp_path), fails=2)
    assert tokens_of(failing) == recomputed
    assert "bad sector" in (tmp_path / "log").read_text()


def test_without_verification_damage_changes_tokens(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    """So the tests above can fail."""
    run(tmp_path, model, TURNS[:1], connector=connector(tmp_path))
    assert flip(tmp_path / "kv", share=0.3)
    believed = run(tmp_path, model, TURNS[:1], connector=connector(tmp_path), believes=True)
    assert cached_of(believed)[0][0] > 0
    assert tokens_of(believed) != recomputed[:1]


def test_another_salt_another_dtype_and_another_block_size_share_nothing(
    model: str, tmp_path: Path
) -> None:
    turns = [[prompt(0, salt="alice", count=2)], [prompt(0, salt="bob", count=2)],
             [prompt(0, salt="alice", count=2)]]  # fmt: skip
    whole = DOCUMENT // BLOCK * BLOCK
    found = run(tmp_path, model, turns, connector=connector(tmp_path))
    assert cached_of(found) == [[0], [0], [whole]]
    for settings in ({"dtype": "bfloat16"}, {"block_size": 64}):
        other = run(tmp_path, model, turns[:1], connector=connector(tmp_path), settings=settings)
        assert cached_of(other) == [[0]]


def test_preempted_requests_and_a_full_cache_give_the_same_tokens(
    model: str, tmp_path: Path
) -> None:
    """Eight requests of 51 blocks and their answers, and the engine has room for four of them."""
    turns = [[prompt(n, document=n % 3, count=64) for n in range(8)]] * 2
    settings = {"num_gpu_blocks_override": 230}
    plain = run(tmp_path, model, turns, connector=None, settings=settings)
    ours = run(tmp_path, model, turns, connector=connector(tmp_path, host="160MiB"),
               settings=settings)  # fmt: skip
    assert tokens_of(ours) == tokens_of(plain)
    assert ours["counters"]["vllm:external_prefix_cache_hits"] > 0


def test_a_killed_engine_leaves_what_was_durable_and_nothing_in_the_way(
    model: str, tmp_path: Path, recomputed: list[list[list[int]]]
) -> None:
    process = started(tmp_path, model, TURNS, connector=connector(tmp_path))
    segments = tmp_path / "kv"
    ends = time.monotonic() + 300
    while sum(f.stat().st_blocks for f in segments.rglob("segment-*")) < 100_000:
        assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
        assert time.monotonic() < ends
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run(tmp_path, model, TURNS, connector=connector(tmp_path))
    assert tokens_of(again) == recomputed
    assert not list(segments.rglob("*.tmp"))
