"""Host and device tier keep the contract of memory tiers."""

from __future__ import annotations

import pytest

from tierkv.core.geometry import PagePlan
from tierkv.testing.memory_tiers import MemoryTier, TierTests
from tierkv.tiers.host import HostTier


class TestHostTier(TierTests):
    def make(self, plan: PagePlan, blocks: int) -> tuple[MemoryTier, int]:
        size = plan.warm_page_blocks
        tier = HostTier(plan, pages=-(-blocks // size), hugepages="off", threads=1)
        tier.open()
        return tier, size


class TestHostTierOnHugePages(TestHostTier):
    def make(self, plan: PagePlan, blocks: int) -> tuple[MemoryTier, int]:
        size = plan.warm_page_blocks
        tier = HostTier(plan, pages=-(-blocks // size), hugepages="advise", threads=2)
        tier.open()
        return tier, size


class TestDeviceTierInHostMemory(TierTests):
    def make(self, plan: PagePlan, blocks: int) -> tuple[MemoryTier, int]:
        pytest.importorskip("torch")
        from tierkv.tiers.device import DeviceTier

        tier = DeviceTier(plan, frames=blocks, device="cpu")
        tier.open()
        return tier, 1
