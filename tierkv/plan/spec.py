"""What a planner is made for: tiers in pages, namespaces with their limits."""

from __future__ import annotations

import msgspec

from tierkv.core.tier import TierId


class TierPlan(msgspec.Struct, frozen=True):
    """One tier: how many pages, blocks in each, and who ranks them."""

    pages: int
    page_blocks: int
    policy: str = "lru"


class NamespaceSpec(msgspec.Struct, frozen=True):
    """One tenant: the root key of its chains, and its limits in pages of each tier."""

    name: str
    root: bytes
    quota_pages: dict[TierId, int] = {}
    ttl_ns: int | None = None


class PlanSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything a planner needs to know; written at the head of an event log."""

    tiers: dict[TierId, TierPlan]
    namespaces: list[NamespaceSpec]
    block_tokens: int
    block_bytes: int
    zero_freed: bool = False  # instructions say which host pages to zero before they are written
