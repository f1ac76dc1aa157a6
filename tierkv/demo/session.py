"""Runs prompts through the model and measures them. The only part of the demo with torch."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from tierkv.core.geometry import Layout
from tierkv.demo.model import load
from tierkv.demo.row import Row
from tierkv.engines.transformers import TieredCache, layout_of

if TYPE_CHECKING:
    from tierkv.store import Store

#: Told the part of the prefill that is done, 0 to 1.
Tick = Callable[[float], None]

#: More than one answer to a long prompt takes beside the model: K, V and the model's own scratch.
_WARM_BYTES = 1 << 30
#: mallopt(3): never give memory back, never map a large allocation by itself.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of one prompt."""

    ids: tuple[int, ...]

    @property
    def tensor(self) -> torch.Tensor:
        """The ids as the model takes them: int64 (1, tokens)."""
        return torch.tensor([self.ids])


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A prompt answered without tierkv: what every other way must equal."""

    tokens: list[int]
    ttft_s: float
    total_s: float

    @property
    def step_s(self) -> float:
        """Seconds of one token after the first."""
        return (self.total_s - self.ttft_s) / max(1, len(self.tokens) - 1)


def _no_tick(_part: float) -> None:
    """Nobody watches."""


class FirstToken(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` gave the first new token."""

    def __init__(self) -> None:
        self.at_ns: int | None = None
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        """`generate` hands over the prompt first, then each new token."""
        self._calls += 1
        if self._calls == 2:
            self.at_ns = time.perf_counter_ns()

    def end(self) -> None:
        """Nothing to flush."""


class Session:
    """A loaded model that answers prompts greedily. Single owner."""

    def __init__(self, path: Path, *, new_tokens: int) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.path = path
        self.new_tokens = new_tokens
        self.model, self.tokenizer = load(path)
        self.layout: Layout = layout_of(self.model)
        self._recomputed: dict[tuple[int, ...], Recomputed] = {}

    def warm_up(self) -> None:
        """Let torch start its threads, choose its kernels and get its memory before timing."""
        _keep_freed_memory()
        torch.ones(_WARM_BYTES // 4)
        ids = torch.arange(100, 164)[None]
        self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)

    def prompt(self, text: str) -> Prompt:
        """One user turn in the model's chat form, ready for the answer."""
        messages = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return Prompt(tuple(ids))

    def next_turn(self, prompt: Prompt, answer: list[int], text: str) -> Prompt:
        """The chat so far, by its own token ids, and the next user turn.

        Ids and not text are joined: text that is tokenised again may come out otherwise.
        """
        end: int = self.tokenizer.eos_token_id
        spoken = answer if answer and answer[-1] == end else [*answer, end]
        turn = f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return Prompt((*prompt.ids, *spoken, *self.tokenizer(turn)["input_ids"]))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text)["input_ids"])

    def text_of(self, tokens: list[int]) -> str:
        """An answer as text."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def is_recomputed(self, prompt: Prompt) -> bool:
        """Whether `recompute` knows the answer already."""
        return prompt.ids in self._recomputed

    def load_only(self, store: Store, prompt: Prompt) -> None:
        """Load what the store has of a prompt, and compute nothing."""
        TieredCache.open(self.model, prompt.tensor, store=store)

    def recompute(self, prompt: Prompt, tick: Tick = _no_tick) -> Recomputed:
        """The answer by plain transformers with its own cache, computed once per prompt."""
        known = self._recomputed.get(prompt.ids)
        if known is None:
            started_ns = time.perf_counter_ns()
            cache = DynamicCache(config=self.model.config)
            tokens, first_ns = self._generate(prompt, cache, tick)
            known = Recomputed(
                tokens,
                ttft_s=(first_ns - started_ns) / 1e9,
                total_s=(time.perf_counter_ns() - started_ns) / 1e9,
            )
            self._recomputed[prompt.ids] = known
        return known

    def answer(
        self,
        store: Store,
        prompt: Prompt,
        *,
        name: str,
        note: str = "",
        expected: Recomputed,
        commit: bool = False,
        tick: Tick = _no_tick,
    ) -> Row:
        """The answer with `store`; `commit` keeps the answer's blocks for the next turn."""
        started_ns = time.perf_counter_ns()
        cache = TieredCache.open(self.model, prompt.tensor, store=store)
        tokens, first_ns = self._generate(prompt, cache, tick)
        total_ns = time.perf_counter_ns() - started_ns
        if commit:
            cache.commit()
        report = cache.report
        return Row(
            name=name,
            note=note,
            prompt_tokens=len(prompt.ids),
            device_tokens=report.tokens_by_tier.get("device", 0),
            host_tokens=report.tokens_by_tier.get("host", 0),
            cold_tokens=report.tokens_by_tier.get("cold", 0),
            ttft_s=(first_ns - started_ns) / 1e9,
            recompute_ttft_s=expected.ttft_s,
            total_s=total_ns / 1e9,
            load_s=report.load_s,
            loaded_bytes=report.reused_bytes,
            store_s=report.store_s,
            stored_bytes=report.stored_bytes,
            answer=self.text_of(tokens),
            answer_tokens=tokens,
            tokens_identical=tokens == expected.tokens,
        )

    def _generate(
        self, prompt: Prompt, cache: TieredCache | DynamicCache, tick: Tick
    ) -> tuple[list[int], int]:
        """The new token ids, and when the first was known (`perf_counter_ns`)."""
        ids = prompt.tensor
        first = FirstToken()
        with self._ticking(tick):
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                streamer=first,
            )
        assert first.at_ns is not None, "generate gave no token"
        return out[0, ids.shape[1] :].tolist(), first.at_ns

    @contextmanager
    def _ticking(self, tick: Tick) -> Iterator[None]:
        """Call `tick` as each layer of the prefill is done; later passes are too short to show."""
        layers = self.model.model.layers
        done = 0

        def after_layer(*_: object) -> None:
            nonlocal done
            done += 1
            if done <= len(layers):
                tick(done / len(layers))

        hooks = [layer.register_forward_hook(after_layer) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _keep_freed_memory() -> None:
    """Have malloc reuse what torch frees, for recomputing and for loading alike.

    By default each large tensor is fresh memory from the kernel: a layer of a long prompt then
    costs more page faults than work, and in a virtual machine that touches memory for the first
    time several times that. Inference on CPUs is usually run with an allocator that keeps memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def quiet() -> None:
    """Keep the libraries' own bars and hints off the terminal."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
