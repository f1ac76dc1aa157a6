"""Chunks of vLLM's own offloading, by name, over a store: any of them, at any time, in any order.

vLLM's tiers ask for one chunk at a time and promise nothing about their order, so each is a chain
of one block here, below the root of its namespace, and its bytes are opaque: one row of vLLM's CPU
tier. Loads have a thread of their own, and so do stores, which write to the disk behind: a load
never waits for a store. What has ended is taken by the scheduler's thread, which never waits.

A fault is a chunk less, never an exception. A load that takes longer than
`transfer.demand_deadline_ms` brings no more chunks, and vLLM computes the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
import numpy.typing as npt

from tierkv.core.geometry import Form, KVGeometry, Layout, PageTargets
from tierkv.core.keys import BlockKey, KeyChain
from tierkv.store import Hint, HintKind, Match, Store

logger = logging.getLogger(__name__)

#: Rows of bytes (chunks, bytes of a chunk).
Rows = npt.NDArray[np.uint8]

#: Chunks that are fetched from the disk while one is copied.
_AHEAD: Final = 16


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has ended: which of its chunks were moved, and how long that took."""

    job: int
    is_load: bool
    moved: list[bool]
    seconds: float


def chunk_layout(chunk_bytes: int, *, targets: PageTargets, **identity: str) -> Layout:
    """The layout of chunks: one "token" of one layer, as nothing here looks into them.

    `identity`: `model`, `revision` and `engine_layout` of a `Layout`.
    """
    geometry = KVGeometry(layers=1, kv_heads=1, head_dim=chunk_bytes, dtype="uint8",
                          form=Form.LATENT)  # fmt: skip
    return Layout(geometry, block_tokens=1, targets=targets, **identity)


class Chunks:
    """See the module. `has`, `load`, `save`, `ended` are for the scheduler's thread.

    Takes over `store`, and closes it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._chain = KeyChain(
            store.layout.fingerprint,
            salt=store.config.namespaces["default"].salt.encode(),
            block_tokens=1,
        )
        self._loads = ThreadPoolExecutor(1, "tierkv-tier-load")
        self._saves = ThreadPoolExecutor(1, "tierkv-tier-save")
        self._ended: SimpleQueue[Ended] = SimpleQueue()
        self._under_way: set[Future[None]] = set()

    def has(self, name: bytes) -> bool:
        """Whether a chunk is stored. Waits for no disk."""
        return bool(self._match(name).blocks)

    def load(self, job: int, names: Sequence[bytes], rows: Sequence[Rows]) -> None:
        """Start filling rows, each (bytes of a chunk,)."""
        self._start(self._loads, job, lambda: self._read(names, rows), len(names), is_load=True)

    def save(self, job: int, names: Sequence[bytes], rows: Sequence[Rows]) -> None:
        """Start storing rows, which stay as they are until the job has ended."""
        self._start(self._saves, job, lambda: self._write(names, rows), len(names), is_load=False)

    def ended(self) -> list[Ended]:
        """The jobs that have ended since this was last asked."""
        self._under_way = {future for future in self._under_way if not future.done()}
        found = []
        while True:
            try:
                found.append(self._ended.get_nowait())
            except Empty:
                return found

    def step(self) -> None:
        """Once per engine step."""
        self._store.step()

    def drain(self) -> None:
        """Wait until every job has ended."""
        wait(self._under_way)

    def close(self) -> None:
        """Let what is under way end, and make what is stored durable."""
        self._loads.shutdown()
        self._saves.shutdown()
        self._under_way.clear()
        self._store.close()

    def snapshot(self) -> dict[str, dict[str, int]]:
        """As `Store.snapshot`."""
        return self._store.snapshot()

    def _start(
        self,
        pool: ThreadPoolExecutor,
        job: int,
        move: Callable[[], list[bool]],
        count: int,
        *,
        is_load: bool,
    ) -> None:
        def run() -> None:
            begun = time.perf_counter()
            try:
                moved = move()
            except Exception:  # whatever it was, vLLM computes these chunks, or stores them again
                logger.exception("not moved job=%d chunks=%d", job, count)
                moved = [False] * count
            self._ended.put(Ended(job, is_load, moved, time.perf_counter() - begun))

        self._under_way.add(pool.submit(run))

    def _read(self, names: Sequence[bytes], rows: Sequence[Rows]) -> list[bool]:
        found = [self._match(name) for name in names]
        moved, asked = [], 0
        ends = time.monotonic() + self._store.config.transfer.demand_deadline_ms / 1e3
        for number, (match, row) in enumerate(zip(found, rows, strict=True)):
            stop = min(len(found), number + 1 + _AHEAD)
            for later in found[max(asked, number + 1) : stop]:
                if later.tokens_by_tier.get("cold"):
                    self._store.hint(Hint(HintKind.PREFETCH, [*later.keys]))
            asked = stop
            is_wanted = bool(match.blocks) and time.monotonic() < ends
            moved.append(is_wanted and self._store.get(match, row[None, None]) == 1)
        return moved

    def _write(self, names: Sequence[bytes], rows: Sequence[Rows]) -> list[bool]:
        return [
            self.has(name) or self._store.put_keys([self._key(name)], row[None, None]) == 1
            for name, row in zip(names, rows, strict=True)
        ]

    def _match(self, name: bytes) -> Match:
        return self._store.match_keys([self._key(name)])

    def _key(self, name: bytes) -> BlockKey:
        return self._chain.of_hashes([name])[0]
