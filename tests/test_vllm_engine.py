"""`TierKVConnector` inside of a real vLLM: SmolLM2 on the CPU, each engine in a process of its own.

`make engines` installs vLLM beside the project and runs these. Tokens are greedy, and compared with
those of an engine without a connector.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tierkv.demo.model import checkpoint
from tierkv.testing.engines import EngineDriver, EngineTests, reused_of
from tierkv.testing.life import Trouble

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("TIERKV_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))


class VLLM(EngineDriver):
    """How vLLM is run here. A document and its answer are 21 blocks of 1.4 MiB."""

    small_host: ClassVar[str] = "48MiB"
    durable_bytes: ClassVar[int] = 70 << 20
    settings: ClassVar[dict[str, Any]] = {"skip_tokenizer_init": True}

    @property
    def program(self) -> Sequence[str | Path]:
        return [PYTHON, ROOT / "tools" / "vllm_life.py"]

    @pytest.fixture(autouse=True)
    def model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        self.settings["model"] = str(checkpoint(lambda _what, _part: None))


class TestVLLM(VLLM, EngineTests):
    """In one process, where a tier's trouble can be made."""

    @pytest.mark.slow
    def test_another_block_size_finds_nothing_and_hits_are_told_by_tier(self, place: Path) -> None:
        life = self.life(place, [self.ask(0, 0)], [self.ask(0, 1)])
        first = self.check(place, life)
        assert first.counters["vllm:external_prefix_cache_hits"] == self.whole
        assert first.counters["vllm:tierkv_memory_hit_tokens"] == self.whole
        again = self.check(place, life)
        assert again.counters["vllm:tierkv_disk_hit_tokens"] >= self.whole
        assert again.counters["vllm:tierkv_loaded_bytes"] >= 2 * self.whole * 46_080
        other = self.check(place, self.life(place, [self.ask(0, 0)], settings={"block_size": 64}))
        assert reused_of(other) == [[0]]

    def test_preempted_requests_and_a_full_cache_give_the_same_tokens(self, place: Path) -> None:
        """Eight requests of 21 blocks and their answers; the engine has room for four of them."""
        turns = [[self.ask(n % 3, n, count=64) for n in range(8)]] * 2
        settings = {"num_gpu_blocks_override": 95, "max_model_len": 2048}
        said = self.check(place, self.life(place, *turns, host="96MiB", settings=settings))
        assert said.counters["vllm:external_prefix_cache_hits"] > 0

    @pytest.mark.slow
    def test_layers_with_a_window_have_blocks_of_their_own(self, place: Path) -> None:
        """Every third layer sees all, the others 128 tokens; two of a kind are a group."""
        settings = {"model": str(small_model(place / "small", "gemma"))}
        turns = [[self.ask(n, 0)] for n in range(2)] + [[self.ask(n, 1) for n in range(2)]]
        life = self.life(place, *turns, host="24MiB", settings=settings)
        first = self.check(place, life)
        assert reused_of(first) == [[0], [0], [self.whole] * 2]
        assert reused_of(self.check(place, life))[0][0] >= self.whole
        broken = self.life(place, turns[0], settings=settings, trouble=Trouble.READS_FAIL)
        assert self.check(place, broken).counters["vllm:tierkv_failed_requests"] == 1
        assert len(list((place / "kv").iterdir())) == 3, "a directory for each group"


@pytest.mark.slow
class TestVLLMInProcesses(VLLM):
    """As `vllm serve` runs it: the API, the scheduler and each rank's worker are processes."""

    @pytest.fixture(autouse=True)
    def processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")

    def test_tokens_are_the_same_and_hits_are_counted_in_one_life_and_the_next(
        self, place: Path
    ) -> None:
        life = self.life(place, [self.ask(0, 0)], [self.ask(0, 1), self.ask(0, 2)])
        assert reused_of(self.check(place, life)) == [[0], [self.whole, self.whole]]
        again = reused_of(self.check(place, life))
        assert min(min(turn) for turn in again) >= self.whole

    def test_two_ranks_have_a_part_of_each_block(self, place: Path) -> None:
        settings = {"model": str(small_model(place / "small")), "tensor_parallel_size": 2}
        turns = [[self.ask(n, 0)] for n in range(3)] + [[self.ask(n, 1) for n in range(3)]]
        life = self.life(place, *turns, host="16MiB", settings=settings)
        first = reused_of(self.check(place, life))
        assert first[3] == [self.whole] * 3
        again = reused_of(self.check(place, life))
        assert min(min(turn) for turn in again) >= self.whole
        assert len(list((place / "kv").iterdir())) == 2, "a directory for each rank"


def small_model(place: Path, kind: str = "llama") -> Path:
    """A model of nobody's weights whose heads two ranks can share."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 41_000,
        "max_position_embeddings": 8192,
    }
    if kind == "llama":
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(place)
        return place
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(**shape, sliding_window=128, layer_types=layers)
    Gemma3ForCausalLM(config).save_pretrained(place)
    return place


def test_the_shell_blocks_of_the_readme_serve_a_model_that_remembers(tmp_path: Path) -> None:
    """Copied as they are, but for a directory, a log and a port of this test."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serve, ask = (
        block.replace("8077", port)
        .replace("served", str(tmp_path / "served"))
        .replace(f"--{tmp_path / 'served'}", "--served")
        .replace(".venv-vllm/bin/python", PYTHON)
        for block in blocks
        if "8077" in block
    )
    serve = serve.partition("\n")[2]  # it is installed
    first = shell(f"{serve}\n{ask}\nstatus=$?; kill %1; wait; exit $status")
    again = shell(f"{serve}\n{ask}\nstatus=$?; kill %1; wait; exit $status")
    found = [re.findall(r"([\d.,]+) tokens from tierkv: (.*)", said) for said in (first, again)]
    (fresh, warm), (restarted, hot) = found
    assert fresh[0] == "0"
    assert len({answer for _, answer in (fresh, warm, restarted, hot)}) == 1
    assert min(int(told.replace(",", "")) for told, _ in (warm, restarted, hot)) > 1000


def shell(script: str) -> str:
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
