"""Every eviction policy keeps its contract."""

from __future__ import annotations

from tierkv.plan.policies import POLICIES
from tierkv.plan.policies.base import EvictionPolicy
from tierkv.plan.policies.lru import LRU
from tierkv.testing.policies import PolicyTests


class TestLRU(PolicyTests):
    def make(self) -> EvictionPolicy:
        return LRU()

    def test_the_one_used_longest_ago_goes_first(self) -> None:
        policy = LRU()
        for page in range(4):
            policy.track(page, page)
        policy.touch([0], 4)
        policy.track(2, 5)

        assert policy.evict(2, lambda page: page != 1) == [3, 0]
        assert policy.evict(2, lambda _page: True) == [1, 2]


def test_every_registered_policy_has_its_suite_here() -> None:
    assert {POLICIES.load(name) for name in POLICIES} == {type(TestLRU().make())}
