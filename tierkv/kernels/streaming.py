"""Streaming copy: rows of bytes past the caches, for copies that nobody reads back soon.

A plain copy first reads the target's lines into the caches and pushes out what was there. Non-
temporal stores (x86 `movnt`, Arm `stnp`) do neither: they move about a third more bytes per second
here and leave the planner's tables in the caches. They are wrong for small copies, whose target is
read next.

The body is compiled by numba, which emits the stores through LLVM's ``!nontemporal`` metadata; it
runs without the GIL. The reference is `numpy.copyto` over the same rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final, TypeAlias

logger = logging.getLogger(__name__)

#: Bytes that one store moves; targets, row lengths and target strides must be multiples of it.
STREAM_ALIGN: Final = 64

#: copy(target, source, planes, rows, row_bytes, target_plane, target_row, source_plane,
#: source_row): addresses and strides in bytes. Row r of plane p goes from
#: ``source + p * source_plane + r * source_row`` to ``target + p * target_plane + r * target_row``.
StreamCopy: TypeAlias = Callable[[int, int, int, int, int, int, int, int, int], None]


@cache
def stream_copy() -> StreamCopy | None:
    """The compiled copy, or None where numba cannot give one; compiled when first asked for."""
    try:
        return _compile()
    except Exception as error:  # noqa: BLE001 - numba raises what LLVM and the system raise
        logger.warning("no streaming copy on this machine error=%s", error)
        return None


def _compile() -> StreamCopy:
    from numba import njit

    store, fence = _intrinsics()

    def copy(
        target: int,
        source: int,
        planes: int,
        rows: int,
        row_bytes: int,
        target_plane: int,
        target_row: int,
        source_plane: int,
        source_row: int,
    ) -> None:
        for plane in range(planes):
            for row in range(rows):
                to = target + plane * target_plane + row * target_row
                at = source + plane * source_plane + row * source_row
                for offset in range(0, row_bytes, 64):
                    store(to + offset, at + offset)
        fence()

    compiled: StreamCopy = njit(f"void({', '.join(['int64'] * 9)})", nogil=True)(copy)
    return compiled


def _intrinsics() -> tuple[Any, Any]:
    """Store of 64 bytes past the caches, and the fence that orders such stores."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def store_line(typing: object, target: object, source: object) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, _: object, arguments: Any) -> object:
            line = ir.VectorType(ir.IntType(64), 8)
            to, at = (builder.inttoptr(item, line.as_pointer()) for item in arguments)
            one = ir.Constant(ir.IntType(32), 1)
            stored = builder.store(builder.load(at, align=1), to, align=STREAM_ALIGN)
            stored.set_metadata("nontemporal", builder.module.add_metadata([one]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    def order(typing: object) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, _: object, arguments: Any) -> object:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), generate

    return intrinsic(store_line), intrinsic(order)
