"""Curves: one pass gives what replays give, and a sample comes near."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.sim import Trace, TraceBuilder, TraceFacts, open_trace
from tierkv.sim.curves import Curve, lru_curve, sampled
from tierkv.sim.sweep import run_cell

#: Requests over few contents, so that they share beginnings, and by how much the last is cut.
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)


def trace_of(requests: list[tuple[list[int], int]]) -> Trace:
    builder = TraceBuilder("drawn", 4, chained=False)
    for number, (ids, cut) in enumerate(requests):
        builder.add(number, np.array(ids, np.int64), input_tokens=4 * len(ids) - cut)
    return builder.build(TraceFacts("drawn"))


@pytest.fixture(scope="module")
def chat() -> Trace:
    return open_trace("builtin:chat?hours=0.2")


@settings(deadline=None, max_examples=150)
@given(requests=REQUESTS, first=st.sampled_from([0.0, 0.5]))
def test_the_curve_of_lru_is_every_replay_of_it(
    requests: list[tuple[list[int], int]], first: float
) -> None:
    trace = trace_of(requests)
    curve = lru_curve(trace, first)
    for capacity in range(1, trace.unique_blocks + 2):
        replayed = run_cell(trace, "lru", capacity).ratio(trace, first)
        assert curve.at(capacity) == pytest.approx(replayed)


def test_the_curve_of_lru_is_its_replays_on_a_larger_trace(chat: Trace) -> None:
    curve = lru_curve(chat, 0.5)
    for share in (0.001, 0.01, 0.1, 0.5, 1.0):
        capacity = int(share * chat.unique_blocks)
        assert curve.at(capacity) == pytest.approx(run_cell(chat, "lru", capacity).ratio(chat, 0.5))


def test_the_smallest_size_reaches_the_ratio_and_no_smaller_one_does(chat: Trace) -> None:
    curve = lru_curve(chat)
    wanted = 0.8 * curve.ratios[-1]
    size = curve.smallest(wanted)
    assert size is not None
    assert curve.at(size) >= wanted > curve.at(size - 1)
    assert curve.smallest(curve.ratios[-1] + 0.01) is None


def test_a_curve_of_points_is_read_between_them() -> None:
    curve = Curve(np.array([10, 30]), np.array([0.2, 0.4]), False)
    assert curve.at(20) == pytest.approx(0.3)
    assert curve.at(5) == pytest.approx(0.1)
    assert curve.smallest(0.3) == 20


def test_a_sample_is_a_trace_of_whole_sessions() -> None:
    trace = open_trace("builtin:agents?hours=0.5&sessions=20")
    part = sampled(trace, 0.5, seed=3)
    assert 0 < part.requests < trace.requests
    whole = {int(s): int((trace.session == s).sum()) for s in np.unique(part.session)}
    assert {int(s): int((part.session == s).sum()) for s in np.unique(part.session)} == whole
    assert sampled(trace, 1.0).requests == trace.requests
    assert sampled(trace, 0.5, seed=3).blocks.tolist() == part.blocks.tolist()


def test_without_sessions_whole_trees_are_sampled() -> None:
    # 300 conversations behind one prompt: each is in or out with all its five turns.
    requests = [([7, 100 + n, *range(turn)], 0) for turn in range(1, 6) for n in range(300)]
    part = sampled(trace_of(requests), 0.5)
    assert part.requests % 5 == 0
    assert 500 < part.requests < 1000
