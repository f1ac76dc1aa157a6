"""Host tier: warm pages in one arena of our own.

The arena is one anonymous mapping: bound to a NUMA node, advised for huge pages, touched in
parallel so that no first write pays for page faults, and registered with CUDA in chunks of at
most 1 GiB where CUDA is there (one huge call can fail, vllm #51080). torch's own pinned allocator
is not used: it neither binds nor grows that way.

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
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import TierFailed
from tierkv.core.geometry import GIB, MIB, PagePlan
from tierkv.core.tier import Span
from tierkv.kernels.streaming import STREAM_ALIGN, StreamCopy, stream_copy
from tierkv.tiers import numa

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_MADV_HUGEPAGE: Final = 14
_MADV_DONTDUMP: Final = 16
_MADV_POPULATE_WRITE: Final = 23
_CHUNK_BYTES: Final = 64 * MIB
_SLOW_CHUNK_S: Final = 1.0
#: Smaller copies are absorbed by the last-level cache, and that is faster.
_STREAM_BYTES_MIN: Final = 8 * MIB
_REGISTER_BYTES: Final = GIB


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
        cuda: bool = False,
    ) -> None:
        self.plan = plan
        self.page_count = pages
        self._node = node
        self._hugepages = hugepages
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._cuda = cuda
        self._registered: list[int] = []
        self._map: mmap.mmap | None = None
        self._copy: StreamCopy | None = None

    def open(self) -> None:
        """Map, bind and touch the arena. Raises TierFailed if there is not enough memory."""
        plan, size = self.plan, max(1, self.page_count) * self.plan.warm_page_bytes
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise TierFailed(
                f"host tier: cannot map {size} bytes ({error}); lower tiers.host.capacity"
            ) from error
        arena = np.frombuffer(self._map, np.uint8)
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
        if self._cuda:
            self._register(arena)

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

    def close(self) -> None:
        """Give the memory back. Views of it must be gone."""
        for address in self._registered:
            _cudart().cudaHostUnregister(address)
        self._registered.clear()
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

    def _register(self, arena: Bytes) -> None:
        for start in range(0, arena.nbytes, _REGISTER_BYTES):
            address = arena.ctypes.data + start
            count = min(_REGISTER_BYTES, arena.nbytes - start)
            code = int(_cudart().cudaHostRegister(address, count, 3))  # portable | mapped
            if code:
                logger.warning("cudaHostRegister refused code=%d bytes=%d", code, count)
                return
            self._registered.append(address)


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


class _Cudart(Protocol):
    """The two calls of the CUDA runtime that are used here."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int: ...  # noqa: N802
    def cudaHostUnregister(self, address: int) -> int: ...  # noqa: N802


def _cudart() -> _Cudart:
    import torch

    runtime: _Cudart = torch.cuda.cudart()
    return runtime
