"""The plain replay: what the planner decides, and hit counts that stay what they are."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_trace import conversations
from tierkv.core.keys import BlockKey, KeyChain
from tierkv.core.tier import TierId
from tierkv.plan import events as ev
from tierkv.plan.planner import Planner
from tierkv.plan.policies import POLICIES
from tierkv.plan.spec import NamespaceSpec, PlanSpec, TierPlan
from tierkv.sim.replay import Replay, replay

CHAIN: Final = KeyChain(b"f" * 32, salt=b"default", block_tokens=1)
SECOND: Final = 1_000_000_000

#: Requests over few tokens, so that they share beginnings.
REQUESTS: Final = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=40
)


def run(
    policy: str, requests: list[list[int]], capacity: int, step_ns: int = 1, unit: str = "request"
) -> Replay:
    starts = np.cumsum([0, *map(len, requests)], dtype=np.int64)
    blocks = np.array([block for request in requests for block in request], np.int32)
    times = np.arange(len(requests), dtype=np.int64) * step_ns
    kind = POLICIES.load(policy)(capacity)
    return replay(kind, starts, blocks, capacity, times, unit=unit)  # type: ignore[arg-type]


#: Blocks of prefix hits of `conversations(seed=6, requests=1500)`, one a second, in tiers of 2, 5,
#: 10 and 20 % of its blocks. A change of one is a change of what that policy decides: say why.
GOLDEN: Final = {
    "lru": (8601, 11378, 14053, 16212),
    "fifo": (7367, 9716, 12596, 14801),
    "s3fifo": (9069, 10988, 12865, 14450),
    "sieve": (9242, 11157, 12418, 14213),
    "arc": (8892, 10962, 13725, 15980),
    "mq": (9184, 11153, 13791, 16193),
    "gdsf": (9362, 11469, 13862, 15885),
    "w_tinylfu": (8615, 9664, 12037, 14322),
    "ttl": (9104, 11431, 14053, 16212),
}


class Driven:
    """The planner with one tier of pages of one block."""

    def __init__(self, policy: str, capacity: int) -> None:
        tiers = {TierId.HOST: TierPlan(capacity, 1, policy)}
        spec = PlanSpec(tiers, [NamespaceSpec("default", CHAIN.root)], 1, 8)
        self.planner = Planner(spec)

    def serve(self, keys: list[BlockKey], now_ns: int) -> int:
        """One request; gives how long its resident prefix was."""
        raw: list[bytes] = [*keys]
        (grant,) = self.planner.handle(ev.Acquire(raw, 0, len(raw), "default"), now_ns)
        assert isinstance(grant, ev.Grant)
        for item in self.planner.handle(ev.Put(raw, grant.count, "default"), now_ns):
            if isinstance(item, ev.Fill):
                self.planner.handle(ev.Filled(item.ticket, True), now_ns)
        self.planner.handle(ev.Release(grant.lease), now_ns)
        return grant.count

    def resident(self) -> set[BlockKey]:
        """The keys of what may be read."""
        ready = self.planner.tables[TierId.HOST].ready
        return {self.planner.index.key(b) for b in range(len(ready)) if ready[b] >= 0}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_replay_holds_and_hits_what_the_planner_does(policy: str) -> None:
    @settings(deadline=None, max_examples=60)
    @given(
        tokens=REQUESTS,
        capacity=st.sampled_from([1, 2, 3, 5, 8, 13, 130]),
        step_ns=st.sampled_from([1, 4 * SECOND]),
    )
    def holds(tokens: list[list[int]], capacity: int, step_ns: int) -> None:
        driven = Driven(policy, capacity)
        ids: dict[BlockKey, int] = {}
        starts, blocks, hits = [0], [], []
        for number, request in enumerate(tokens):
            keys = CHAIN.of_tokens(request)
            hits.append(driven.serve(keys, number * step_ns))
            blocks += [ids.setdefault(key, len(ids)) for key in keys]
            starts.append(len(blocks))
            found = replay(
                POLICIES.load(policy)(capacity),
                np.array(starts, np.int64),
                np.array(blocks, np.int32),
                capacity,
                np.arange(number + 1, dtype=np.int64) * step_ns,
                names=list(ids),
            )
            names = list(ids)
            assert {names[block] for block in found.resident} == driven.resident()
            assert found.prefix_hits.tolist() == hits

    holds()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_large_tier_is_replayed_as_the_planner_evicts_a_few_at_once(policy: str) -> None:
    """By seed: 400 requests of up to 60 blocks that branch, through 256 pages."""
    rng = np.random.default_rng(6)
    driven, ids = Driven(policy, 256), dict[BlockKey, int]()
    starts, blocks, hits = [0], list[int](), list[int]()
    for number in range(400):
        length = int(rng.integers(1, 60))
        tokens = [int(rng.integers(0, 40)), *[int(rng.random() < 0.03) for _ in range(length)]]
        keys = CHAIN.of_tokens(tokens)
        hits.append(driven.serve(keys, number * SECOND))
        blocks += [ids.setdefault(key, len(ids)) for key in keys]
        starts.append(len(blocks))
    found = replay(
        POLICIES.load(policy)(256),
        np.array(starts, np.int64),
        np.array(blocks, np.int32),
        256,
        np.arange(400, dtype=np.int64) * SECOND,
        names=list(ids),
    )

    assert found.prefix_hits.tolist() == hits
    assert {list(ids)[block] for block in found.resident} == driven.resident()


def test_blocks_behind_a_gap_are_block_hits_but_no_prefix_hits() -> None:
    found = run("fifo", [[0, 1, 2], [5], [0, 1, 2]], 3)

    assert found.prefix_hits.tolist() == [0, 0, 2], "a prefix loses its end first"
    assert run("fifo", [[0, 1, 2], [5], [0, 1, 2]], 3, unit="block").block_hits[2] == 0
    gap = run("lru", [[2], [0, 1, 2]], 9)
    assert (gap.prefix_hits[1], gap.block_hits[1]) == (0, 1)


def test_a_chain_longer_than_the_tier_keeps_its_head() -> None:
    assert run("lru", [[7], [0, 1, 2, 3, 4]], 3).resident.tolist() == [0, 1, 2]


def test_what_a_guard_refuses_is_not_stored() -> None:
    assert run("ttl", [[0], [1]], 1, SECOND).resident.tolist() == [0]
    assert run("ttl", [[0], [1]], 1, 31 * SECOND).resident.tolist() == [1]


def test_no_requests_hit_nothing() -> None:
    found = run("lru", [], 4)

    assert found.prefix_hits.size == found.block_hits.size == found.resident.size == 0


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_policy_hits_on_a_small_trace_what_it_always_did(policy: str) -> None:
    trace = conversations(seed=6, requests=1500)
    times = np.arange(1500, dtype=np.int64) * SECOND
    found = []
    for percent in (2, 5, 10, 20):
        capacity = (int(trace.blocks.max()) + 1) * percent // 100
        hits = replay(POLICIES.load(policy)(capacity), *trace, capacity, times).prefix_hits
        found.append(int(hits.sum()))

    assert tuple(found) == GOLDEN[policy]
