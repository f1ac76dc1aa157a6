"""The split point: how much of a stored prefix is sooner loaded than computed.

A prefix of n blocks is loaded up to block k, and the rest computed: k is where the sum of both is
least, by what a block costs from each tier and what it costs to compute, both as measured in this
engine so far. As long as one of them is not known, all is loaded. Later tokens cost more to compute
than earlier ones, which the mean that is measured does not show: it leans to computing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from tierkv.engines.vllm.mirror import DISK, MEMORY, Report

#: Loads are preferred by this much: the engine's cores have other requests to compute.
_FAVOUR: Final = 0.9


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """Seconds for a block: from memory, from disk, computed; 0 where not known."""

    memory: float = 0.0
    disk: float = 0.0
    compute: float = 0.0

    @classmethod
    def of(cls, reports: Iterable[Report], *, block_bytes: int, block_tokens: int) -> Self:
        """By the slowest rank for each."""

        def slowest(amount: int, rates: Iterable[float]) -> float:
            return max((amount / rate for rate in rates if rate > 0), default=0.0)

        told = list(reports)
        return cls(
            slowest(block_bytes, (r.memory_bytes_s for r in told)),
            slowest(block_bytes, (r.disk_bytes_s for r in told)),
            slowest(block_tokens, (r.prefill_tokens_s for r in told)),
        )

    def split(self, tiers: list[int]) -> int:
        """How many of the blocks to load, that lie in these tiers (`MEMORY`, `DISK`)."""
        if not self.compute or not tiers:
            return len(tiers)
        gains = np.zeros(DISK + 1)
        for tier, seconds in ((MEMORY, self.memory), (DISK, self.disk)):
            gains[tier] = self.compute - _FAVOUR * seconds if seconds else self.compute
        sums = np.cumsum(gains[np.frombuffer(bytes(tiers), np.uint8)])
        best = int(np.argmax(sums[::-1]))  # of equal ones the last
        return len(tiers) - best if sums[len(tiers) - 1 - best] > 0 else 0
