"""Every eviction policy keeps its contract, and does what it is for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.plan.policies import POLICIES
from tierkv.plan.policies.arc import ARC
from tierkv.plan.policies.base import About, EvictionPolicy
from tierkv.plan.policies.fifo import FIFO
from tierkv.plan.policies.gdsf import GDSF
from tierkv.plan.policies.lru import LRU
from tierkv.plan.policies.mq import MQ
from tierkv.plan.policies.s3fifo import S3FIFO
from tierkv.plan.policies.sieve import SIEVE
from tierkv.plan.policies.ttl import GUARD_NS, TTL
from tierkv.plan.policies.w_tinylfu import Sketch, WTinyLFU
from tierkv.testing.policies import PolicyTests

SECOND: Final = 1_000_000_000


def any_page(_page: int) -> bool:
    return True


class Cache:
    """Names through a policy, one page each: a page lies where its name says."""

    def __init__(self, policy: EvictionPolicy, pages: int) -> None:
        self.policy, self.pages = policy, pages
        self.held: set[int] = set()

    def use(self, names: Iterable[int], cost: float = 1.0) -> int:
        """Use each in turn, storing what is absent; gives the hits."""
        hits = 0
        for name in names:
            if name in self.held:
                hits += 1
                self.policy.touch([name], 0)
                continue
            self.policy.expect([name])
            if len(self.held) == self.pages:
                self.held -= set(self.policy.evict(1, any_page, 0))
            self.policy.track(name, 0, About(name, cost))
            self.held.add(name)
        return hits


class TestLRU(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return LRU(pages)

    def test_the_one_used_longest_ago_goes_first(self) -> None:
        policy = LRU(4)
        for page in range(4):
            policy.track(page, page, About(page))
        policy.touch([0], 4)
        policy.track(2, 5, About(2))

        assert policy.evict(2, lambda page: page != 1, 6) == [3, 0]
        assert policy.evict(2, any_page, 6) == [1, 2]

    def test_a_chain_that_grew_goes_leaf_first(self) -> None:
        policy = LRU(4)
        for page in (1, 0, 3, 2):  # the first two, then what continues them
            policy.track(page, 0, About(page))
        policy.renew([3, 2, 1, 0], 1)

        assert policy.evict(4, any_page, 2) == [3, 2, 1, 0]


class TestFIFO(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return FIFO(pages)

    def test_the_one_that_came_first_goes_first_whatever_is_used(self) -> None:
        cache = Cache(FIFO(3), 3)
        cache.use([1, 2, 3, 1, 1])
        cache.policy.renew([1], 0)
        cache.use([4])

        assert cache.held == {2, 3, 4}


class TestS3FIFO(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return S3FIFO(pages)

    def test_a_scan_does_not_flush_the_main_queue(self) -> None:
        cache = Cache(S3FIFO(20), 20)
        cache.use(list(range(10)) * 3)
        cache.use(range(100, 400))

        assert set(range(2, 10)) <= cache.held, "what was used was flushed by what was not"

    def test_a_ghost_comes_back_to_the_main_queue(self) -> None:
        cache = Cache(S3FIFO(20), 20)
        cache.use(range(30))
        gone = next(name for name in range(30) if name not in cache.held)
        cache.use([gone])
        cache.use(range(100, 117))

        assert gone in cache.held


class TestSIEVE(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return SIEVE(pages)

    def test_what_was_visited_stays_while_the_new_is_sifted(self) -> None:
        cache = Cache(SIEVE(3), 3)
        cache.use([1, 2, 3, 1])
        cache.use([4])  # the hand takes the bit of 1, and gives up 2
        assert cache.held == {1, 3, 4}
        cache.use([5])
        assert cache.held == {1, 4, 5}, "the hand did not go on from where it was"
        cache.use(range(6, 20))
        assert 1 in cache.held, "the hand stays behind what is new"


class TestARC(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return ARC(pages)

    def test_it_gives_room_to_recency_or_frequency_as_ghosts_come_back(self) -> None:
        policy = ARC(4)
        cache = Cache(policy, 4)
        cache.use([1, 1, 2, 2, 3, 4, 5])  # 1 and 2 are used again; 3 goes
        assert policy.target == 0.0
        cache.use([3])
        assert policy.target == 1.0, "what was used once came back"
        cache.use([6])
        assert 1 not in cache.held
        cache.use([1])
        assert policy.target == 0.0, "what was used again came back"

    def test_a_scan_leaves_what_is_used_again(self) -> None:
        cache = Cache(ARC(8), 8)
        cache.use([1, 2, 3, 4] * 2)
        cache.use(range(100, 200))

        assert {1, 2, 3, 4} <= cache.held


class TestMQ(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return MQ(pages)

    def test_what_is_used_often_stays_until_its_life_is_over(self) -> None:
        cache = Cache(MQ(8), 8)
        cache.use([1] * 4)
        cache.use(range(100, 110))
        assert 1 in cache.held, "it went like what was used once"
        cache.use(range(200, 240))
        assert 1 not in cache.held, "it stays for ever"

    def test_the_life_of_a_page_is_the_distance_at_which_pages_come_back(self) -> None:
        cache = Cache(MQ(8), 8)
        cache.use([*range(32)] * 3)  # each comes back, as a ghost, after 32 uses
        cache.use([1] * 3)
        cache.use(range(200, 225))
        assert 1 in cache.held, "it sank after eight uses of others"

    def test_what_comes_back_has_its_frequency(self) -> None:
        cache = Cache(MQ(4), 4)
        cache.use([1] * 8)
        cache.policy.evict(1, lambda page: page == 1, 0)
        cache.held.discard(1)
        cache.use([1, 100, 101, 102, 103])

        assert 1 in cache.held


class TestGDSF(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return GDSF(pages)

    def test_the_costly_stays_longer_but_not_for_ever(self) -> None:
        cache = Cache(GDSF(4), 4)
        cache.use([1], cost=5.0)
        cache.use(range(100, 110))
        assert 1 in cache.held
        cache.use(range(200, 230))
        assert 1 not in cache.held, "what was given up meanwhile did not age it"


class TestWTinyLFU(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return WTinyLFU(pages)

    def test_one_hit_wonders_are_not_admitted(self) -> None:
        cache = Cache(WTinyLFU(100), 100)
        cache.use(list(range(99)) * 3)
        cache.use(range(1000, 1300))

        assert len(cache.held & set(range(99))) >= 95

    def test_what_is_wanted_more_often_takes_the_place_of_what_is_not(self) -> None:
        cache = Cache(WTinyLFU(100), 100)
        cache.use(range(100))
        for number in range(6):
            cache.use([500, 1000 + number])

        assert 500 in cache.held

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.integers(0, 30), max_size=200))
    def test_the_sketch_never_counts_too_little(self, names: list[int]) -> None:
        sketch = Sketch(100)
        for name in names:
            sketch.add(name)

        for name in range(31):
            assert min(names.count(name), 15) <= sketch.count(name)

    def test_the_sketch_forgets_in_time(self) -> None:
        sketch = Sketch(8)
        for _ in range(12):
            sketch.add(b"of old")
        for number in range(200):
            sketch.add(1000 + number)

        assert sketch.count(b"of old") < 12


class TestTTL(PolicyTests):
    def make(self, pages: int) -> EvictionPolicy:
        return TTL(pages)

    def test_it_refuses_to_give_up_the_young_unless_it_must(self) -> None:
        policy = TTL(3)
        for page in range(3):
            policy.track(page, page * SECOND, About(page))
        policy.touch([0], 10 * SECOND)

        assert policy.evict(3, any_page, GUARD_NS) == []
        assert policy.evict(3, any_page, GUARD_NS + SECOND) == [1]
        assert policy.evict(3, any_page, GUARD_NS + SECOND, must=True) == [2, 0]


@settings(deadline=None, max_examples=200)
@given(names=st.lists(st.integers(0, 11), max_size=120), pages=st.integers(1, 8))
@pytest.mark.parametrize("kind", ["lru", "fifo", "sieve"])
def test_it_holds_what_a_plain_model_holds(kind: str, names: list[int], pages: int) -> None:
    cache = Cache(POLICIES.load(kind)(pages), pages)
    order: list[int] = []  # oldest first
    used: set[int] = set()
    hand = 0
    for name in names:
        cache.use([name])
        if name in order:
            used.add(name)
            if kind == "lru":
                order.remove(name)
                order.append(name)
        else:
            if len(order) == pages:
                while kind == "sieve" and order[hand] in used:
                    used.remove(order[hand])
                    hand = (hand + 1) % pages
                used.discard(order.pop(hand))
                hand = 0 if hand == len(order) else hand
            order.append(name)
        assert cache.held == set(order)


def test_every_registered_policy_has_its_suite_here() -> None:
    suites = [kind for kind in PolicyTests.__subclasses__() if kind.__module__ == __name__]

    assert {POLICIES.load(name) for name in POLICIES} == {type(s().make(8)) for s in suites}
