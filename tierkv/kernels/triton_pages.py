"""Gather, scatter and fused codes of hot pages in Triton, over a pool and an index vector.

Each kernel is a plain function, compiled at its first launch. With TRITON_INTERPRET=1 the same
text runs on the CPU; without it, it can be compiled ahead of time on any machine. A small,
persistent grid walks the work in chunks, so that the engine's own kernels keep the rest of the
device: a link needs only some 100 KB in flight to be full.

Codes are those of `tierkv.codecs.grouped`, a page being one row, bit for bit: the quotient is
rounded as IEEE says, and to whole numbers half to even.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import triton
import triton.language as tl

from tierkv.kernels.pages import CodedRows
from tierkv.kernels.relayout import PROGRAMS, VECTOR_BYTES

if TYPE_CHECKING:
    from torch import Tensor

#: Words of 4 bytes, and values, that a program moves at a time: 16 bytes for each of 256 threads.
CHUNK_WORDS: Final = 1024
CHUNK_VALUES: Final = 2048
WARPS: Final = 8


def copy_pages(
    pool,
    numbers,
    rows,
    count,
    PAGE_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """rows[i] = pool[numbers[i]], or the other way: int32 words."""
    chunks: tl.constexpr = (PAGE_WORDS + CHUNK - 1) // CHUNK
    for item in tl.range(tl.program_id(0), count * chunks, PROGRAMS):
        row = item // chunks
        at = (item % chunks) * CHUNK + tl.arange(0, CHUNK)
        inside = at < PAGE_WORDS
        page = tl.load(numbers + row).to(tl.int64) * PAGE_WORDS
        line = row.to(tl.int64) * PAGE_WORDS
        if GATHER:
            tl.store(rows + line + at, tl.load(pool + page + at, mask=inside), mask=inside)
        else:
            tl.store(pool + page + at, tl.load(rows + line + at, mask=inside), mask=inside)


def encode_pages(
    pool,
    numbers,
    codes,
    scales,
    places,
    count,
    layers,
    first_layer,
    layer_bytes,
    PAGE_VALUES: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Encode rows of a pool to their places in memory; `scales` is that memory as float32."""
    groups: tl.constexpr = CHUNK // GROUP
    chunks: tl.constexpr = (PAGE_VALUES + CHUNK - 1) // CHUNK
    code_bytes: tl.constexpr = PAGE_VALUES * BITS // 8
    top: tl.constexpr = (1 << (BITS - 1)) - 1
    for item in tl.range(tl.program_id(0), count * layers * chunks, PROGRAMS):
        row = item // chunks
        layer = first_layer + row // count
        block = row % count
        first = (item % chunks) * CHUNK
        at = first + tl.arange(0, CHUNK)
        page = (tl.load(numbers + block).to(tl.int64) + layer) * PAGE_VALUES
        values = tl.load(pool + page + at, mask=at < PAGE_VALUES, other=0.0).to(tl.float32)
        values = tl.reshape(values, (groups, GROUP))
        top_values = tl.full((groups,), top, tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(values), axis=1), top_values)
        scale = tl.maximum(scale, 1.1754943508222875e-38)
        # A group with a value that is not finite must not come back as if it were.
        wrong = tl.sum((values - values != 0.0).to(tl.int32), axis=1)
        scale = tl.where(wrong > 0, float("nan"), scale)
        quotient = tl.div_rn(values, tl.broadcast_to(scale[:, None], (groups, GROUP)))
        # To the nearest whole number, half to even, without a call: exact below 2**22.
        whole = (quotient + 12582912.0) - 12582912.0
        whole = tl.minimum(tl.maximum(whole, -top), top).to(tl.int32)
        line = tl.load(places + block).to(tl.int64) + layer.to(tl.int64) * layer_bytes
        line = tl.multiple_of(line, ALIGN)
        if BITS == 8:
            packed = tl.reshape(whole, (CHUNK,))
            place = first + tl.arange(0, CHUNK)
        else:
            low, high = tl.split(tl.reshape(whole + 8, (CHUNK // 2, 2)))
            packed = low | (high << 4)
            place = first // 2 + tl.arange(0, CHUNK // 2)
        tl.store(codes + line + place, packed.to(tl.uint8), mask=place < code_bytes)
        group = first // GROUP + tl.arange(0, groups)
        goal = (line + code_bytes) // 4 + group
        tl.store(scales + goal, scale, mask=group < PAGE_VALUES // GROUP)


def decode_pages(
    pool,
    numbers,
    codes,
    scales,
    places,
    count,
    layers,
    first_layer,
    layer_bytes,
    limit,
    PAGE_VALUES: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Decode rows from their places in memory; `limit` is the largest value of the pool's dtype."""
    groups: tl.constexpr = CHUNK // GROUP
    chunks: tl.constexpr = (PAGE_VALUES + CHUNK - 1) // CHUNK
    code_bytes: tl.constexpr = PAGE_VALUES * BITS // 8
    for item in tl.range(tl.program_id(0), count * layers * chunks, PROGRAMS):
        row = item // chunks
        layer = first_layer + row // count
        block = row % count
        first = (item % chunks) * CHUNK
        line = tl.load(places + block).to(tl.int64) + layer.to(tl.int64) * layer_bytes
        line = tl.multiple_of(line, ALIGN)
        if BITS == 8:
            place = first + tl.arange(0, CHUNK)
            packed = tl.load(codes + line + place, mask=place < code_bytes, other=0)
            whole = packed.to(tl.int8, bitcast=True).to(tl.int32)
        else:
            place = first // 2 + tl.arange(0, CHUNK // 2)
            packed = tl.load(codes + line + place, mask=place < code_bytes, other=0).to(tl.int32)
            whole = tl.reshape(tl.join(packed & 15, packed >> 4), (CHUNK,)) - 8
        group = first // GROUP + tl.arange(0, groups)
        origin = (line + code_bytes) // 4 + group
        scale = tl.load(scales + origin, mask=group < PAGE_VALUES // GROUP, other=0.0)
        values = tl.reshape(whole.to(tl.float32), (groups, GROUP)) * scale[:, None]
        values = tl.reshape(values, (CHUNK,))
        values = tl.maximum(values, -limit, propagate_nan=tl.PropagateNan.ALL)
        values = tl.minimum(values, limit, propagate_nan=tl.PropagateNan.ALL)
        page = (tl.load(numbers + block).to(tl.int64) + layer) * PAGE_VALUES
        at = first + tl.arange(0, CHUNK)
        if pool.dtype.element_ty == tl.bfloat16:
            # To nearest, half to even, in integers: the interpreter's own cast cuts off.
            bits = values.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            narrow = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            narrow = values.to(pool.dtype.element_ty)
        tl.store(pool + page + at, narrow, mask=at < PAGE_VALUES)


@cache
def _compiled(kernel: Callable[..., None]) -> Any:
    return triton.jit(kernel)


def launch_copy(
    pool: Tensor,
    numbers: Tensor,
    rows: Tensor,
    *,
    gather: bool,
    programs: int = PROGRAMS,
) -> None:
    """`copy_pages` over uint8 (pages, page_bytes) and (n, page_bytes), a multiple of 4 bytes."""
    import torch

    words = pool.shape[1] // 4
    _compiled(copy_pages)[(programs,)](
        pool.view(torch.int32), numbers, rows.view(torch.int32), len(numbers),
        PAGE_WORDS=words, CHUNK=CHUNK_WORDS, PROGRAMS=programs, GATHER=gather,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def launch_encode(blocks: CodedRows, *, group: int, bits: int, programs: int = PROGRAMS) -> None:
    """`encode_pages`: codes of rows to their places, which are multiples of 4 bytes."""
    _launch_codes(encode_pages, (), blocks, group, bits, programs)


def launch_decode(blocks: CodedRows, *, group: int, bits: int, programs: int = PROGRAMS) -> None:
    """`decode_pages`: the inverse."""
    import torch

    limit = torch.finfo(blocks.rows.dtype).max
    _launch_codes(decode_pages, (limit,), blocks, group, bits, programs)


def _launch_codes(
    kernel: Callable[..., None],
    more: tuple[float, ...],
    blocks: CodedRows,
    group: int,
    bits: int,
    programs: int,
) -> None:
    import torch

    values = blocks.rows.shape[1]
    width = values * bits // 8 + values // group * 4
    # Codes of such rows lie one after the other, so their places are as even as their length.
    wide = (width | blocks.layer_bytes | blocks.memory.data_ptr()) % VECTOR_BYTES == 0
    _compiled(kernel)[(programs,)](
        blocks.rows, blocks.numbers, blocks.memory, blocks.memory.view(torch.float32),
        blocks.places, len(blocks.numbers), len(blocks.layers), blocks.layers.start,
        blocks.layer_bytes, *more,
        PAGE_VALUES=values, GROUP=group, BITS=bits, ALIGN=VECTOR_BYTES if wide else 4,
        CHUNK=CHUNK_VALUES, PROGRAMS=programs, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
