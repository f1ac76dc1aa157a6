"""One life of transformers on a small model, in a process of its own; see `tierkv.testing.life`.

    python tools/transformers_life.py ORDER.json ANSWER.json

The model is a Llama of random weights, made here; "second" is another seed. The asks of a turn are
one padded batch for each tenant; an ask that is cancelled is a `generate` of its own, which its
asker leaves in the middle.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from tierkv.config import Config
from tierkv.engines.transformers import TieredCache, layout_of
from tierkv.store import Store
from tierkv.testing.life import Answer, Ask, Life, Said, main

BLOCK = 32
VOCABULARY = 1000
_SEEDS = {"first": 1, "second": 2}


class Gone(Exception):
    """The asker is."""


class Leaves(BaseStreamer):  # type: ignore[misc]
    """An asker who goes away after some tokens; `tokens` are those that came."""

    def __init__(self, after: int) -> None:
        self.tokens: list[int] = []
        self._after = after
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """A token, or the prompt at first."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.tokens += value.flatten().tolist()
        if len(self.tokens) >= self._after:
            raise Gone

    def end(self) -> None:
        """There is nothing to close."""


def made(life: Life) -> transformers.PreTrainedModel:
    """The model of this life."""
    torch.manual_seed(_SEEDS[life.model])
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, life.dtype))
    return model.eval()


@contextmanager
def opened(life: Life, model: transformers.PreTrainedModel) -> Iterator[Store | None]:
    """The store of this life; None without one."""
    if life.directory is None:
        yield None
        return
    tenants = sorted({ask.tenant for turn in life.turns for ask in turn if ask.tenant})
    config = Config.model_validate(
        {
            "block_tokens": BLOCK,
            "pages": {"hot": "4KiB", "warm": "128KiB", "cold": "256KiB"},
            "tiers": {
                "device": {"capacity": 0},
                "host": {"capacity": life.host},
                "cold": {
                    "capacity": life.cold,
                    "directory": life.directory,
                    "segment_cold_pages": 2,
                },
            },
            "namespaces": {"default": {}, **{tenant: {} for tenant in tenants}},
        }
    )
    layout = layout_of(model, block_tokens=BLOCK, targets=config.pages.targets)
    with Store.open(config, layout) as store:
        yield store


def answered(
    model: transformers.PreTrainedModel, asks: list[Ask], store: Store | None
) -> list[Answer]:
    """The answers to asks of one tenant, in one batch; a cancelled one comes alone."""
    columns = max(len(ask.tokens) for ask in asks)
    padded = [[0] * (columns - len(ask.tokens)) + ask.tokens for ask in asks]
    masks = [[0] * (columns - len(ask.tokens)) + [1] * len(ask.tokens) for ask in asks]
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}
    cache = None
    if store is not None:
        name = asks[0].tenant or "default"
        cache = TieredCache.open(model, inputs, store=store, namespace=name, always_load=True)
    reused = cache.reused_tokens if cache else [0] * len(asks)
    leaves = Leaves(asks[0].count // 2) if asks[0].is_cancelled else None
    try:
        out = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max(ask.count for ask in asks),
            do_sample=False,
            streamer=leaves,
        )
    except Gone:
        assert leaves is not None
        return [Answer(tokens=leaves.tokens, reused=reused[0])]
    if cache is not None:
        cache.commit(out)
    rows = zip(out[:, columns:].tolist(), asks, reused, strict=True)
    return [Answer(tokens=row[: ask.count], reused=count) for row, ask, count in rows]


def live(life: Life) -> Said:
    """Carry an order out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = made(life)
    turns = []
    with opened(life, model) as store:
        for turn in life.turns:
            said: dict[int, Answer] = {}
            groups: dict[str, list[int]] = {}
            for number, ask in enumerate(turn):
                groups.setdefault(f"cancelled {number}" if ask.is_cancelled else ask.tenant, [])
                groups[f"cancelled {number}" if ask.is_cancelled else ask.tenant].append(number)
            for numbers in groups.values():
                answers = answered(model, [turn[number] for number in numbers], store)
                said.update(zip(numbers, answers, strict=True))
            turns.append([said[number] for number in range(len(turn))])
    return Said(turns=turns)


if __name__ == "__main__":
    main(live)
