"""Saves: from an engine's cache to the store, behind its steps.

Blocks are gathered on a stream of their own, after what the step computes; the engine's stream
waits for that, as it may write to the places again. They are copied to host memory and put by a
thread, in parts, so that memory stays bounded: an engine that is faster than its blocks are put
waits.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tierkv.core.keys import BlockKey
from tierkv.engines.vllm.loading import GroupCache
from tierkv.engines.vllm.side_stream import Mark, SideStream
from tierkv.engines.vllm.step import Blocks
from tierkv.store import Store

logger = logging.getLogger(__name__)

#: Bytes of a part, and of all parts that are not put yet.
_PART_BYTES: Final = 64 << 20
_PENDING_BYTES_MAX: Final = 256 << 20


@dataclass(slots=True)
class _Part:
    request: str
    store: Store
    keys: list[BlockKey]
    first: int
    rows: torch.Tensor
    copied: Mark


@dataclass(slots=True)
class _End:
    """All of a step was submitted: its number, its tokens, and when it began."""

    step: int
    tokens: int
    began: float


class Saver:
    """See the module. `submit` and `done` are called by the worker's thread."""

    def __init__(self, caches: Sequence[GroupCache], stream: SideStream) -> None:
        self._caches = caches
        self._stream = stream
        self._parts: queue.SimpleQueue[_Part | _End | None] = queue.SimpleQueue()
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._done = 0
        #: Tokens that a step computed and the seconds that it took, of the last that saved any.
        self.computed: tuple[int, float] | None = None
        self.saved_blocks = self.saved_bytes = 0
        self._thread = threading.Thread(target=self._run, name="tierkv-save", daemon=True)
        self._thread.start()

    def submit(self, blocks: Blocks) -> None:
        """Put those of some blocks that are not stored yet, soon; their places are free at once."""
        cache = self._caches[blocks.group]
        store, block_bytes = cache.store, cache.store.plan.block_bytes
        known = max(blocks.first, store.match_keys(blocks.keys).blocks)
        places = blocks.places[known - blocks.first :]
        step = max(1, _PART_BYTES // block_bytes)
        for at in range(0, len(places), step):
            part = places[at : at + step]
            size = len(part) * block_bytes
            self._wait_for_room(size)
            try:
                rows, copied = self._gather(cache.layers, part)
            except BaseException:
                self._give_back(size)
                raise
            keys = blocks.keys[: known + at + len(part)]
            self._parts.put(_Part(blocks.request, store, keys, known + at, rows, copied))

    def end_of(self, step: int, *, tokens: int, began: float) -> None:
        """All of a step was submitted, that computes tokens since `began` (perf_counter)."""
        self._parts.put(_End(step, tokens, began))

    def done(self, *, wait_s: float = 0.0) -> int:
        """The last step of which all is put; waits so long for the last that was submitted."""
        with self._changed:
            if wait_s and self._pending_bytes:
                self._changed.wait_for(lambda: not self._pending_bytes, wait_s)
            return self._done

    def close(self) -> None:
        """Put what was submitted."""
        self._parts.put(None)
        self._thread.join()

    def _gather(self, layers: list[torch.Tensor], places: list[int]) -> tuple[torch.Tensor, Mark]:
        """Blocks as (layers, blocks, bytes) in host memory, there when the mark is passed."""
        self._stream.follow()
        with self._stream.queue():
            index = self._stream.index(places)
            rows = torch.stack([layer.index_select(0, index) for layer in layers])
        self._stream.mark().hold()
        with self._stream.queue():
            rows = self._stream.to_host(rows)
        return rows, self._stream.mark()

    def _wait_for_room(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pending_bytes or self._pending_bytes + size <= _PENDING_BYTES_MAX
            )
            self._pending_bytes += size

    def _give_back(self, size: int) -> None:
        with self._changed:
            self._pending_bytes -= size
            self._changed.notify_all()

    def _run(self) -> None:
        computed_at: float | None = None
        while (part := self._parts.get()) is not None:
            if isinstance(part, _End):
                with self._changed:
                    self._done = part.step
                if computed_at is not None:
                    self.computed = part.tokens, computed_at - part.began
                computed_at = None
                continue
            try:
                part.copied.wait()  # what it waits for is what the step computes
                computed_at = computed_at or time.perf_counter()
                saved = part.store.put_keys(part.keys, part.rows, first_block=part.first)
                self.saved_blocks += saved
                self.saved_bytes += saved * part.store.plan.block_bytes
            except Exception:  # whatever it was, it is no reason to stop an engine
                logger.exception("not saved request=%s", part.request)
            self._give_back(part.rows.nbytes)
