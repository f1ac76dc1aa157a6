"""Eviction policies: one file per policy, one line here."""

from tierkv.core.registry import Registry

POLICIES = Registry("policies", {"lru": "tierkv.plan.policies.lru:LRU"})
