"""Relayout: blocks of K and V from one arrangement of memory to another, in one call.

An `Arrangement` says, in bytes, where the parts of a block lie in one layer's memory. Engines keep
their paged cache as one tensor a layer (or one for K and one for V); pages of ours are layer-major
slices of a slab or an arena. Both are: the address of each layer, the offset of each block, and
three strides. So gather, scatter and repacking between page sizes, head order and K/V placement are
one move with other numbers.

`move_by_reference` is the torch reference, `csrc/move.cu` the kernel. `plan_move` gives what it
needs: loops with everything that is contiguous on both sides folded into one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import DTYPE_BYTES, Form, KVGeometry

if TYPE_CHECKING:
    from torch import Tensor, device

#: What one thread moves at a time; addresses, offsets, strides and rows are multiples of it.
VECTOR_BYTES: Final = 16
_WARP: Final = 32
_THREADS: Final = 512
#: Programs of one launch: a small part of the device fills a link.
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


class Side(NamedTuple):
    """One side of a move: uint8 memory of each layer, flat; block offsets; how blocks lie."""

    layers: Sequence[Tensor]
    offsets: Tensor
    arrangement: Arrangement


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
    _require_inside(shape, source)
    _require_inside(shape, target)
    plan = plan_move(shape, source.arrangement, target.arrangement)
    on_device = any(layer.is_cuda for layer in (*source.layers, *target.layers))
    if on_device and plan.is_aligned and find_spec("cupy") is not None:
        _launch(plan, source, target, programs)
    else:
        move_by_reference(shape, source, target)


def move_by_reference(shape: BlockShape, source: Side, target: Side) -> None:
    """What `move_blocks` does, as torch says it; any device, any alignment."""
    _require_inside(shape, source)
    _require_inside(shape, target)
    for from_layer, to_layer in zip(source.layers, target.layers, strict=True):
        pairs = zip(source.offsets.tolist(), target.offsets.tolist(), strict=True)
        for from_offset, to_offset in pairs:
            read = _view(from_layer, from_offset, shape, source.arrangement)
            _view(to_layer, to_offset, shape, target.arrangement).copy_(read)


def _launch(plan: MovePlan, source: Side, target: Side, programs: int) -> None:
    import cupy
    import torch

    on = next(layer.device for layer in (*source.layers, *target.layers) if layer.is_cuda)
    stream = torch.cuda.current_stream(on)
    tables = (
        _table(tuple(layer.data_ptr() for layer in source.layers), on),
        _table(tuple(layer.data_ptr() for layer in target.layers), on),
        _to(source.offsets, on),
        _to(target.offsets, on),
        _table(plan.loop_table, on),
    )
    pointers = [table.data_ptr() for table in tables]
    layers, blocks = len(source.layers), len(source.offsets)
    with cupy.cuda.Device(on.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        arguments = (*pointers[:4], layers, blocks, pointers[4], plan.vectors, plan.lanes)
        _kernel()((programs,), (_THREADS,), arguments)
    for table in tables:  # torch may reuse their memory only after the kernel has read it
        table.record_stream(stream)


@lru_cache(maxsize=256)
def _table(numbers: tuple[int, ...], on: device) -> Tensor:
    """Numbers of a layout on the device; the same few are used for every move."""
    import torch

    return torch.tensor(numbers, dtype=torch.int64, device=on)


def _to(offsets: Tensor, on: device) -> Tensor:
    return offsets if offsets.is_cuda else offsets.pin_memory().to(on, non_blocking=True)


@cache
def _kernel() -> Callable[..., None]:
    import cupy

    module = cupy.RawModule(code=kernel_source(), options=("-std=c++17",))
    kernel: Callable[..., None] = module.get_function("move_blocks")
    return kernel


def _require_inside(shape: BlockShape, side: Side) -> None:
    """GeometryMismatch if a block leaves a layer; offsets on a device are the caller's to check."""
    if side.offsets.is_cuda or not len(side.offsets):
        return
    counts = (shape.planes, shape.tokens, shape.heads)
    steps = (side.arrangement.plane, side.arrangement.token, side.arrangement.head)
    reach = [(count - 1) * step for count, step in zip(counts, steps, strict=True)]
    low = int(side.offsets.min()) + sum(part for part in reach if part < 0)
    high = int(side.offsets.max()) + sum(part for part in reach if part > 0) + shape.head_bytes
    size = min(layer.numel() for layer in side.layers)
    if low < 0 or high > size:
        raise GeometryMismatch(f"blocks at bytes {low} to {high} leave a layer of {size} bytes")


def _view(layer: Tensor, offset: int, shape: BlockShape, at: Arrangement) -> Tensor:
    counts = (shape.planes, shape.tokens, shape.heads, shape.head_bytes)
    start = layer.storage_offset() + offset
    return layer.as_strided(counts, (at.plane, at.token, at.head, 1), start)


def kernel_source() -> str:
    """The text of `csrc/move.cu`: for nvcc, NVRTC or, as plain C++, g++."""
    return files("tierkv.kernels").joinpath("csrc/move.cu").read_text(encoding="utf-8")
