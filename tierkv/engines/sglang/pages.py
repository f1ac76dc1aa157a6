"""Pages by name, over a store: any page, at any time, in any order.

SGLang promises nothing about the order of names: a prefetch asks for those behind what its host
pool still has, a backup brings the pages of one node of its tree, and the pages of a sliding window
come without the ones before. So each page is a chain of one block here, below the root, and not a
part of a longer one: a store's chain is found from its root only, so that a batch which begins in
the middle of one would find nothing (unless SGLang passes the names before it, which it does not by
default), and what was written in one batch could not be read by batches cut elsewhere. The names
are chained themselves, so nothing of what they say is lost. It costs some 20 us for a page that is
put and 15 us for one that is read, where a chain costs 1 us; a page of 64 tokens of an 8B model is
8 MiB, and takes a hundred times as long to copy.

What a chain would do for eviction is done by `Store.touch`: after a batch its last pages are the
first to go. What lies on the disk is fetched ahead of the page that is being copied.

A fault is a page less, never an exception. Any thread; `clear` and `close` wait for calls that are
under way.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from tierkv.config import Config
from tierkv.core.geometry import Layout
from tierkv.core.keys import BlockKey, KeyChain
from tierkv.memory import Bytes
from tierkv.store import Hint, HintKind, Match, Store

logger = logging.getLogger(__name__)

#: Pages that are fetched from the disk while one is copied.
_AHEAD: Final = 16


class Place(Protocol):
    """Where an engine has a page, or wants it."""

    def source(self) -> Bytes:
        """The page's bytes, (layers, 1, bytes)."""

    def target(self) -> Bytes:
        """An array of that shape to be filled."""

    def filled(self) -> None:
        """The last target has been filled."""


class Pages:
    """See the module. Open with `open`."""

    def __init__(self, config: Config, layout: Layout, *, namespace: str = "default") -> None:
        self._config = config
        self._layout = layout
        self._namespace = namespace
        self._chain = KeyChain(
            layout.fingerprint,
            namespace=namespace,
            salt=config.namespaces[namespace].salt.encode(),
            block_tokens=layout.block_tokens,
        )
        plan = layout.pages
        self._stride = plan.warm_page_blocks
        in_memory = plan.warm_pages_in(config.tiers.host.capacity) * plan.warm_page_blocks
        self._ahead = min(_AHEAD, in_memory // 4)
        self._deadline_s = config.transfer.demand_deadline_ms / 1e3
        self._store: Store | None = None
        self._users = 0
        self._free = threading.Condition()

    def open(self) -> None:
        """Open the store, with what an earlier life left. Raises as `Store.open`."""
        store = Store.open(self._config, self._layout)
        with self._free:
            self._store = store

    def leading(self, names: Sequence[str]) -> int:
        """How many of the first are stored. Waits for no disk."""
        has = self.has(names, only_leading=True)
        return len(has) if all(has) else has.index(False)

    def has(self, names: Sequence[str], *, only_leading: bool = False) -> list[bool]:
        """Which are stored; with `only_leading` nothing is said beyond the first that is not."""
        found: list[bool] = []
        try:
            with self._using() as store:
                for name in names:
                    found.append(store is not None and bool(self._match(store, name).blocks))
                    if only_leading and not found[-1]:
                        break
        except Exception:  # whatever it was, nothing is stored then
            logger.exception("not looked up pages=%d", len(names))
            found = []
        return found + [False] * (len(names) - len(found))

    def read(self, names: Sequence[str], places: Sequence[Place]) -> list[bool]:
        """Fill places; which were. What is in the others is undefined."""
        read = [False] * len(names)
        try:
            with self._using() as store:
                if store is not None:
                    self._read(store, [self._match(store, name) for name in names], places, read)
        except Exception:  # whatever it was, these pages are computed
            logger.exception("not read pages=%d", len(names))
        return read

    def write(self, names: Sequence[str], places: Sequence[Place]) -> list[bool]:
        """Store pages; which are stored now. Those behind the first that is not are not tried."""
        written = [False] * len(names)
        try:
            with self._using() as store:
                if store is not None:
                    self._write(store, [self._key(name) for name in names], places, written)
        except Exception:  # whatever it was, these pages are not stored
            logger.exception("not written pages=%d", len(names))
        return written

    def clear(self) -> bool:
        """Make everything a miss, on the disk too; whether that was done."""
        store = self._take()
        if store is None:
            return False
        store.clear()  # so that nothing is written out in closing
        store.close()
        if self._config.tiers.cold.capacity:
            shutil.rmtree(self._directory)
        self.open()
        return True

    def close(self) -> None:
        """Make everything durable and let it go; from here on all is a miss."""
        store = self._take()
        if store is not None:
            store.close()

    def snapshot(self) -> dict[str, dict[str, int]]:
        """As `Store.snapshot`; empty when closed."""
        with self._using() as store:
            return {} if store is None else store.snapshot()

    @property
    def _directory(self) -> Path:
        """What the cold tier has of this layout."""
        return self._config.tiers.cold.directory / self._layout.fingerprint.hex()[:16]

    @contextmanager
    def _using(self) -> Iterator[Store | None]:
        """The store, which is not closed meanwhile; None when there is none."""
        with self._free:
            store = self._store
            self._users += store is not None
        try:
            yield store
        finally:
            if store is not None:
                with self._free:
                    self._users -= 1
                    self._free.notify_all()

    def _take(self) -> Store | None:
        """The store, when nobody uses it any more; there is none then."""
        with self._free:
            store, self._store = self._store, None
            self._free.wait_for(lambda: not self._users)
            return store

    def _key(self, name: str) -> BlockKey:
        return self._chain.of_hashes([name.encode()])[0]

    def _match(self, store: Store, name: str) -> Match:
        return store.match_keys([self._key(name)], namespace=self._namespace)

    def _read(
        self, store: Store, found: Sequence[Match], places: Sequence[Place], read: list[bool]
    ) -> None:
        ends = time.monotonic() + self._deadline_s
        asked = 0
        for number, (match, place) in enumerate(zip(found, places, strict=True)):
            if not match.blocks or time.monotonic() > ends:
                continue
            asked = self._fetch(store, found, max(asked, number + 1), number + 1 + self._ahead)
            read[number] = store.get(match, place.target()) == 1
            if read[number]:
                place.filled()
        used = [match.keys[0] for match, has in zip(found, read, strict=True) if has]
        self._settle(store, used)

    def _fetch(self, store: Store, found: Sequence[Match], first: int, stop: int) -> int:
        """Have pages on the disk brought to memory; how far that was asked for."""
        stop = min(stop, len(found))
        for match in found[first:stop]:
            if match.tokens_by_tier.get("cold"):
                store.hint(Hint(HintKind.PREFETCH, [*match.keys], self._namespace))
        return max(first, stop)

    def _write(
        self, store: Store, keys: list[BlockKey], places: Sequence[Place], written: list[bool]
    ) -> None:
        for number, (key, place) in enumerate(zip(keys, places, strict=True)):
            match = store.match_keys([key], namespace=self._namespace)
            written[number] = bool(match.blocks) or bool(
                store.put_keys([key], place.source(), namespace=self._namespace)
            )
            if not written[number]:
                break
        self._settle(store, [key for key, has in zip(keys, written, strict=True) if has])

    def _settle(self, store: Store, used: Sequence[BlockKey]) -> None:
        """Let the first pages of a batch be the last to go, one for each page of memory."""
        for key in reversed(used[:: self._stride]):
            store.touch([key])
        store.step()
