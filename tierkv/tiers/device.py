"""Device tier: hot pages in one slab, CUDA memory where there is a GPU, host memory otherwise.

A block takes `hot_pages_per_block` hot pages. They are allocated together: frame `f` is hot pages
``f * hot_pages_per_block ..``, so the planner counts frames (one block each) and the kernels get
page numbers. Blocks come and go as ``(layers, blocks, block_layer_bytes)`` bytes; a block's hot
pages are slices of its canonical bytes, in order. Any thread, on disjoint frames.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import TierFailed
from tierkv.core.geometry import PagePlan
from tierkv.core.tier import Span
from tierkv.kernels.relayout import PROGRAMS, BlockShape, PagePool
from tierkv.tiers.slab import SlabHandle, allocate_slab, export_slab

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda import Event

Bytes = npt.NDArray[np.uint8]


class DeviceTier:
    """The slab of hot pages."""

    def __init__(
        self, plan: PagePlan, *, frames: int, device: str = "auto", programs: int = PROGRAMS
    ) -> None:
        self.plan = plan
        self.frames = frames
        self._wanted = device
        self._programs = programs
        # CUDA: the last use of the slab on each stream, and whose turn it is to add to them.
        self._marks: dict[int, Event] = {}
        self._turn = threading.Lock()

    def open(self) -> None:
        """Allocate the slab. Raises TierFailed where the device is absent or too small."""
        try:
            import torch
        except ImportError as error:
            raise TierFailed(
                "device tier: needs torch; install tierkv-offload[demo] or [gpu], "
                "or set tiers.device.capacity to 0"
            ) from error
        wanted = self._wanted
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        plan = self.plan
        pages = max(1, self.frames) * plan.hot_pages_per_block
        try:
            self.device = torch.device(wanted)
            if wanted == "cuda":
                self.device = torch.device("cuda", torch.cuda.current_device())
            self.pool = allocate_slab(pages, plan.hot_page_bytes, self.device)
        except (RuntimeError, AssertionError) as error:
            raise TierFailed(
                f"device tier: cannot take {pages * plan.hot_page_bytes} bytes of {wanted} "
                f"({error}); lower tiers.device.capacity or change tiers.device.device"
            ) from error
        # A frame is a page of one block; all layers of a block are rows of one layer's bytes.
        self.blocks = PagePool(
            self.pool.view(-1),
            BlockShape(1, 1, 1, plan.block_layer_bytes),
            layers=plan.layers,
            page_blocks=1,
            page_bytes=plan.block_bytes,
        )

    def share(self) -> SlabHandle:
        """What another process needs to map the slab; TierFailed where it cannot be shared."""
        return export_slab(self.pool)

    def write(self, spans: Sequence[Span], data: Bytes | Tensor) -> None:
        """Scatter blocks in: `data` uint8 (layers, blocks, block_layer_bytes), any strides."""
        import torch

        from tierkv.kernels.pages import scatter_pages

        frames, indices = _split(spans)
        if isinstance(data, np.ndarray):
            # A tensor has no negative strides and is never read-only.
            plain = data.flags.writeable and min(data.strides) >= 0
            data = torch.from_numpy(data if plain else data.copy())
        low, high = indices[0], indices[-1] + 1
        is_run = high - low == len(indices)
        chosen = (data[:, low:high] if is_run else data[:, indices]).permute(1, 0, 2)
        chosen = chosen.to(self.device)
        rows = chosen.reshape(-1, self.plan.hot_page_bytes)
        with self._in_order():
            scatter_pages(self.pool, self._numbers(frames), rows, programs=self._programs)

    def read(self, spans: Sequence[Span], out: Bytes | Tensor) -> None:
        """Gather blocks out into `out` uint8 (layers, blocks, block_layer_bytes), any strides."""
        import torch

        from tierkv.kernels.pages import gather_pages

        frames, indices = _split(spans)
        if isinstance(out, np.ndarray) and min(out.strides) < 0:  # no tensor is like that
            plain = np.empty(out.shape, np.uint8)
            self.read(spans, plain)
            out[:, indices] = plain[:, indices]
            return
        numbers = self._numbers(frames)
        shape = (len(numbers), self.plan.hot_page_bytes)
        rows = torch.empty(shape, dtype=torch.uint8, device=self.device)
        with self._in_order():
            gather_pages(self.pool, numbers, rows, programs=self._programs)
        blocks = rows.reshape(len(frames), self.plan.layers, self.plan.block_layer_bytes)
        target = torch.from_numpy(out) if isinstance(out, np.ndarray) else out
        low, high = indices[0], indices[-1] + 1
        if high - low == len(indices):
            target[:, low:high].copy_(blocks.permute(1, 0, 2))
        else:
            target[:, indices] = blocks.permute(1, 0, 2).to(target.device)

    def marks(self) -> list[Event]:
        """CUDA events of the last use on each stream; what touches the slab next waits for them."""
        with self._turn:
            return list(self._marks.values())

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Queue after what other streams did to the slab, and have others queue after this.

        Blocks are published when their write is queued, and callers have streams of their own.
        """
        if not self.pool.is_cuda:
            yield
            return
        import torch

        with self._turn:
            stream = torch.cuda.current_stream(self.device)
            for event in self._marks.values():
                stream.wait_event(event)
            try:
                yield
            finally:
                self._marks[stream.cuda_stream] = stream.record_event()

    def close(self) -> None:
        """Free the slab."""
        self.__dict__.pop("blocks", None)
        self.__dict__.pop("pool", None)

    def _numbers(self, frames: list[int]) -> Tensor:
        import torch

        each = self.plan.hot_pages_per_block
        first = torch.tensor(frames, dtype=torch.int64)[:, None] * each
        return (first + torch.arange(each)).reshape(-1).to(self.device)


def _split(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Frames (one block a page), and the positions in the data that belong to them."""
    frames: list[int] = []
    indices: list[int] = []
    for index, page, _, count in spans:
        frames.extend(range(page, page + count))
        indices.extend(range(index, index + count))
    return frames, indices
