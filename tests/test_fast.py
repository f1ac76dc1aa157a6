"""The fast replays against plain ones, and what `adaptive` keeps against its own promises."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tierkv.plan import groups
from tierkv.plan.groups import Cache
from tierkv.plan.policies import POLICIES
from tierkv.sim import Stop, Trace, TraceBuilder, TraceFacts, open_trace
from tierkv.sim.fast import adaptive_cache, adaptive_hits, lru_hits, replay_into
from tierkv.sim.optimum import optimum_hits
from tierkv.sim.replay import replay
from tierkv.sim.sweep import BASE, OPTIMUM, gap_closed, run_cell, sweep

BLOCK = 4

#: Requests as (pause in ms, contents of its blocks, tokens that are missing in the last one).
REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 90_000),
        st.lists(st.integers(0, 2), min_size=1, max_size=9),
        st.integers(0, BLOCK - 1),
    ),
    min_size=1,
    max_size=60,
)


def trace_of(requests: list[tuple[int, list[int], int]]) -> Trace:
    """Chains over three contents, so that they share prefixes and branch."""
    builder, now_ms = TraceBuilder("made", BLOCK, chained=False), 0
    for pause_ms, contents, missing in requests:
        now_ms += pause_ms
        # A partial block is another block than a whole one of the same content.
        ids = np.array(contents, np.int64)
        ids[-1] += 10 * missing
        builder.add(now_ms * 1_000_000, ids, input_tokens=len(ids) * BLOCK - missing)
    return builder.build(TraceFacts(format="made"))


@given(requests=REQUESTS, capacity=st.integers(1, 40))
def test_fast_lru_hits_what_the_shipping_lru_hits(
    requests: list[tuple[int, list[int], int]], capacity: int
) -> None:
    trace = trace_of(requests)
    plain = replay(POLICIES.load("lru")(capacity), trace.starts, trace.blocks, capacity)
    assert lru_hits(trace, capacity).tolist() == plain.prefix_hits.tolist()


def plain_optimum(trace: Trace, capacity: int) -> list[int]:
    """MIN with bypass, as its definition reads."""
    refs = trace.blocks.tolist()
    kept: set[int] = set()
    hits = []
    for first, stop in zip(trace.starts[:-1].tolist(), trace.starts[1:].tolist(), strict=True):
        chain = refs[first:stop]
        length = next((n for n, block in enumerate(chain) if block not in kept), len(chain))
        hits.append(length)
        for at in range(first, stop):
            kept.add(refs[at])
            later = refs[at + 1 :]
            kept = {block for block in kept if block in later}
            if len(kept) > capacity:
                kept.remove(max(kept, key=later.index))
    return hits


@given(requests=REQUESTS, capacity=st.integers(1, 20))
def test_the_optimum_is_min_with_bypass_and_nobody_hits_more(
    requests: list[tuple[int, list[int], int]], capacity: int
) -> None:
    trace = trace_of(requests)
    found = optimum_hits(trace, capacity)
    assert found.tolist() == plain_optimum(trace, capacity)
    assert lru_hits(trace, capacity).sum() <= found.sum()
    assert adaptive_hits(trace, capacity).sum() <= found.sum()


@given(
    requests=REQUESTS,
    capacity=st.integers(1, 40),
    ghosts=st.sampled_from([None, 0.0, 0.5, 4.0]),
)
def test_adaptive_keeps_whole_prefixes_within_its_capacity(
    requests: list[tuple[int, list[int], int]], capacity: int, ghosts: float | None
) -> None:
    trace = trace_of(requests)
    cache = adaptive_cache(trace, capacity, ghosts)
    hits = replay_into(cache, trace, capacity)
    check(cache, capacity)
    again = adaptive_hits(trace, capacity, ghosts_per_place=ghosts)
    assert hits.tolist() == again.tolist(), "the same requests gave another choice"
    if ghosts is not None:
        known = np.count_nonzero((cache.blocks["group"] >= 0) & (cache.blocks["resident"] == 0))
        assert known <= max(0, int(ghosts * capacity))


def check(cache: Cache, capacity: int) -> None:
    """Assert what `groups` promises."""
    blocks, records = cache.blocks, cache.groups
    resident = np.flatnonzero(blocks["resident"])
    assert len(resident) == cache.counts[groups.RESIDENT] <= capacity
    parents = blocks["parent"][resident]
    assert blocks["resident"][parents[parents >= 0]].all(), "a block without its parent"
    children = np.bincount(parents[parents >= 0], minlength=len(blocks))
    assert (children == blocks["children"]).all()
    ghosts = np.count_nonzero((blocks["group"] >= 0) & (blocks["resident"] == 0))
    assert ghosts == cache.counts[groups.GHOSTS]
    owned = np.bincount(blocks["group"][blocks["group"] >= 0], minlength=len(records))
    held = np.bincount(blocks["group"][resident], minlength=len(records))
    alive = owned > 0
    assert (records["blocks"][alive] == owned[alive]).all()
    assert (records["resident"][alive] == held[alive]).all()
    candidates = cache.ranks.group[: cache.counts[groups.CANDIDATES]]
    can_go = [g for g in np.flatnonzero(held) if not blocks["children"][records["tail"][g]]]
    assert sorted(candidates.tolist()) == can_go, "who can be given up from is who is ranked"


def test_adaptive_learns_who_comes_back_and_when() -> None:
    """One kind of session goes on after a minute, the other never does."""
    rng, builder = np.random.default_rng(3), TraceBuilder("two kinds", BLOCK)
    fresh, requests = 0, []
    for session in range(3000):
        now_s = session * 2.0
        returns, length = session % 4 == 0, 8
        ids: list[int] = []
        for turn in range(4 if returns else 1):
            ids = [*ids, *range(fresh, fresh + length)]
            fresh += length
            answer = 400 if returns else 20
            requests.append((now_s + 60.0 * turn + rng.uniform(0, 2), list(ids), answer))
    for now_s, ids, answer in sorted(requests):
        tokens = len(ids) * BLOCK
        chain = np.array(ids, np.int64)
        builder.add(int(now_s * 1e9), chain, input_tokens=tokens, output_tokens=answer)
    trace = builder.build(TraceFacts(format="made"))
    low, high, ours = (
        run_cell(trace, name, 400).ratio(trace, 0.5) for name in (BASE, OPTIMUM, "adaptive")
    )
    assert gap_closed(ours, low, high) > 0.5, (low, ours, high)


def test_hints_make_adaptive_hit_more() -> None:
    trace = open_trace("builtin:agents?seed=5&hours=1")
    assert np.count_nonzero(trace.stop == Stop.TOOL), "the generator tells of tools"
    capacity = trace.unique_blocks // 200
    plain, told = (run_cell(trace, "adaptive", capacity, hints=h) for h in (False, True))
    assert told.ratio(trace) > plain.ratio(trace)


def test_a_sweep_shows_lru_and_the_optimum_first() -> None:
    trace = trace_of([(10, [0, 1, 2], 0), (10, [0, 1, 1], 0), (10, [0, 1, 2], 0)])
    cells = list(sweep(trace, ["adaptive", "fifo"], [2, 4]))
    assert [cell.policy for cell in cells] == [BASE, OPTIMUM, "adaptive", "fifo"] * 2
    assert cells[-1].ratio(trace) <= cells[-3].ratio(trace)
