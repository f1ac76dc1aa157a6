"""The streaming copy against its reference, and the host tier above the size where it begins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.core.geometry import MIB, KVGeometry, Layout
from tierkv.core.tier import Span
from tierkv.kernels.streaming import STREAM_ALIGN, stream_copy
from tierkv.tiers.host import HostTier

Bytes = npt.NDArray[np.uint8]


def aligned(size: int, shift: int = 0) -> Bytes:
    """Zeros whose address is `shift` past a line."""
    raw = np.zeros(size + 2 * STREAM_ALIGN, np.uint8)
    start = -raw.ctypes.data % STREAM_ALIGN + shift
    return raw[start : start + size]


def test_this_machine_has_a_streaming_copy() -> None:
    assert stream_copy() is not None


@given(
    planes=st.integers(1, 4),
    rows=st.integers(1, 5),
    lines=st.integers(1, 9),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    shift=st.integers(0, STREAM_ALIGN - 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_arrive_and_nothing_else_changes(
    planes: int, rows: int, lines: int, gaps: tuple[int, int], shift: int, seed: int
) -> None:
    copy = stream_copy()
    assert copy is not None
    size, row = lines * STREAM_ALIGN, (lines + gaps[0]) * STREAM_ALIGN
    plane = rows * row + gaps[1] * STREAM_ALIGN
    source, target = aligned(planes * plane, shift), aligned(planes * plane)
    rng = np.random.default_rng(seed)
    source[:] = rng.integers(0, 256, source.size, dtype=np.uint8)
    target[:] = rng.integers(0, 256, target.size, dtype=np.uint8)
    expected = target.copy()
    shape, strides = (planes, rows, size), (plane, row, 1)
    np.copyto(
        np.lib.stride_tricks.as_strided(expected, shape, strides),
        np.lib.stride_tricks.as_strided(source, shape, strides),
    )

    copy(target.ctypes.data, source.ctypes.data, planes, rows, size, plane, row, plane, row)

    assert np.array_equal(target, expected)


@pytest.mark.parametrize("shift", [0, 1, 16])
@pytest.mark.parametrize("order", ["layers first", "blocks first", "every second"])
@pytest.mark.parametrize("page_blocks", [1, 3])
def test_large_copies_through_the_host_tier_are_exact(
    shift: int, order: str, page_blocks: int
) -> None:
    """Aligned or not, in any order of axes: what was written above 8 MiB is read back."""
    geometry = KVGeometry(layers=4, kv_heads=2, head_dim=64, dtype="float32")
    plan = Layout(geometry, block_tokens=64).pages
    blocks = 9 * MIB // plan.block_bytes + 1
    pages = -(-blocks // plan.warm_page_blocks)
    tier = HostTier(plan, pages=pages + 1)
    tier.open()
    count = plan.warm_page_blocks if page_blocks == 3 else 1
    spans, at = [], 0
    for page in range(pages):
        for offset in range(0, plan.warm_page_blocks, count):
            take = min(count, blocks - at, plan.warm_page_blocks - offset)
            if take > 0:
                spans.append(Span(at, page, offset, take))
                at += take
    assert at == blocks
    data = shaped(plan.layers, blocks, plan.block_layer_bytes, order, shift)
    data[:] = np.random.default_rng(shift).integers(0, 256, data.shape, dtype=np.uint8)
    out = shaped(plan.layers, blocks, plan.block_layer_bytes, order, shift)
    tier.write(spans, data)
    tier.read(spans, out)

    assert np.array_equal(out, data)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        tier.read(spans, out)
    tier.close()


def shaped(layers: int, blocks: int, size: int, order: str, shift: int) -> Bytes:
    """An array (layers, blocks, size) over memory that lies in another order."""
    factor = 2 if order == "every second" else 1
    flat = aligned(layers * blocks * size * factor, shift)
    if order == "blocks first":
        return flat.reshape(blocks, layers, size).transpose(1, 0, 2)
    return flat.reshape(layers, blocks * factor, size)[:, ::factor]
