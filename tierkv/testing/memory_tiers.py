"""The contract suite of memory tiers: those whose blocks are read and written in place.

Inherit and give `make`; pytest runs the rest::

    class TestMyTier(TierTests):
        def make(self, plan, blocks):
            tier = MyTier(plan, pages=blocks)
            tier.open()
            return tier, 1

The cold tier moves whole pages through a disk and has a suite of its own, `ColdTierTests`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pytest

from tierkv.core.errors import TierFailed
from tierkv.core.geometry import Form, KVGeometry, PagePlan, PageTargets
from tierkv.core.tier import Span

Bytes = npt.NDArray[np.uint8]

_SMALL: Final = PageTargets(hot_bytes=256, warm_bytes=16 << 10, cold_bytes=64 << 10)
PLANS: Final = {
    "gqa": PagePlan.of(
        KVGeometry(layers=3, kv_heads=2, head_dim=16), block_tokens=4, targets=_SMALL
    ),
    "odd": PagePlan.of(
        KVGeometry(layers=2, kv_heads=1, head_dim=5), block_tokens=3, targets=_SMALL
    ),
    "latent": PagePlan.of(
        KVGeometry(layers=2, kv_heads=1, head_dim=48, form=Form.LATENT),
        block_tokens=2,
        targets=_SMALL,
    ),
}
#: Blocks of 1 MiB: a few of them are past every threshold between ways of copying.
LARGE: Final = PagePlan.of(KVGeometry(layers=8, kv_heads=8, head_dim=128), block_tokens=32)
BLOCKS: Final = 24


class MemoryTier(Protocol):
    """What the suite calls."""

    def write(self, spans: Sequence[Span], data: Bytes) -> None: ...
    def read(self, spans: Sequence[Span], out: Bytes) -> None: ...
    def close(self) -> None: ...


def rows_of(plan: PagePlan, count: int, shape: str) -> Bytes:
    """Zeroed (layers, count, block_layer_bytes) of one of the `SHAPES` of memory."""
    layers, size = plan.layers, plan.block_layer_bytes
    if shape == "by block":
        return np.zeros((count, layers, size), np.uint8).transpose(1, 0, 2)
    if shape == "every other":
        return np.zeros((layers, 2 * count, size + 3), np.uint8)[:, ::2, 3:]
    if shape == "backwards":
        return np.zeros((layers, count, size), np.uint8)[:, ::-1]
    return np.zeros((layers, count, size), np.uint8)


SHAPES: Final = ("by layer", "by block", "every other", "backwards")


class TierTests(ABC):
    """What a memory tier promises: a place holds what was last written there, and no more."""

    @abstractmethod
    def make(self, plan: PagePlan, blocks: int) -> tuple[MemoryTier, int]:
        """An open tier with room for `blocks` blocks or more, and the blocks of one page."""

    @pytest.fixture(params=sorted(PLANS))
    def plan(self, request: pytest.FixtureRequest) -> PagePlan:
        chosen: PagePlan = PLANS[request.param]
        return chosen

    @pytest.fixture(params=range(4))
    def draw(self, request: pytest.FixtureRequest) -> random.Random:
        return random.Random(request.param)

    def test_places_hold_what_was_written_last(self, plan: PagePlan, draw: random.Random) -> None:
        tier, page_blocks = self.make(plan, BLOCKS)
        model: dict[int, bytes] = {}
        rng = np.random.default_rng(draw.randrange(1 << 30))
        for _ in range(40):
            places = draw.sample(range(BLOCKS), draw.randint(1, 10))
            spans = list(spans_of(places, page_blocks))
            data = rows_of(plan, len(places), draw.choice(SHAPES))
            data[:] = rng.integers(0, 256, data.shape, dtype=np.uint8)
            tier.write(spans, data)
            for index, place in enumerate(places):
                model[place] = data[:, index].tobytes()

            wanted = draw.sample(sorted(model), draw.randint(1, len(model)))
            out = rows_of(plan, len(wanted), draw.choice(SHAPES))
            tier.read(list(spans_of(wanted, page_blocks)), out)
            for index, place in enumerate(wanted):
                assert out[:, index].tobytes() == model[place], f"place {place}"
        tier.close()

    def test_a_part_of_the_rows_is_moved_and_the_rest_left_alone(self, plan: PagePlan) -> None:
        tier, page_blocks = self.make(plan, BLOCKS)
        data = rows_of(plan, 6, "by layer")
        data[:] = np.arange(6)[None, :, None] + 1
        spans = [s._replace(index=s.index + 2) for s in spans_of([4, 0, 5], page_blocks)]
        tier.write(spans, data)
        out = rows_of(plan, 6, "by layer")
        out[:] = 99
        tier.read(spans, out)

        assert out[:, 2:5].tobytes() == data[:, 2:5].tobytes()
        assert set(out[:, [0, 1, 5]].ravel().tolist()) == {99}
        tier.close()

    @pytest.mark.parametrize("shape", SHAPES)
    def test_large_copies_are_as_exact_as_small_ones(self, shape: str) -> None:
        tier, page_blocks = self.make(LARGE, BLOCKS)
        data, out = (rows_of(LARGE, 18, shape) for _ in range(2))
        data[:] = np.random.default_rng(1).integers(0, 256, data.shape, dtype=np.uint8)
        places = [*range(3, 15), *range(18, 24)]
        tier.write(list(spans_of(places, page_blocks)), data)
        tier.read(list(spans_of(places, page_blocks)), out)
        one = rows_of(LARGE, 1, shape)
        tier.read(list(spans_of([20], page_blocks)), one)

        assert np.array_equal(out, data)
        assert np.array_equal(one[:, 0], data[:, 14])
        tier.close()

    def test_bytes_that_may_only_be_read_can_be_written_from(self, plan: PagePlan) -> None:
        tier, page_blocks = self.make(plan, BLOCKS)
        shape = (plan.layers, 1, plan.block_layer_bytes)
        data = np.frombuffer(bytes(range(256)) * (plan.block_bytes // 256 + 1), np.uint8)
        data = data[: plan.block_bytes].reshape(shape)
        tier.write(list(spans_of([7], page_blocks)), data)
        out = rows_of(plan, 1, "by layer")
        tier.read(list(spans_of([7], page_blocks)), out)

        assert np.array_equal(out, data)
        tier.close()

    def test_threads_on_places_of_their_own_do_not_disturb_each_other(self, plan: PagePlan) -> None:
        tier, page_blocks = self.make(plan, BLOCKS)

        def work(number: int) -> bool:
            mine = list(range(number, BLOCKS, 4))
            spans = list(spans_of(mine, page_blocks))
            data, out = (rows_of(plan, len(mine), "by layer") for _ in range(2))
            rng = np.random.default_rng(number)
            for _ in range(50):
                data[:] = rng.integers(0, 256, data.shape, dtype=np.uint8)
                tier.write(spans, data)
                tier.read(spans, out)
                if not np.array_equal(out, data):
                    return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
        tier.close()

    def test_more_than_there_is_is_refused_in_words(self) -> None:
        with pytest.raises(TierFailed, match="lower tiers"):
            self.make(LARGE, 1 << 34)


def spans_of(places: Sequence[int], page_blocks: int) -> Iterator[Span]:
    """Places as spans, neighbours of one page joined."""
    start = 0
    for index, place in enumerate(places):
        after = places[index + 1] if index + 1 < len(places) else -1
        if after != place + 1 or after % page_blocks == 0:
            first = places[start]
            yield Span(start, first // page_blocks, first % page_blocks, index + 1 - start)
            start = index + 1
