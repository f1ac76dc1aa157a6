"""Relayout: blocks of K and V from one arrangement of memory to another, in one call.

An `Arrangement` says, in bytes, where the parts of a block lie in one layer's memory. Engines keep
their paged cache as one tensor a layer (or one for K and one for V); pages of ours are layer-major
slices of a slab or an arena. Both are: the address of each layer, the offset of each block, and
three strides. So gather, scatter and repacking between page sizes, head order and K/V placement are
one move with other numbers; `PagePool` has the numbers of our own pages.

`move_by_reference` is the torch reference, `csrc/move.cu` the kernel. `plan_move` gives what it
needs: loops with everything that is contiguous on both sides folded into one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import DTYPE_BYTES, Form, KVGeometry

if TYPE_CHECKING:
    from torch import Tensor, device

Numbers = npt.NDArray[np.int64]

#: What one thread moves at a time; addresses, offsets, strides and rows are multiples of it.
VECTOR_BYTES: Final = 16
_WARP: Final = 32
#: Where in `launch_values` the offsets' addresses and the number of blocks go.
AT_SOURCE, AT_TARGET, AT_COUNT = 2, 3, 5
#: Threads of a program.
THREADS: Final = 512
#: Programs of one launch: enough to fill a link, a tenth of an H100 (vLLM #42212 chose 12).
PROGRAMS: Final = 16


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What a block of one layer consists of, in one rank."""

    planes: int
    tokens: int
    heads: int
    head_bytes: int

    @classmethod
    def of(cls, geometry: KVGeometry, block_tokens: int) -> Self:
        """GeometryMismatch where V is narrower than K: then each plane is moved by itself.

        So are K and V where an engine keeps them in two tensors: as layers of one plane.
        """
        planes = geometry.plane_dims
        if len(set(planes)) > 1:
            raise GeometryMismatch("K and V of different widths: move each plane by itself")
        heads = 1 if geometry.form is Form.LATENT else geometry.heads
        head_bytes = planes[0] // heads * DTYPE_BYTES[geometry.dtype]
        return cls(len(planes), block_tokens, heads, head_bytes)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Strides in bytes within one layer: from block to block, K to V, token to token, head to head.

    The values of one head of one token are contiguous.
    """

    block: int
    plane: int
    token: int
    head: int

    @classmethod
    def canonical(cls, shape: BlockShape) -> Self:
        """Ours: (blocks, planes, tokens, heads, dim)."""
        token = shape.heads * shape.head_bytes
        plane = shape.tokens * token
        return cls(shape.planes * plane, plane, token, shape.head_bytes)

    @classmethod
    def paged(
        cls,
        shape: BlockShape,
        *,
        blocks: int,
        heads_first: bool = False,
        planes_first: bool = True,
    ) -> Self:
        """An engine's: (planes, blocks, tokens, heads, dim), NHD, in a tensor of `blocks` blocks.

        `heads_first` is HND: (.., heads, tokens, dim). Without `planes_first` K and V of a block
        lie together: (blocks, planes, ..). A latent cache has one plane and one head.
        """
        token, head = shape.heads * shape.head_bytes, shape.head_bytes
        if heads_first:
            token, head = shape.head_bytes, shape.tokens * shape.head_bytes
        plane = shape.tokens * shape.heads * shape.head_bytes
        if planes_first:
            return cls(plane, blocks * plane, token, head)
        return cls(shape.planes * plane, plane, token, head)

    def offsets(self, numbers: Tensor) -> Tensor:
        """Where blocks of these numbers begin: int64 (n,)."""
        return numbers * self.block


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Memory in which blocks lie: flat uint8 of each layer, all in one arrangement."""

    layers: tuple[Tensor, ...]
    arrangement: Arrangement
    _tables: dict[device, Tensor] = field(default_factory=dict, repr=False)

    def part(self, start: int, stop: int) -> Pool:
        """Some of its layers."""
        return Pool(self.layers[start:stop], self.arrangement)

    @property
    def is_aligned(self) -> bool:
        """Whether every block of every layer begins on a whole vector."""
        starts = (layer.data_ptr() for layer in self.layers)
        return not any(start % VECTOR_BYTES for start in (self.arrangement.block, *starts))

    def table(self, on: device) -> Tensor:
        """The layers' addresses, int64 on a device; made once."""
        import torch

        if on not in self._tables:
            addresses = [layer.data_ptr() for layer in self.layers]
            self._tables[on] = torch.tensor(addresses, dtype=torch.int64, device=on)
        return self._tables[on]


class Side(NamedTuple):
    """One side of a move: a pool, and where each block begins in every layer, int64 (n,).

    Offset -1 is no block: nothing is moved where either side says so.
    """

    pool: Pool
    offsets: Tensor


class Loop(NamedTuple):
    """A loop around a row: how often, and the steps in bytes."""

    times: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class MovePlan:
    """What the kernel is told: loops outermost first, and the bytes of a row."""

    loops: tuple[Loop, Loop, Loop]
    row_bytes: int

    @property
    def loop_table(self) -> tuple[int, ...]:
        """The loops as the kernel reads them: times, then source steps, then target steps."""
        return tuple(loop[part] for part in range(3) for loop in self.loops)

    @property
    def vectors(self) -> int:
        """Vectors of a row."""
        return self.row_bytes // VECTOR_BYTES

    @property
    def lanes(self) -> int:
        """Threads that move a row: enough for its vectors, and no more than a warp."""
        return min(_WARP, 1 << (self.vectors - 1).bit_length())

    @property
    def is_aligned(self) -> bool:
        """Whether the kernel can do it; addresses and block offsets must be multiples too."""
        steps = [step for loop in self.loops if loop.times > 1 for step in loop[1:]]
        return not any(value % VECTOR_BYTES for value in (self.row_bytes, *steps))


@lru_cache(maxsize=256)
def plan_move(shape: BlockShape, source: Arrangement, target: Arrangement) -> MovePlan:
    """Fold the loops over planes, tokens and heads as far as both sides are contiguous.

    Loops whose steps nest become one; so NHD to NHD is one row a plane, and HND to NHD a row a
    head and token.
    """
    loops = [
        Loop(shape.planes, source.plane, target.plane),
        Loop(shape.tokens, source.token, target.token),
        Loop(shape.heads, source.head, target.head),
    ]
    loops = sorted((loop for loop in loops if loop.times > 1), key=lambda loop: -loop.target)
    row_bytes = shape.head_bytes
    while loops and loops[-1].source == loops[-1].target == row_bytes:
        row_bytes *= loops.pop().times
    folded: list[Loop] = []
    for loop in loops:
        above = folded[-1] if folded else None
        if above and above[1:] == (loop.times * loop.source, loop.times * loop.target):
            folded[-1] = Loop(above.times * loop.times, loop.source, loop.target)
        else:
            folded.append(loop)
    first, second, third = [Loop(1, 0, 0)] * (3 - len(folded)) + folded
    return MovePlan((first, second, third), row_bytes)


def move_blocks(shape: BlockShape, source: Side, target: Side, *, programs: int = PROGRAMS) -> None:
    """Block i of the target becomes block i of the source, in every layer, on the current stream.

    Blocks of the target must not overlap each other or the source. One side may be host memory
    that CUDA has mapped, if the other is on the device; `programs` bounds how much of the device
    the kernel may take. Raises GeometryMismatch for a block that leaves its layer.
    """
    require_inside(shape, source)
    require_inside(shape, target)
    on = _device_of(source.pool, target.pool)
    if on.type == "cuda" and has_kernel(shape, source.pool, target.pool):
        _launch(shape, source, target, on, programs)
    else:
        move_by_reference(shape, source, target)


def move_by_reference(shape: BlockShape, source: Side, target: Side) -> None:
    """What `move_blocks` does, as torch says it; any device, any alignment."""
    require_inside(shape, source)
    require_inside(shape, target)
    offsets = list(zip(source.offsets.tolist(), target.offsets.tolist(), strict=True))
    for from_layer, to_layer in zip(source.pool.layers, target.pool.layers, strict=True):
        for from_offset, to_offset in offsets:
            if from_offset >= 0 and to_offset >= 0:
                read = _view(from_layer, from_offset, shape, source.pool.arrangement)
                _view(to_layer, to_offset, shape, target.pool.arrangement).copy_(read)


class PagePool:
    """Our own pages of one size, one after the other in flat uint8 memory, each layer-major.

    A page is (layers, page_blocks, block bytes of a layer) and then padding. Block b lies in page
    ``b // page_blocks``; hot pages of a frame are a page of one block. `apart` gives K and V as
    layers of their own, as engines have them that keep two tensors a layer; `shape` is then one of
    a single plane.
    """

    def __init__(
        self,
        memory: Tensor,
        shape: BlockShape,
        *,
        layers: int,
        page_blocks: int,
        page_bytes: int,
        apart: bool = False,
    ) -> None:
        parts = 2 if apart else 1
        part_bytes = Arrangement.canonical(shape).block
        block_bytes = part_bytes * parts
        at = replace(Arrangement.canonical(shape), block=block_bytes)
        starts = [
            layer * page_blocks * block_bytes + part * part_bytes
            for layer in range(layers)
            for part in range(parts)
        ]
        self.shape = shape
        self.page_blocks = page_blocks
        self.page_bytes = page_bytes
        self.block_bytes = block_bytes
        self.pool = Pool(tuple(memory[start:] for start in starts), at)

    def offsets(self, blocks: Numbers) -> Numbers:
        """Where these blocks begin in every layer: int64 (n,)."""
        if self.page_blocks == 1:
            return np.asarray(blocks * self.page_bytes, np.int64)
        pages, within = np.divmod(blocks, self.page_blocks)
        return np.asarray(pages * self.page_bytes + within * self.block_bytes, np.int64)

    def side(self, blocks: Numbers) -> Side:
        """These blocks, as one side of a move."""
        import torch

        return Side(self.pool, torch.from_numpy(self.offsets(blocks)))


def repack(
    source: PagePool, blocks: Numbers, target: PagePool, places: Numbers, programs: int = PROGRAMS
) -> None:
    """Blocks of one page size to places in pages of another, in one kernel; see `move_blocks`."""
    move_blocks(source.shape, source.side(blocks), target.side(places), programs=programs)


class FixedMove:
    """Moves of at most `blocks` blocks whose launch is always the same: for a CUDA graph.

    `launch` allocates nothing, waits for nothing and reads the same addresses every time, so it can
    be captured; `choose` says, outside of the graph, which blocks the next replay moves.
    """

    def __init__(
        self,
        shape: BlockShape,
        source: Pool,
        target: Pool,
        *,
        blocks: int,
        programs: int = PROGRAMS,
    ) -> None:
        import torch

        on = _device_of(source, target)
        offsets = torch.full((2, blocks), -1, dtype=torch.int64, device=on)
        self._shape = shape
        self._programs = programs
        self._offsets = offsets
        self._sides = Side(source, offsets[0]), Side(target, offsets[1])
        self.launch()  # compiles, and puts the tables on the device, before any capture

    def choose(self, source_offsets: Tensor, target_offsets: Tensor) -> None:
        """The blocks to move: int64 (n,) on the host, n <= blocks. On the current stream.

        Raises GeometryMismatch for a block that leaves its layer, ValueError for too many.
        """
        count, room = len(source_offsets), self._offsets.shape[1]
        if count > room:
            raise ValueError(f"{count} blocks for a fixed move of at most {room}")
        for side, offsets in zip(self._sides, (source_offsets, target_offsets), strict=True):
            require_inside(self._shape, side._replace(offsets=offsets))
        self._offsets[:, count:].fill_(-1)
        for row, offsets in zip(self._offsets, (source_offsets, target_offsets), strict=True):
            row[:count].copy_(offsets)

    def launch(self) -> None:
        """Move them, on the current stream."""
        move_blocks(self._shape, *self._sides, programs=self._programs)


def _device_of(source: Pool, target: Pool) -> device:
    """Where a move runs: on a device if one side is there, as the other may be mapped."""
    on = target.layers[0].device
    return on if on.type == "cuda" else source.layers[0].device


def has_kernel(shape: BlockShape, source: Pool, target: Pool) -> bool:
    """Whether the kernel can carry a move out on a CUDA device, or the reference has to."""
    if find_spec("cupy") is None or not (source.is_aligned and target.is_aligned):
        return False
    return plan_move(shape, source.arrangement, target.arrangement).is_aligned


def _launch(shape: BlockShape, source: Side, target: Side, on: device, programs: int) -> None:
    import cupy
    import torch

    stream = torch.cuda.current_stream(on)
    source, target = (side._replace(offsets=_to(side.offsets, on)) for side in (source, target))
    values = launch_values(shape, source.pool, target.pool, on)
    values[AT_SOURCE], values[AT_TARGET] = source.offsets.data_ptr(), target.offsets.data_ptr()
    values[AT_COUNT] = len(source.offsets)
    with cupy.cuda.Device(on.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        _kernel()((programs,), (THREADS,), tuple(values))
    for side in (source, target):  # torch may reuse their memory only after the kernel has read it
        side.offsets.record_stream(stream)


def launch_values(shape: BlockShape, source: Pool, target: Pool, on: device) -> list[int]:
    """What the kernel is launched with, but for `AT_SOURCE`, `AT_TARGET` and `AT_COUNT`.

    Those are the addresses of the offsets, int64 on the device, and how many blocks there are.
    """
    plan = plan_move(shape, source.arrangement, target.arrangement)
    tables = (pool.table(on).data_ptr() for pool in (source, target))
    loops = _loops(plan.loop_table, on).data_ptr()
    return [*tables, 0, 0, len(source.layers), 0, loops, plan.vectors, plan.lanes]


@cache
def kernel_function(on: device) -> int:
    """The driver's handle of the kernel in the device's context, for `Driver.launch`."""
    import cupy

    with cupy.cuda.Device(on.index):
        return int(_kernel().kernel.ptr)


@lru_cache(maxsize=256)
def _loops(numbers: tuple[int, ...], on: device) -> Tensor:
    """A plan's loops on the device; the same few are used for every move."""
    import torch

    return torch.tensor(numbers, dtype=torch.int64, device=on)


def _to(offsets: Tensor, on: device) -> Tensor:
    return offsets if offsets.is_cuda else offsets.pin_memory().to(on, non_blocking=True)


@cache
def _kernel() -> Any:  # noqa: ANN401 CuPy's
    import cupy

    module = cupy.RawModule(code=kernel_source(), options=("-std=c++17",))
    return module.get_function("move_blocks")


def require_inside(shape: BlockShape, side: Side) -> None:
    """GeometryMismatch if a block leaves a layer; offsets on a device are the caller's to check."""
    if side.offsets.is_cuda or not len(side.offsets):
        return
    counts = (shape.planes, shape.tokens, shape.heads)
    at = side.pool.arrangement
    steps = (at.plane, at.token, at.head)
    reach = [(count - 1) * step for count, step in zip(counts, steps, strict=True)]
    least, most = int(side.offsets.min()), int(side.offsets.max())
    low = least + sum(part for part in reach if part < 0)
    high = most + sum(part for part in reach if part > 0) + shape.head_bytes
    size = min(layer.numel() for layer in side.pool.layers)
    if least < -1 or (low < 0 <= least) or (most >= 0 and high > size):
        raise GeometryMismatch(f"blocks at bytes {low} to {high} leave a layer of {size} bytes")


def _view(layer: Tensor, offset: int, shape: BlockShape, at: Arrangement) -> Tensor:
    counts = (shape.planes, shape.tokens, shape.heads, shape.head_bytes)
    start = layer.storage_offset() + offset
    return layer.as_strided(counts, (at.plane, at.token, at.head, 1), start)


def kernel_source() -> str:
    """The text of `csrc/move.cu`: for nvcc, NVRTC or, as plain C++, g++."""
    return files("tierkv.kernels").joinpath("csrc/move.cu").read_text(encoding="utf-8")
