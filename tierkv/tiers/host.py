"""Host tier: warm pages in one arena of our own.

The arena is one anonymous mapping: bound to a NUMA node, advised for huge pages, touched in
parallel so that no first write pays for page faults, and registered with CUDA where CUDA is there,
region after region by a thread of its own: registering takes 0.1 s a GiB, one huge call can fail
(vllm #51080), and the driver makes others wait for as long as one call takes (TensorRT-LLM #17773).
The arena is usable meanwhile; `regions` says how far it got. torch's own pinned allocator is not
used: it neither binds nor grows that way.

Huge pages make copies faster, but on a fragmented host the kernel may compact memory for minutes
before it gives one (TensorRT-LLM #15431). With ``hugepages="auto"`` the advice is withdrawn for
the rest of the arena once a chunk takes longer than `_SLOW_CHUNK_S`.

A page is ``(layers, page_blocks, block_layer_bytes)``; see `tierkv.core.geometry`. Reads and
writes copy on the calling thread. Any thread, as long as no two touch the same place; the
planner sees to that.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import TierFailed
from tierkv.core.geometry import MIB, PagePlan
from tierkv.core.tier import Span
from tierkv.kernels.streaming import STREAM_ALIGN, StreamCopy, stream_copy
from tierkv.tiers import numa
from tierkv.tiers.unified import Home

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

_MADV_HUGEPAGE: Final = 14
_MADV_DONTDUMP: Final = 16
_MADV_POPULATE_WRITE: Final = 23
_CHUNK_BYTES: Final = 64 * MIB
_SLOW_CHUNK_S: Final = 1.0
#: Smaller copies are absorbed by the last-level cache, and that is faster.
_STREAM_BYTES_MIN: Final = 8 * MIB
#: Seconds between two looks at where a coherent device has put the arena.
_LOOK_S: Final = 60.0
#: Room after the arena that is never touched: so the kernel joins no two arenas to one mapping, and
#: each can be counted for itself. Whole huge pages, or it would not align the mapping to them.
_GUARD_BYTES: Final = 2 * MIB
#: One registration takes some 25 ms, so that nobody waits longer.
_REGION_BYTES: Final = 256 * MIB


class Registrar(Protocol):
    """What pins memory: the CUDA driver, bound to a device. Both raise RuntimeError."""

    def host_register(self, address: int, size_bytes: int) -> None:
        """Pin memory and map it for kernels."""
        ...

    def host_unregister(self, address: int) -> None:
        """Undo it, for the same address."""
        ...


class HostTier:
    """The arena of warm pages."""

    def __init__(
        self,
        plan: PagePlan,
        *,
        pages: int,
        node: int | None = None,
        hugepages: Literal["off", "auto", "advise"] = "auto",
        threads: int = 0,
        registrar: Registrar | None = None,
        register_threads: int = 1,
        home: Home | None = None,
    ) -> None:
        self.plan = plan
        self.page_count = pages
        self._node = node
        self._hugepages = hugepages
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._home = home  # coherent memory: nothing is registered
        self._registrar = None if home else registrar
        self._register_threads = register_threads
        page = plan.warm_page_bytes  # regions of whole pages: no copy may leave its region
        self._region_pages = max(1, _REGION_BYTES // page)
        self._is_pinned: npt.NDArray[np.bool_] = np.zeros(
            -(-max(1, pages) // self._region_pages), np.bool_
        )
        self._closing = threading.Event()
        self.recalled_bytes = 0  # from device memory, where a coherent device had drawn them
        self._registering: threading.Thread | None = None
        self._watching: threading.Thread | None = None
        self._map: mmap.mmap | None = None
        self._copy: StreamCopy | None = None
        self._cleared: dict[int, int] = {}  # page -> the last opening that it was zeroed for
        self._clearing = threading.Lock()

    def open(self) -> None:
        """Map, bind and touch the arena. Raises TierFailed if there is not enough memory."""
        plan, size = self.plan, max(1, self.page_count) * self.plan.warm_page_bytes
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._map = mmap.mmap(-1, size + _GUARD_BYTES, flags=flags)
        except (OSError, ValueError) as error:
            raise TierFailed(
                f"host tier: cannot map {size} bytes ({error}); lower tiers.host.capacity"
            ) from error
        arena = np.frombuffer(self._map, np.uint8, size)
        if self._node is not None:
            numa.bind(arena.ctypes.data, size, self._node)
        _advise(arena.ctypes.data, size, _MADV_DONTDUMP)  # KV bytes are chat text
        self._touch(arena)
        self.pages: Bytes = arena.reshape(-1, plan.warm_page_bytes)
        payload = self.pages[:, : plan.warm_payload_bytes]
        self.blocks: Bytes = payload.reshape(-1, *plan.warm_page_shape)
        self._base = arena.ctypes.data
        self._plane = plan.warm_page_blocks * plan.block_layer_bytes
        # Rows of the arena are whole lines, so that each may be a target; see `_stream`.
        self._copy = stream_copy() if plan.block_layer_bytes % STREAM_ALIGN == 0 else None
        if self._home is not None:
            self._home.keep(self._base, size)
            self._is_pinned[:] = True
            self._watching = threading.Thread(target=self._watch, name="tierkv-watch", daemon=True)
            self._watching.start()
        if self._registrar is not None:
            work = partial(self._register, self._registrar)
            self._registering = threading.Thread(target=work, name="tierkv-register", daemon=True)
            self._registering.start()

    def regions(self, pages: Numbers) -> Numbers:
        """The pinned region of each page, -1 where it is not pinned (yet): int64 (n,)."""
        region = pages // self._region_pages
        return np.where(self._is_pinned[region], region, -1)

    @property
    def pinned_pages(self) -> int:
        """Pages that are pinned by now."""
        pages = np.arange(max(1, self.page_count))
        return int(np.count_nonzero(self.regions(pages) >= 0))

    def recall_strayed(self) -> int:
        """Send back what a coherent device has drawn into its own memory; how much it was."""
        if self._home is None:
            return 0
        strayed = self._home.strayed_bytes(self._base, self.pages.nbytes)
        if strayed:
            logger.warning("host arena strayed into device memory bytes=%d", strayed)
            self.recalled_bytes += strayed
            self._home.recall(self._base, self.pages.nbytes)
        return strayed

    def wait_until_registered(self) -> None:
        """Until no more is going to be pinned."""
        if self._registering is not None:
            self._registering.join()

    def write(self, spans: Sequence[Span], data: Bytes) -> None:
        """Copy blocks in: `data` (layers, blocks, block_layer_bytes), any strides."""
        stream = self._stream(spans, data)
        if stream is not None:
            plan, base, source = self.plan, self._base, data.ctypes.data
            size, page_bytes = plan.block_layer_bytes, plan.warm_page_bytes
            plane, step = data.strides[:2]
            for index, page, offset, count in spans:
                target = base + page * page_bytes + offset * size
                stream(
                    target, source + index * step, plan.layers, count, size,
                    self._plane, size, plane, step,
                )  # fmt: skip
            return
        blocks, copy = self.blocks, np.copyto
        for index, page, offset, count in spans:
            copy(blocks[page, :, offset : offset + count], data[:, index : index + count])

    def read(self, spans: Sequence[Span], out: Bytes) -> None:
        """Copy blocks out into `out` (layers, blocks, block_layer_bytes), any strides."""
        stream = self._stream(spans, out)
        if stream is not None and not _is_line_aligned(out):
            stream = None
        if stream is not None:
            plan, base, target = self.plan, self._base, out.ctypes.data
            size, page_bytes = plan.block_layer_bytes, plan.warm_page_bytes
            plane, step = out.strides[:2]
            for index, page, offset, count in spans:
                source = base + page * page_bytes + offset * size
                stream(
                    target + index * step, source, plan.layers, count, size,
                    plane, step, self._plane, size,
                )  # fmt: skip
            return
        blocks, copy = self.blocks, np.copyto
        for index, page, offset, count in spans:
            copy(out[:, index : index + count], blocks[page, :, offset : offset + count])

    def _stream(self, spans: Sequence[Span], rows: Bytes) -> StreamCopy | None:
        """The streaming copy, where it is right: much data, whole rows, rows of whole lines."""
        if self._copy is None or not spans or rows.strides[2] != 1:
            return None
        first, last = spans[0], spans[-1]
        blocks = last.index + last.count - first.index
        return self._copy if blocks * self.plan.block_bytes >= _STREAM_BYTES_MIN else None

    def zero(self, page: int, offsets: Sequence[int]) -> None:
        """Clear places and the page's padding, before they reach a disk."""
        for offset in offsets:
            self.blocks[page, :, offset] = 0
        self.pages[page, self.plan.warm_payload_bytes :] = 0

    def clear(self, page: int, opening: int) -> None:
        """Zero a whole page, once for each of its openings; any thread.

        Several write into one page at a time, each into its own places. Each calls this first and
        nobody writes before it has returned, so nothing that was written is zeroed.
        """
        with self._clearing:
            if self._cleared.get(page) != opening:
                self.pages[page] = 0
                self._cleared[page] = opening

    def close(self) -> None:
        """Give the memory back. Views of it must be gone."""
        self._closing.set()
        self.wait_until_registered()
        if self._watching is not None:
            self._watching.join()
        for region in np.flatnonzero(self._is_pinned):
            self._is_pinned[region] = False
            if self._registrar is None:
                continue
            try:
                self._registrar.host_unregister(self._region(int(region))[0])
            except RuntimeError as error:
                logger.warning("unregister failed error=%s", error)
        self.__dict__.pop("blocks", None)
        self.__dict__.pop("pages", None)
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:  # a reader still holds a view: the kernel frees it with the last
                logger.warning("host arena closed while views of it are alive")
            self._map = None

    def _touch(self, arena: Bytes) -> None:
        """Fault every page in, in parallel; madvise by ctypes drops the GIL."""
        base, size = arena.ctypes.data, arena.nbytes
        advise = self._hugepages != "off"

        def touch(start: int) -> None:
            nonlocal advise
            count = min(_CHUNK_BYTES, size - start)
            if advise:
                _advise(base + start, count, _MADV_HUGEPAGE)
            begun = time.monotonic()
            if not _advise(base + start, count, _MADV_POPULATE_WRITE):
                arena[start : start + count : mmap.PAGESIZE] = 0
            if advise and self._hugepages == "auto" and time.monotonic() - begun > _SLOW_CHUNK_S:
                logger.warning("huge pages are slow to get, going on without them")
                advise = False

        with ThreadPoolExecutor(self._threads, "tierkv-touch") as pool:
            list(pool.map(touch, range(0, size, _CHUNK_BYTES)))

    def _watch(self) -> None:
        """Look where the arena lies, once a minute: the system counts its pages for that."""
        while not self._closing.wait(_LOOK_S):
            self.recall_strayed()

    def _register(self, registrar: Registrar) -> None:
        """Pin region after region; the first refusal ends it, the rest stays pageable."""

        def pin(region: int) -> None:
            if self._closing.is_set():
                return
            try:
                registrar.host_register(*self._region(region))
            except RuntimeError as error:
                self._closing.set()
                logger.warning("pinning ended early region=%d error=%s", region, error)
            else:
                self._is_pinned[region] = True

        with ThreadPoolExecutor(self._register_threads, "tierkv-register") as pool:
            list(pool.map(pin, range(len(self._is_pinned))))

    def _region(self, number: int) -> tuple[int, int]:
        """Address and bytes."""
        start = number * self._region_pages
        stop = min(start + self._region_pages, max(1, self.page_count))
        size = self.plan.warm_page_bytes
        return self._base + start * size, (stop - start) * size


def _is_line_aligned(out: Bytes) -> bool:
    """Whether every row of `out` may be written by lines; a read-only array may not."""
    plane, row = out.strides[:2]
    return out.flags.writeable and (out.ctypes.data | plane | row) % STREAM_ALIGN == 0


def _advise(address: int, size_bytes: int, advice: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), ctypes.c_int(advice)
    )
    return bool(result == 0)
