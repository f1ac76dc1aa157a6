"""What LMCache calls: its words on one side, ours on the other. See the package.

Stores have one thread, so that they land in order; lookups have one, and never wait for a disk
(but for the first of a form, which opens its store); loads have a few, so that the disk reads ahead
of the copy. LMCache's threads only submit and take results.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from lmcache import __version__
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from tierkv.core.errors import GeometryMismatch
from tierkv.engines.lmcache.forms import ChunkForm, Forms, config_of
from tierkv.engines.lmcache.lanes import Lane
from tierkv.engines.lmcache.shelf import Shelf
from tierkv.kernels.streaming import stream_copy
from tierkv.memory import Bytes

logger = logging.getLogger(__name__)

#: Chunks that are loaded at once: while one is copied, others are read.
_LOADS: Final = 4

#: Notes of more chunks than this, and than twice what is stored, are looked through.
_NOTES_MIN: Final = 1024


class TierKVL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """A second level of LMCache in tierkv's tiers. Any thread.

    `params` is `adapter_params` of the server's `--l2-adapter`: `config`, a YAML file, or `host`,
    `cold` and `directory`; capacities are those of each form of chunk. Raises ConfigError for what
    it does not know. Chunks of a form whose store cannot be opened are refused: `report_status`
    says why.
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        config = config_of(params)
        self._form_bytes_max = config.tiers.cold.capacity or config.tiers.host.capacity
        super().__init__(max_capacity_bytes=self._form_bytes_max)
        self._forms = Forms(config, str(__version__))
        self._stores: Lane[L2StoreResult] = Lane("tierkv-l2-store", create_event_notifier())
        self._lookups: Lane[Bitmap] = Lane("tierkv-l2-lookup", create_event_notifier())
        self._loads: Lane[Bitmap] = Lane("tierkv-l2-load", create_event_notifier(), threads=_LOADS)
        self._mutex = threading.Lock()
        #: Chunks that LMCache was told of, with their bytes: stored, or found after a restart.
        self._noted: dict[ObjectKey, int] = {}
        self._counts: Counter[str] = Counter()
        self._is_closed = False
        stream_copy()  # it is compiled once in a process: now, not while a lookup waits for a store

    # ---- events

    def get_store_event_fd(self) -> int:
        """Readable when a store has ended."""
        return self._stores.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a lookup has ended."""
        return self._lookups.fileno()

    def get_load_event_fd(self) -> int:
        """Readable when a load has ended."""
        return self._loads.fileno()

    # ---- storing

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Store chunks. It fails as a whole, though what can be stored is."""
        work = partial(self._store, list(keys), list(objects))
        return self._stores.submit(work, L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """The stores that have ended since this was last asked."""
        return self._stores.take_all()

    def _store(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2StoreResult:
        sizes: dict[ObjectKey, int] = {}
        refused = 0
        ends = time.monotonic() + self._forms.config.transfer.put_deadline_ms / 1e3
        for key, chunk in zip(keys, objects, strict=True):
            shelf = self._forms.shelf(form_of(chunk))
            if refused and time.monotonic() > ends:
                shelf = None  # the disk hangs: LMCache's memory is not to be held for hours
            stored = None if shelf is None else shelf.put(key, bytes_of(chunk))
            if shelf is not None and stored and not chunk.is_valid():
                shelf.delete(key)  # its memory was taken away (a forced clear) while it was read
                stored = None
            if stored is None:
                refused += 1
            elif stored:
                sizes[key] = stored
        self._note(sizes)
        self._count(stored=len(sizes), stored_bytes=sum(sizes.values()), refused=refused)
        self._step()
        return L2StoreResult(not refused, sum(sizes.values()))

    # ---- finding

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Find chunks, and keep what is found."""
        work = partial(self._lookup, list(keys), dict(group_layout_descs))
        return self._lookups.submit(work, Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Which chunks were found, once."""
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Give locks back. No wait, and no error."""
        for key in keys:
            for shelf in self._forms.opened().values():
                shelf.unlock(key)

    def _lookup(self, keys: list[ObjectKey], layouts: dict[int, MemoryLayoutDesc]) -> Bitmap:
        found = Bitmap(len(keys))
        said = {group: layout for group, layout in layouts.items() if _size(layout)}
        shelves = {group: self._shelves_of(layout) for group, layout in said.items()}
        again: dict[ObjectKey, int] = {}
        lost: list[ObjectKey] = []
        for number, key in enumerate(keys):
            asked = shelves.get(key.object_group_id)
            if asked is None:  # of no known form: it may be any
                asked = self._forms.all()
            shelf = next((one for one in asked if one.lock(key)), None)
            if shelf is not None:
                found.set(number)
                again[key] = shelf.size_bytes
            else:
                lost.append(key)
        self._note(again)
        self._forget(lost)
        hits = len(again)
        self._count(found=hits, missed=len(keys) - hits)
        for shelf in self._forms.opened().values():
            self._count(old_locks=shelf.release_old_locks())
        return found

    def _shelves_of(self, layout: MemoryLayoutDesc) -> list[Shelf]:
        """Where a chunk of this layout is: as it is, or as bytes that the serde made of it."""
        form = ChunkForm(*_tensors(layout.shapes, layout.dtypes), size_bytes=_size(layout))
        own = self._forms.shelf(form)
        others = self._forms.serialized()
        return others if own is None or own in others else [own, *others]

    # ---- loading

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Fill buffers with the chunks' bytes."""
        works: list[Callable[[], bool]] = [
            partial(self._load, key, chunk) for key, chunk in zip(keys, objects, strict=True)
        ]
        return self._loads.submit_each(works, partial(self._loaded, list(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which buffers hold their chunk, once; the others hold anything."""
        return self._loads.take(task_id)

    def _load(self, key: ObjectKey, chunk: MemoryObj) -> bool:
        shelf = self._forms.shelf(form_of(chunk))
        return shelf is not None and shelf.get(key, bytes_of(chunk))

    def _loaded(self, keys: list[ObjectKey], done: Sequence[bool]) -> Bitmap:
        loaded = Bitmap(len(keys))
        for number, is_there in enumerate(done):
            if is_there:
                loaded.set(number)
        there = [key for key, is_there in zip(keys, done, strict=True) if is_there]
        if there:
            self._notify_keys_accessed(there)
        self._count(loaded=len(there), not_loaded=len(keys) - len(there))
        self._step()
        return loaded

    # ---- deleting, and what is there

    def delete(self, keys: list[ObjectKey]) -> None:
        """Make chunks missing, over restarts too once the store was closed."""
        for key in keys:
            for shelf in self._forms.all():
                try:
                    self._count(deleted=shelf.delete(key))
                except Exception:
                    logger.exception("not deleted key=%s", key)
        self._forget(keys)

    def get_usage(self) -> AdapterUsage:
        """What the stores hold; by salt what this process stored or found."""
        shelves = list(self._forms.opened().values())
        noted = super().get_usage()
        return AdapterUsage(
            total_bytes_used=sum(shelf.used_bytes for shelf in shelves),
            total_capacity_bytes=self._form_bytes_max * max(1, len(shelves)),
            bytes_by_cache_salt=MappingProxyType(dict(noted.bytes_by_cache_salt)),
        )

    def report_status(self) -> dict[str, Any]:
        """Counters of this adapter, and `Store.snapshot` of each form."""
        refused = self._forms.refused()
        return {
            "is_healthy": not self._is_closed and not refused,
            "type": type(self).__name__,
            "counts": dict(self._counts),
            "stores": {str(form): s.snapshot() for form, s in self._forms.opened().items()},
            "refused": {str(form): why for form, why in refused.items()},
        }

    def flush(self) -> bool:
        """Make everything that was stored durable; False where a store could not. It waits."""
        flushed = [shelf.flush() for shelf in self._forms.opened().values()]
        return all(flushed)

    def close(self) -> None:
        """End the threads, make everything durable, close the descriptors."""
        if self._is_closed:
            return
        self._is_closed = True
        for lane in (self._lookups, self._loads, self._stores):
            lane.stop()
        self._forms.close()
        for lane in (self._lookups, self._loads, self._stores):
            lane.close()
        logger.info("closed counts=%s", dict(self._counts))

    # ---- small parts

    def _step(self) -> None:
        """Let time pass in the stores, and keep the notes in bounds."""
        shelves = list(self._forms.opened().values())
        for shelf in shelves:
            shelf.step()
        if len(self._noted) > _NOTES_MIN and len(self._noted) > 2 * sum(s.chunks for s in shelves):
            noted = list(self._noted)
            self._forget([key for key in noted if not any(s.holds(key) for s in shelves)])

    def _note(self, sizes: Mapping[ObjectKey, int]) -> None:
        """Tell LMCache of chunks that it does not know of."""
        with self._mutex:
            fresh = {key: size for key, size in sizes.items() if key not in self._noted}
            self._noted.update(fresh)
        if fresh:
            self._notify_keys_stored(list(fresh), list(fresh.values()))

    def _forget(self, keys: Sequence[ObjectKey]) -> None:
        """Tell LMCache of chunks that are gone."""
        with self._mutex:
            gone = {key: self._noted.pop(key) for key in keys if key in self._noted}
        if gone:
            self._notify_keys_deleted(list(gone), list(gone.values()))

    def _count(self, **amounts: int) -> None:
        with self._mutex:
            self._counts.update(amounts)


def form_of(chunk: MemoryObj) -> ChunkForm:
    """A buffer's form; a serde may have filled less of it than its shape says."""
    meta = chunk.metadata
    is_group = meta.shapes is not None and meta.dtypes is not None
    shapes, dtypes = (meta.shapes, meta.dtypes) if is_group else ([meta.shape], [meta.dtype])
    return ChunkForm(*_tensors(shapes, dtypes), chunk.get_size())


def bytes_of(chunk: MemoryObj) -> Bytes:
    """A buffer's bytes, the same memory. GeometryMismatch for memory of a device."""
    device = getattr(getattr(chunk, "raw_data", None), "device", None)
    if device is not None and device.type != "cpu":
        raise GeometryMismatch(f"a chunk lies on {device}, and host memory is copied here")
    return np.frombuffer(chunk.byte_array, np.uint8)[: chunk.get_size()]


def _tensors(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[object]
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return tuple(tuple(map(int, shape)) for shape in shapes), names


def _size(layout: MemoryLayoutDesc) -> int:
    pairs = zip(layout.shapes, layout.dtypes, strict=True)
    return sum(shape.numel() * dtype.itemsize for shape, dtype in pairs)
