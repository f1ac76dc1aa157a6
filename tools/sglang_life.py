"""A life of SGLang's HiCache, see `tierkv.testing.life`: `tools/sglang_life.py ORDER ANSWER`.

SGLang's own controller prefetches and backs up, with its threads, host pool and hashes; see
`tools/sglang_cpu.py`. Its engine needs a GPU, so what stands in for a model is this: KV is a
function of the weights' name, the type and all tokens up to a page's end, and an answer is one of
the KV that lies in the host pool and of the prompt. So a byte that is wrong changes tokens. What
the scheduler does around a prefetch is done here in its order: ask, take the hit, give it memory,
wait for the acknowledgements, compute the rest, back it up, and free the memory when that is
acknowledged. A life's settings may have `layout`, of the host pool, and `interface_v1`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from tierkv.testing.life import Answer, Ask, Life, Said, main

sys.path.insert(0, str(Path(__file__).parent))
import sglang_cpu as cpu

_WAIT_S = 60
_VOCABULARY = 40_000


@dataclass
class Asked:
    """An ask on its way."""

    ask: Ask
    pages: list[str]
    operation: Any = None
    #: Where its pages are in the host pool, and how many of them came from the storage.
    places: torch.Tensor | None = None
    loaded: int = 0


class Engine:
    """What is left of an engine without its model."""

    def __init__(self, life: Life) -> None:
        cpu.ready()
        self._life = life
        device = cpu.device_pool(dtype=getattr(torch, life.dtype))
        whole = [len(ask.tokens) for turn in life.turns for ask in turn]
        most = max(len(turn) for turn in life.turns) * max(whole)
        self._host = cpu.host_pool(
            device,
            tokens=-(-most // cpu.PAGE_TOKENS) * cpu.PAGE_TOKENS,
            layout=life.settings.get("layout", "page_first"),
        )
        self._controller = cpu.controller(device, self._host, self._extra())

    def _extra(self) -> dict[str, object] | None:
        life = self._life
        if life.directory is None:
            return None
        weights = Path(life.directory).parent / f"{life.model}.safetensors"
        weights.write_text(life.model)
        return {
            "interface_v1": life.settings.get("interface_v1", 1),
            "host": life.host,
            "cold": life.cold,
            "directory": life.directory,
            "weights": str(weights),
        }

    def turn(self, asks: list[Ask]) -> list[Answer]:
        """Answer some asks together."""
        asked = [Asked(ask, cpu.hashes_of(ask.tokens, ask.tenant or None)) for ask in asks]
        if self._life.directory is not None:
            self._load(asked)
        for one in asked:
            self._compute(one)
        answers = [self._answer(one) for one in asked]
        if self._life.directory is not None:
            self._save(asked)
        self._host.clear()
        return answers

    def close(self) -> None:
        """End, as SGLang does."""
        self._controller.detach_storage_backend()

    def _load(self, asked: list[Asked]) -> None:
        """Prefetch what is stored."""
        engine, size = self._controller, cpu.PAGE_TOKENS
        by_name = {}
        for number, one in enumerate(asked):
            key = cpu.key_of(one.ask.tokens[: len(one.pages) * size], one.ask.tenant or None)
            one.operation = engine.prefetch(str(number), key)
            by_name[str(number)] = one
        waiting = set()
        for _ in asked:
            operation = engine.prefetch_hit_queue.get(timeout=_WAIT_S)
            one = by_name[operation.request_id]
            if operation.storage_hit_count < engine.prefetch_threshold:
                continue  # the scheduler revokes it
            operation.host_indices = one.places = self._host.alloc(operation.storage_hit_count)
            engine.prefetch_buffer.put(operation)
            waiting.add(operation.request_id)
            if one.ask.is_cancelled:
                engine.terminate_prefetch(operation)
        while waiting:
            ack = engine.ack_prefetch_queue.get(timeout=_WAIT_S)
            if ack.completed_tokens is not None:
                by_name[ack.rid].loaded = ack.completed_tokens // size
            if ack.completed_req:
                waiting.discard(ack.rid)

    def _compute(self, one: Asked) -> None:
        """Make the KV of the pages that were not loaded."""
        size = cpu.PAGE_TOKENS
        loaded = one.loaded * size
        places = one.places if one.places is not None else torch.empty(0, dtype=torch.int64)
        self._host.free(places[loaded:])
        fresh = self._host.alloc(len(one.pages) * size - loaded)
        one.places = torch.cat([places[:loaded], fresh])
        state = xxhash.xxh3_64(f"{self._life.model} {self._life.dtype}".encode())
        tokens = np.asarray(one.ask.tokens, np.int64)
        for page in range(len(one.pages)):
            state.update(tokens[page * size : (page + 1) * size].tobytes())
            if page >= one.loaded:
                made = self._host.get_dummy_flat_data_page()
                rows = made.view(torch.uint8).numpy()
                rows[:] = np.frombuffer(np.random.default_rng(state.intdigest()).bytes(rows.size),
                                        np.uint8)  # fmt: skip
                self._host.set_from_flat_data_page(int(one.places[page * size]), made)

    def _answer(self, one: Asked) -> Answer:
        """Tokens that follow from the prompt and from the KV that is there."""
        assert one.places is not None
        state = xxhash.xxh3_64(np.asarray(one.ask.tokens, np.int64).tobytes())
        for place in one.places[:: cpu.PAGE_TOKENS].tolist():
            page = self._host.get_data_page(place, flat=True)
            state.update(page.view(torch.uint8).numpy())
        rng = np.random.default_rng(state.intdigest())
        count = one.ask.count // 2 if one.ask.is_cancelled else one.ask.count
        return Answer(
            tokens=rng.integers(0, _VOCABULARY, count).tolist(),
            reused=one.loaded * cpu.PAGE_TOKENS,
        )

    def _save(self, asked: list[Asked]) -> None:
        """Back up what was computed."""
        engine, waiting = self._controller, 0
        for one in asked:
            assert one.places is not None
            first = one.loaded * cpu.PAGE_TOKENS
            if one.pages[one.loaded :]:
                tokens = one.ask.tokens[first:]
                engine.write_storage(one.places[first:], tokens, one.pages[one.loaded :])
                waiting += 1
        for _ in range(waiting):
            engine.ack_backup_queue.get(timeout=_WAIT_S)


def live(life: Life) -> Said:
    """Live one life."""
    engine = Engine(life)
    turns = [engine.turn(asks) for asks in life.turns]
    engine.close()
    return Said(turns=turns)


if __name__ == "__main__":
    main(live)
