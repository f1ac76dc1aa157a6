"""TieredLayer: what transformers' own layer does, in place, and to canonical blocks and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tierkv.core.errors import GeometryMismatch  # noqa: E402
from tierkv.core.geometry import KVGeometry  # noqa: E402
from tierkv.engines.kv_buffer import BlockForm, TieredLayer  # noqa: E402

BLOCK = 16
GEOMETRY = KVGeometry(layers=1, kv_heads=2, head_dim=8, dtype="float32")
FORM = BlockForm(GEOMETRY)


def states(tokens: int, seed: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 2, tokens, 8), generator=generator)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.integers(1, 70)),
            st.tuples(st.just("crop"), st.integers(0, 90)),
            st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=2)),
        ),
        max_size=12,
    ),
    st.integers(1, 100),
)
def test_layer_does_what_the_dynamic_layer_of_transformers_does(
    operations: list[tuple[str, object]], capacity: int
) -> None:
    ours = TieredLayer(FORM, capacity=capacity, tokens_max=200)
    theirs = transformers.cache_utils.DynamicLayer()
    batch = 2
    for number, (kind, value) in enumerate(operations):
        if kind == "update":
            key, values = states(value, number, batch), states(value, number + 999, batch)
            found = ours.update(key, values)
            for got, expected in zip(found, theirs.update(key, values), strict=True):
                assert torch.equal(got, expected)
        elif kind == "crop" and theirs.get_seq_length():
            removed = min(value, theirs.get_seq_length() - 1)
            ours.crop(-removed)
            theirs.crop(-removed)
        elif kind == "select" and theirs.get_seq_length():
            rows = torch.tensor([min(row, batch - 1) for row in value])
            ours.batch_select_indices(rows)
            theirs.batch_select_indices(rows)
            batch = len(rows)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 15), st.integers(0, 10**6))
def test_blocks_written_out_and_read_back_are_the_same_bits(
    blocks: int, first: int, extra: int, seed: int
) -> None:
    layer = TieredLayer(FORM, capacity=1, tokens_max=10_000)
    tokens = (first + blocks) * BLOCK + extra
    key, value = states(tokens, seed), states(tokens, seed + 1)
    layer.update(key, value)
    data = np.empty((blocks, BLOCK * GEOMETRY.token_layer_bytes), np.uint8)
    layer.save_blocks(first * BLOCK, data)
    planes = data.view(np.float32).reshape(blocks, 2, BLOCK, 2, 8)
    start = first * BLOCK
    assert planes[0, 1, 3, 1].tolist() == value[0, 1, start + 3].tolist()
    back = TieredLayer(FORM, capacity=1, tokens_max=10_000)
    back.reserve(1, blocks * BLOCK, device=torch.device("cpu"))
    back.load_blocks(data[:1], 0, BLOCK)
    back.load_blocks(data[1:], BLOCK, (blocks - 1) * BLOCK)
    back.hold(blocks * BLOCK)
    end = start + blocks * BLOCK
    assert torch.equal(back.keys, key[:, :, start:end])
    assert torch.equal(back.values, value[:, :, start:end])


def test_a_generated_token_moves_no_other_token() -> None:
    """Buffers move only when they double: 1000 single tokens cause a handful of moves."""
    layer = TieredLayer(FORM, capacity=64, tokens_max=10_000)
    places = set()
    for number in range(1000):
        layer.update(states(1, number), states(1, number))
        places.add(layer._buffers[0].data_ptr())
    assert len(places) <= 5


def test_buffers_stop_at_the_models_context_where_that_is_enough() -> None:
    layer = TieredLayer(FORM, capacity=64, tokens_max=100)
    layer.update(states(65, 1), states(65, 2))
    assert layer._buffers[0].shape[2] == 128  # the context, in whole steps


def test_states_of_another_shape_are_refused_before_they_are_copied() -> None:
    layer = TieredLayer(FORM, capacity=64, tokens_max=100)
    layer.update(states(4, 1), states(4, 2))
    with pytest.raises(GeometryMismatch, match="heads"):
        layer.update(states(1, 1)[:, :1], states(1, 2)[:, :1])
