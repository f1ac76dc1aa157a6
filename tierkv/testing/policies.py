"""The contract suite of eviction policies.

Inherit and give `make`; pytest runs the rest::

    class TestMyPolicy(PolicyTests):
        def make(self, pages):
            return MyPolicy(pages)

What a policy *chooses* is its own affair; the suite holds it to the terms on which it is asked.
"""

from __future__ import annotations

import tracemalloc
from abc import ABC, abstractmethod
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.plan.policies.base import About, EvictionPolicy

PAGES: Final = st.integers(0, 11)

#: (what, pages, count): one call of a policy.
CALLS: Final = st.lists(
    st.tuples(
        st.sampled_from(["track", "track", "touch", "renew", "expect", "forget", "evict", "must"]),
        st.lists(PAGES, max_size=6),
        st.integers(0, 14),
    ),
    max_size=60,
)
SECOND: Final = 1_000_000_000
#: What a policy may take for each page of its tier, ghosts included; and for its own parts.
_PAGE_BYTES_MAX: Final = 2048
_OWN_BYTES_MAX: Final = 65536


class PolicyTests(ABC):
    """What `EvictionPolicy` promises."""

    @abstractmethod
    def make(self, pages: int) -> EvictionPolicy:
        """A new, empty policy for a tier of that many pages."""

    def test_it_evicts_what_it_tracks_and_may_take_and_nothing_else(self) -> None:
        @settings(deadline=None, max_examples=150)
        @given(calls=CALLS, capacity=st.integers(1, 24), step_ns=st.sampled_from([1, 7 * SECOND]))
        def holds(calls: list[tuple[str, list[int], int]], capacity: int, step_ns: int) -> None:
            policy, twin = self.make(capacity), self.make(capacity)
            tracked: set[int] = set()
            for number, (what, pages, count) in enumerate(calls):
                now_ns = number * step_ns
                if what in ("evict", "must"):
                    may_go, must = tracked - set(pages), what == "must"
                    victims = policy.evict(count, may_go.__contains__, now_ns, must=must)

                    assert len(set(victims)) == len(victims), "a page was evicted twice"
                    assert set(victims) <= may_go
                    if must or not policy.may_refuse:
                        assert len(victims) == min(count, len(may_go)), "it kept what it could give"
                    same = twin.evict(count, may_go.__contains__, now_ns, must=must)
                    assert victims == same, "the same calls gave another choice"
                    tracked -= set(victims)
                else:
                    _call(policy, what, pages, now_ns)
                    _call(twin, what, pages, now_ns)
                    tracked |= set(pages) if what == "track" else set()
                    tracked -= set(pages) if what == "forget" else set()
                assert len(policy) == len(tracked)
            assert sorted(policy.evict(99, lambda _page: True, 0, must=True)) == sorted(tracked)

        holds()

    def test_pages_that_were_pinned_go_when_they_are_free(self) -> None:
        policy = self.make(4)
        for page in range(4):
            policy.track(page, page, About(page))

        assert policy.evict(4, lambda _page: False, 4, must=True) == []
        assert sorted(policy.evict(9, lambda _page: True, 4, must=True)) == [0, 1, 2, 3]
        assert len(policy) == 0

    def test_a_page_that_was_evicted_can_come_back(self) -> None:
        policy = self.make(4)
        policy.track(1, 0, About(1))
        policy.evict(1, lambda _page: True, 0, must=True)
        policy.touch([1], 1)
        policy.renew([1], 1)
        assert len(policy) == 0, "a touch is not an arrival"
        policy.expect([1])
        policy.track(1, 2, About(1))

        assert policy.evict(1, lambda _page: True, 2, must=True) == [1]

    def test_a_prefix_goes_leaf_first(self) -> None:
        """Its pages are used once, last page first, as the planner touches them."""
        policy = self.make(400)
        for page in (3, 2, 1, 0):
            policy.track(page, 0, About(page, depth=page))
        policy.touch([3, 2, 1, 0], 1)

        assert policy.evict(4, lambda _page: True, 2, must=True) == [3, 2, 1, 0]

    def test_what_it_remembers_is_bounded_by_its_capacity(self) -> None:
        """Ten thousand names come and go through 16 pages, some of them more than once."""
        policy = self.make(16)
        tracemalloc.start()
        try:
            for number in range(10_000):
                name = number.to_bytes(8, "big") if number % 3 else (number % 64).to_bytes(8, "big")
                policy.expect([name, b"never stored" + name])
                if len(policy) == 16:
                    policy.evict(1, lambda _page: True, number, must=True)
                policy.track(number, number, About(name))
                policy.touch([number, number - 3], number)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert len(policy) == 16
        assert held < _OWN_BYTES_MAX + 16 * _PAGE_BYTES_MAX, f"it holds {held} bytes"


def _call(policy: EvictionPolicy, what: str, pages: list[int], now_ns: int) -> None:
    if what == "touch":
        policy.touch(pages, now_ns)
    elif what == "renew":
        policy.renew(pages, now_ns)
    elif what == "expect":
        policy.expect(pages)
    else:
        for page in pages:
            if what == "track":
                policy.track(page, now_ns, About(page, cost=1.0 + page % 3, depth=page))
            else:
                policy.forget(page)
