from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tierkv import GeometryMismatch
from tierkv.core.geometry import (
    ALIGN_BYTES,
    DTYPE_BYTES,
    Form,
    KVGeometry,
    Layout,
    PagePlan,
    PageTargets,
    align_up,
)

LLAMA = KVGeometry(32, 8, 128)


@st.composite
def geometries(draw: st.DrawFn) -> KVGeometry:
    is_latent = draw(st.booleans())
    tp_size = draw(st.sampled_from([1, 2, 4, 8]))
    kv_heads = 1 if is_latent else draw(st.sampled_from([1, 2, 3, 4, 8, 12]))
    assume(kv_heads % tp_size == 0 or tp_size % kv_heads == 0)
    return KVGeometry(
        layers=draw(st.integers(1, 100)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 7, 64, 80, 128, 576])),
        dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
        form=Form.LATENT if is_latent else Form.KV,
        value_dim=None if is_latent else draw(st.sampled_from([None, 32, 128])),
        tp_size=tp_size,
        tp_rank=draw(st.integers(0, tp_size - 1)),
    )


TARGETS = st.builds(
    PageTargets,
    hot_bytes=st.integers(1, 1 << 18),
    warm_bytes=st.integers(1, 1 << 24),
    cold_bytes=st.integers(1, 1 << 28),
)


def test_llama_3_8b_fits_its_pages_exactly() -> None:
    plan = PagePlan.of(LLAMA)
    assert (plan.block_layer_bytes, plan.block_bytes) == (64 << 10, 2 << 20)
    assert (plan.hot_page_tokens, plan.hot_page_bytes) == (8, 16 << 10)
    assert (plan.warm_page_blocks, plan.warm_page_bytes) == (1, 2 << 20)
    assert plan.cold_page_warm_pages == 32


@given(geometries(), st.integers(1, 64), TARGETS)
def test_bytes_are_conserved_between_tokens_blocks_and_pages(
    geometry: KVGeometry, block_tokens: int, targets: PageTargets
) -> None:
    plan = PagePlan.of(geometry, block_tokens=block_tokens, targets=targets)
    assert plan.block_bytes == block_tokens * geometry.token_bytes
    assert plan.hot_pages_per_block * plan.hot_page_bytes == plan.block_bytes
    assert block_tokens % plan.hot_page_tokens == 0
    assert plan.warm_payload_bytes == plan.warm_page_blocks * plan.block_bytes
    layers, blocks, block_layer_bytes = plan.warm_page_shape
    assert layers * blocks * block_layer_bytes == plan.warm_payload_bytes
    assert plan.cold_page_bytes == plan.cold_page_warm_pages * plan.warm_page_bytes


@given(geometries(), st.integers(1, 64), TARGETS)
def test_pages_round_down_but_never_below_one_unit(
    geometry: KVGeometry, block_tokens: int, targets: PageTargets
) -> None:
    plan = PagePlan.of(geometry, block_tokens=block_tokens, targets=targets)
    assert plan.warm_page_bytes % ALIGN_BYTES == 0
    assert 0 <= plan.warm_page_bytes - plan.warm_payload_bytes < ALIGN_BYTES
    assert plan.warm_page_blocks == 1 or plan.warm_payload_bytes <= targets.warm_bytes
    assert plan.warm_payload_bytes + plan.block_bytes > targets.warm_bytes
    assert plan.cold_page_warm_pages == 1 or plan.cold_page_bytes <= targets.cold_bytes
    if len(set(geometry.plane_dims)) == 1 and plan.hot_page_tokens > 1:
        assert plan.hot_page_bytes <= targets.hot_bytes


@given(geometries(), st.integers(1, 64), st.integers(0, 10_000))
def test_a_partial_tail_is_not_a_block(
    geometry: KVGeometry, block_tokens: int, tokens: int
) -> None:
    plan = PagePlan.of(geometry, block_tokens=block_tokens)
    blocks = plan.blocks_in(tokens)
    assert 0 <= tokens - plan.tokens_in(blocks) < block_tokens


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 20))
def test_align_up_is_the_smallest_multiple(value: int, step: int) -> None:
    assert align_up(value, step) % step == 0
    assert 0 <= align_up(value, step) - value < step


def test_heads_divide_over_ranks_or_are_replicated() -> None:
    assert replace(LLAMA, tp_size=4).heads == 2
    assert replace(LLAMA, tp_size=16).heads == 1
    assert KVGeometry(61, 1, 576, form=Form.LATENT, tp_size=8).plane_dims == (576,)


def test_planes_of_unequal_width_are_counted_apart() -> None:
    geometry = KVGeometry(2, 4, 192, value_dim=128)
    assert geometry.plane_dims == (4 * 192, 4 * 128)
    assert geometry.token_layer_bytes == 2 * 4 * (192 + 128)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"kv_heads": 0},
        {"head_dim": -1},
        {"tp_size": 0},
        {"tp_size": 3},
        {"tp_rank": 1},
        {"tp_rank": -1},
        {"dtype": "float64"},
        {"form": Form.LATENT},
    ],
)
def test_a_geometry_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(GeometryMismatch):
        replace(LLAMA, **change)


@pytest.mark.parametrize("name", ["hot_bytes", "warm_bytes", "cold_bytes"])
def test_a_page_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(GeometryMismatch, match=name):
        PageTargets(**{name: 0})
    with pytest.raises(GeometryMismatch, match="block_tokens"):
        PagePlan.of(LLAMA, block_tokens=0)


def test_every_field_of_a_layout_but_the_targets_changes_its_fingerprint() -> None:
    base = Layout(LLAMA)
    others: dict[str, object] = {
        "geometry": replace(LLAMA, layers=33),
        "block_tokens": 32,
        "model": "m",
        "revision": "r",
        "codec": "fp8",
        "engine_layout": "vllm",
    }
    assert set(others) | {"targets"} == {field.name for field in fields(Layout)}
    prints = {replace(base, **{name: value}).fingerprint for name, value in others.items()}
    assert len(prints | {base.fingerprint}) == len(others) + 1
    assert replace(base, targets=PageTargets(hot_bytes=1)).fingerprint == base.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 33},
        {"kv_heads": 4},
        {"head_dim": 64},
        {"dtype": "float16"},
        {"value_dim": 64},
        {"tp_size": 2},
    ],
)
def test_every_part_of_a_geometry_changes_the_fingerprint(change: dict[str, object]) -> None:
    assert Layout(replace(LLAMA, **change)).fingerprint != Layout(LLAMA).fingerprint


@given(st.text(max_size=20), st.text(max_size=20))
def test_text_cannot_move_between_fields_of_a_fingerprint(model: str, revision: str) -> None:
    assume(revision)
    joined = Layout(LLAMA, model=model + revision)
    split = Layout(LLAMA, model=model, revision=revision)
    assert joined.fingerprint != split.fingerprint


def test_the_fingerprint_of_a_fixed_layout_never_changes() -> None:
    """Stored data is found again by it: a change here makes every cold tier unreachable."""
    layout = Layout(LLAMA, model="llama-3-8b", revision="1")
    assert layout.fingerprint.hex() == (
        "c3b5c9ec2414718fed6faf8c415ee696545ad518de5b97606117dd17a72213b5"
    )
