"""Spreading: the kernel work between pages, as they cross the link, and blocks on the device.

Plain blocks are moved as they are, also into an engine's own paged cache. Coded blocks are decoded
while they are spread and encoded while they are gathered, in the same pass, so that the link and
host memory carry the small form and only the device sees the large one.

Both sides of a block are told by offsets: in the pages' memory, and on the device. Layers follow
from them by fixed steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.codecs.base import PageCodec
from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import ALIGN_BYTES, PagePlan, align_up
from tierkv.kernels.relayout import Arrangement, BlockShape, PagePool, Pool
from tierkv.transfer.streams import Coded, Index, Queue, Streams

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

Numbers = npt.NDArray[np.int64]


class BlockPool(Protocol):
    """Where blocks lie on the device: the slab of hot pages, or an engine's own paged cache."""

    shape: BlockShape
    pool: Pool

    def offsets(self, blocks: Numbers) -> Numbers:
        """Where these blocks begin in every layer: int64 (n,)."""
        ...


class Area(Protocol):
    """Memory in which pages lie, one after the other."""

    def up(self, index: Index, blocks: slice, layer: int | None = None) -> None:
        """Spread blocks of an index, sources in this memory, over the device; on RELAYOUT.

        With a `layer` only that one, from memory that holds nothing else.
        """
        ...

    def down(self, index: Index, blocks: slice) -> None:
        """Gather blocks of an index, targets in this memory, from the device; on RELAYOUT."""
        ...


class Spread(Protocol):
    """One form of blocks in pages, and where those blocks lie on the device."""

    plan: PagePlan  # of the pages
    device: device  # where the blocks are, and the slots
    device_end: int  # the largest offset of a block there

    def offsets(self, frames: Numbers) -> Numbers:
        """Where blocks begin on the device, as the kernel counts: int64 (n,)."""
        ...

    def area(self, memory: Tensor, *, is_layer: bool = False) -> Area:
        """Pages in some memory, flat uint8; `is_layer`: of one layer each."""
        ...


class PlainSpread:
    """Blocks as they are. K and V may lie in tensors of their own, as layers of one plane."""

    def __init__(self, streams: Streams, plan: PagePlan, frames: BlockPool) -> None:
        self.plan = plan
        self._streams = streams
        self._frames = frames
        self._apart = len(frames.pool.layers) // plan.layers
        width = Arrangement.canonical(frames.shape).block * self._apart
        if width != plan.block_layer_bytes:
            raise GeometryMismatch(
                f"blocks of {width} bytes a layer for pages of {plan.block_layer_bytes}"
            )
        self._layers = [
            frames.pool.part(layer * self._apart, (layer + 1) * self._apart)
            for layer in range(plan.layers)
        ]
        self.device = frames.pool.layers[0].device
        self.device_end = _last_offset(frames)

    def offsets(self, frames: Numbers) -> Numbers:
        """Bytes in every layer."""
        return self._frames.offsets(frames)

    def area(self, memory: Tensor, *, is_layer: bool = False) -> Area:
        """See `Spread`."""
        pages = PagePool(
            memory,
            self._frames.shape,
            layers=1 if is_layer else self.plan.layers,
            page_blocks=self.plan.warm_page_blocks,
            page_bytes=self.plan.warm_page_bytes,
            apart=self._apart == 2,
        )
        return _PlainArea(self._streams, self._frames, self._layers, pages.pool)


class _PlainArea:
    def __init__(
        self, streams: Streams, frames: BlockPool, layers: list[Pool], pages: Pool
    ) -> None:
        self._streams = streams
        self._frames = frames
        self._layers = layers
        self._pages = pages

    def up(self, index: Index, blocks: slice, layer: int | None = None) -> None:
        goal = self._frames.pool if layer is None else self._layers[layer]
        shape = self._frames.shape
        self._streams.move(Queue.RELAYOUT, shape, self._pages, goal, index, blocks)

    def down(self, index: Index, blocks: slice) -> None:
        shape, frames = self._frames.shape, self._frames.pool
        self._streams.move(Queue.RELAYOUT, shape, frames, self._pages, index, blocks)


class CodedSpread:
    """Blocks that a codec encodes on their way down; a row is one layer of one block.

    `slab`: uint8, the frames of `plan` one after the other, their values of `dtype`. The pages'
    own plan, `self.plan`, is for the coded form: about as many bytes a page, so more blocks.
    """

    def __init__(
        self, streams: Streams, plan: PagePlan, slab: Tensor, codec: PageCodec, dtype: dtype
    ) -> None:
        self._streams = streams
        self._layers = plan.layers
        self._rows = slab.view(-1).view(dtype).view(-1, plan.block_layer_bytes // dtype.itemsize)
        self._codec = codec
        self.plan = coded_plan(plan, codec, dtype)
        self.device = slab.device
        self.device_end = len(self._rows) - plan.layers

    def offsets(self, frames: Numbers) -> Numbers:
        """Rows of the slab."""
        return np.asarray(frames * self._layers, np.int64)

    def area(self, memory: Tensor, *, is_layer: bool = False) -> Area:
        """See `Spread`."""
        step = 0 if is_layer else self.plan.warm_page_blocks * self.plan.block_layer_bytes
        coded = Coded(self._codec, self._rows, memory, step)
        return _CodedArea(self._streams, coded, range(self._layers))


class _CodedArea:
    def __init__(self, streams: Streams, coded: Coded, layers: range) -> None:
        self._streams = streams
        self._coded = coded
        self._layers = layers

    def up(self, index: Index, blocks: slice, layer: int | None = None) -> None:
        layers = self._layers if layer is None else range(layer, layer + 1)
        self._streams.decode(Queue.RELAYOUT, self._coded, layers, index, blocks)

    def down(self, index: Index, blocks: slice) -> None:
        self._streams.encode(Queue.RELAYOUT, self._coded, self._layers, index, blocks)


def coded_plan(plan: PagePlan, codec: PageCodec, dtype: dtype) -> PagePlan:
    """Pages of about the same size for blocks in their coded form."""
    width = codec.encoded_bytes(plan.block_layer_bytes // dtype.itemsize, dtype)
    blocks = max(1, plan.warm_page_bytes // (plan.layers * width))
    size = align_up(plan.layers * blocks * width, ALIGN_BYTES)
    return replace(
        plan,
        block_layer_bytes=width,
        warm_page_blocks=blocks,
        warm_page_bytes=size,
        cold_page_warm_pages=max(1, plan.cold_page_bytes // size),
    )


def _last_offset(frames: BlockPool) -> int:
    """The largest offset at which a block still lies within every layer."""
    shape, at = frames.shape, frames.pool.arrangement
    loops = ((shape.planes, at.plane), (shape.tokens, at.token), (shape.heads, at.head))
    reach = sum((count - 1) * step for count, step in loops) + shape.head_bytes
    return min(layer.numel() for layer in frames.pool.layers) - reach
