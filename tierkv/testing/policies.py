"""The contract suite of eviction policies.

Inherit and give `make`; pytest runs the rest::

    class TestMyPolicy(PolicyTests):
        def make(self):
            return MyPolicy()

What a policy *chooses* is its own affair; the suite holds it to the terms on which it is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.plan.policies.base import EvictionPolicy

PAGES: Final = st.integers(0, 11)

#: (what, pages, count): one call of a policy.
CALLS: Final = st.lists(
    st.tuples(
        st.sampled_from(["track", "track", "touch", "forget", "evict"]),
        st.lists(PAGES, max_size=6),
        st.integers(0, 14),
    ),
    max_size=60,
)


class PolicyTests(ABC):
    """What `EvictionPolicy` promises."""

    @abstractmethod
    def make(self) -> EvictionPolicy:
        """A new, empty policy."""

    def test_it_evicts_what_it_tracks_and_may_take_and_nothing_else(self) -> None:
        @settings(deadline=None, max_examples=150)
        @given(calls=CALLS)
        def holds(calls: list[tuple[str, list[int], int]]) -> None:
            policy, twin = self.make(), self.make()
            tracked: set[int] = set()
            for now_ns, (what, pages, count) in enumerate(calls):
                if what == "evict":
                    may_go = tracked - set(pages)
                    victims = policy.evict(count, may_go.__contains__)

                    assert len(set(victims)) == len(victims), "a page was evicted twice"
                    assert set(victims) <= may_go
                    assert len(victims) == min(count, len(may_go)), "it kept what it could give"
                    same = twin.evict(count, may_go.__contains__)
                    assert victims == same, "the same calls gave another choice"
                    tracked -= set(victims)
                else:
                    _call(policy, what, pages, now_ns)
                    _call(twin, what, pages, now_ns)
                    tracked |= set(pages) if what == "track" else set()
                    tracked -= set(pages) if what == "forget" else set()
                assert len(policy) == len(tracked)

        holds()

    def test_pages_that_were_pinned_go_when_they_are_free(self) -> None:
        policy = self.make()
        for page in range(4):
            policy.track(page, page)

        assert policy.evict(4, lambda _page: False) == []
        assert sorted(policy.evict(9, lambda _page: True)) == [0, 1, 2, 3]
        assert len(policy) == 0

    def test_a_page_that_was_evicted_can_come_back(self) -> None:
        policy = self.make()
        policy.track(1, 0)
        policy.evict(1, lambda _page: True)
        policy.touch([1], 1)
        assert len(policy) == 0, "a touch is not an arrival"
        policy.track(1, 2)

        assert policy.evict(1, lambda _page: True) == [1]

    def test_a_prefix_goes_leaf_first(self) -> None:
        """Its pages are used once, last page first, as the planner touches them."""
        policy = self.make()
        for page in (3, 2, 1, 0):
            policy.track(page, 0)
        policy.touch([3, 2, 1, 0], 1)

        assert policy.evict(4, lambda _page: True) == [3, 2, 1, 0]


def _call(policy: EvictionPolicy, what: str, pages: list[int], now_ns: int) -> None:
    if what == "touch":
        policy.touch(pages, now_ns)
        return
    for page in pages:
        if what == "track":
            policy.track(page, now_ns)
        else:
            policy.forget(page)
