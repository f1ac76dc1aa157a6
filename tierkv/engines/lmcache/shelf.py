"""A shelf: the chunks of one form, in a store of their own.

A chunk is one block that has no parent, as LMCache stores, asks for and deletes each by itself, in
any order. Its key is a hash over all of LMCache's key under the root of the store's layout, so
another model name, rank, object group, salt or form of chunk never finds it. A page holds one
block: a chunk is evicted alone, written as soon as it is put, and what is deleted takes nothing
with it. Any thread.

Three things hold beside the store:

- **locks**: a looked-up chunk of which the disk has the only copy is pinned until it was loaded, or
  until every lock on it is given back; a lock that nobody gives back ends after `LOCK_S`. What is
  lost all the same is missing when it is loaded.
- **deleted**: a chunk that is being moved cannot be forgotten at once. It is missing from the
  moment it was deleted, and forgotten later; until then it is not stored again.
- a store's faults are misses, here too.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from dataclasses import dataclass
from typing import Final, Protocol

from tierkv.config import Config
from tierkv.core.geometry import Layout
from tierkv.core.keys import DEFAULT_NAMESPACE, BlockKey, KeyChain
from tierkv.memory import Bytes
from tierkv.store import Hint, HintKind, Match, Store

#: After this a lock has been forgotten by who took it.
LOCK_S: Final = 600.0

#: Chunks that are tried to be forgotten at a time, where that was not possible before.
_RETRIES: Final = 16


class ChunkKey(Protocol):
    """What is used of LMCache's `ObjectKey`."""

    @property
    def chunk_hash(self) -> bytes:
        """A hash of the chunk's tokens, and of those before it."""

    @property
    def model_name(self) -> str:
        """As the engine calls it."""

    @property
    def kv_rank(self) -> int:
        """Which part of the cache: world size, rank, and both within the node."""

    @property
    def object_group_id(self) -> int:
        """Which group of layers."""

    @property
    def cache_salt(self) -> str:
        """Whose it is; "" is nobody's."""


@dataclass(slots=True)
class _Lock:
    count: int
    since: float
    is_pinned: bool


class Shelf:
    """See the module. It owns its store; `size_bytes` is that of every chunk."""

    def __init__(self, config: Config, layout: Layout) -> None:
        self.size_bytes = layout.pages.block_bytes
        self._store = Store.open(config, layout)
        self._is_cold = bool(config.tiers.cold.capacity)
        self._chains = {
            name: KeyChain(layout.fingerprint, namespace=name, salt=space.salt.encode())
            for name, space in config.namespaces.items()
        }
        self._mutex = threading.Lock()
        self._locks: dict[BlockKey, _Lock] = {}  # the one that was taken first is first
        self._deleted: dict[BlockKey, str] = {}  # with the namespace

    # ---- finding

    def holds(self, chunk: ChunkKey) -> bool:
        """Whether it could be loaded now. Waits for nothing."""
        key, space = self._name(chunk)
        return key not in self._deleted and bool(self._find(key, space).blocks)

    def lock(self, chunk: ChunkKey) -> bool:
        """As `holds`; what is held is kept until it is loaded or unlocked, as far as possible."""
        key, space = self._name(chunk)
        if key in self._deleted:
            return False
        found = self._find(key, space)
        if not found.blocks:
            return False
        # A pin keeps copies in host memory, too, where it would be in the way of other chunks.
        wants_pin = bool(found.tokens_by_tier.get("cold"))
        with self._mutex:
            before = self._locks.pop(key, None)
            count = before.count + 1 if before else 1
            is_pinned = wants_pin or (before is not None and before.is_pinned)
            self._locks[key] = _Lock(count, time.monotonic(), is_pinned)
        if wants_pin:
            self._hint(HintKind.PIN, key, space)
        return True

    def unlock(self, chunk: ChunkKey) -> None:
        """Give one lock back; too many do nothing."""
        key, space = self._name(chunk)
        with self._mutex:
            lock = self._locks.get(key)
            if lock is None:
                return
            lock.count -= 1
            if lock.count:
                return
            del self._locks[key]
        if lock.is_pinned:
            self._hint(HintKind.UNPIN, key, space)

    def release_old_locks(self) -> int:
        """End locks that are older than `LOCK_S`; how many."""
        before = time.monotonic() - LOCK_S
        ended: list[BlockKey] = []
        with self._mutex:
            for key, lock in self._locks.items():
                if lock.since > before:
                    break
                ended.append(key)
            for key in ended:
                del self._locks[key]
        for key in ended:
            self._hint(HintKind.UNPIN, key, DEFAULT_NAMESPACE)
        return len(ended)

    # ---- moving

    def put(self, chunk: ChunkKey, data: Bytes) -> int | None:
        """Store a chunk's bytes; `data` is the caller's again, and the disk is written behind.

        Gives the bytes that were stored: 0 where it was known, None where it could not be.
        """
        key, space = self._name(chunk)
        if key in self._deleted and not self._forget(key, space):
            return None
        if self._find(key, space).blocks:
            return 0
        stored = self._store.put_keys([key], data.reshape(1, 1, -1), namespace=space)
        return self.size_bytes if stored else None

    def get(self, chunk: ChunkKey, out: Bytes) -> bool:
        """Fill `out` with a chunk's bytes, verified; if False it holds anything."""
        key, space = self._name(chunk)
        if key in self._deleted:
            return False
        match = self._find(key, space)  # a read of what is known to be missing waits for nothing
        is_there = bool(match.blocks) and self._store.get(match, out.reshape(1, 1, -1)) == 1
        self._unpin(key, space)
        return is_there and key not in self._deleted

    def delete(self, chunk: ChunkKey) -> bool:
        """Make a chunk missing for good; whether it was there."""
        key, space = self._name(chunk)
        if key in self._deleted or not self._find(key, space).blocks:
            return False
        self._deleted[key] = space
        self._unpin(key, space)
        self._forget(key, space)
        return True

    # ---- background

    def step(self) -> None:
        """Let time pass; call it after each task."""
        self._store.step()
        for key, space in list(itertools.islice(self._deleted.items(), _RETRIES)):
            self._forget(key, space)

    def flush(self) -> bool:
        """See `Store.flush`."""
        return self._store.flush()

    @property
    def chunks(self) -> int:
        """How many are known."""
        return self.snapshot()["tiers"]["blocks_known"]

    @property
    def used_bytes(self) -> int:
        """Bytes of chunks in the cold tier; in host memory where there is no cold tier."""
        return self.snapshot()["tiers"]["cold,used_bytes" if self._is_cold else "host,used_bytes"]

    def snapshot(self) -> dict[str, dict[str, int]]:
        """See `Store.snapshot`."""
        return self._store.snapshot()

    def close(self) -> None:
        """Make all durable, but for what was deleted, and let it go."""
        if self._deleted:
            self._store.flush()  # what is being moved arrives, and can be forgotten then
            for key, space in list(self._deleted.items()):
                self._forget(key, space)
        self._store.close()

    # ---- small parts

    def _name(self, chunk: ChunkKey) -> tuple[BlockKey, str]:
        """A chunk's key, and its namespace: that of its salt where there is one of that name."""
        space = chunk.cache_salt if chunk.cache_salt in self._chains else DEFAULT_NAMESPACE
        digest = hashlib.sha256(b"tierkv/lmcache/1")
        rank, group = str(chunk.kv_rank), str(chunk.object_group_id)
        for part in (chunk.model_name, rank, group, chunk.cache_salt):
            text = part.encode("utf-8", "surrogatepass")
            digest.update(len(text).to_bytes(4, "little") + text)
        digest.update(chunk.chunk_hash)
        return self._chains[space].of_hashes([digest.digest()])[0], space

    def _find(self, key: BlockKey, space: str) -> Match:
        return self._store.match_keys([key], namespace=space)

    def _hint(self, kind: HintKind, key: BlockKey, space: str) -> None:
        self._store.hint(Hint(kind, [key], space))

    def _unpin(self, key: BlockKey, space: str) -> None:
        """Let a chunk go that was loaded: it is the last to be evicted now anyway."""
        with self._mutex:
            lock = self._locks.get(key)
            if lock is None or not lock.is_pinned:
                return
            lock.is_pinned = False
        self._hint(HintKind.UNPIN, key, space)

    def _forget(self, key: BlockKey, space: str) -> bool:
        """Forget a deleted chunk; False while somebody moves it."""
        self._hint(HintKind.FORGET, key, space)
        if self._find(key, space).blocks:
            return False
        self._deleted.pop(key, None)
        return True
