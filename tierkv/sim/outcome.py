"""Outcome: what a simulated run came to, request by request and in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tierkv.core.geometry import GIB
from tierkv.sim.costs import Costs
from tierkv.sim.links import SECOND_NS
from tierkv.sim.stack import Tiers

Times = NDArray[np.int64]
_DAY_S: Final = 86400


@dataclass(frozen=True, slots=True)
class Moved:
    """What one direction of a link did."""

    bytes: int
    busy_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Samples at equal steps, and the end; tokens count from the start.

    at_ns, input_tokens: (k,).  pages_used, hit_tokens: (k,) for each tier.
    """

    at_ns: Times
    input_tokens: Times
    pages_used: Mapping[str, Times]
    hit_tokens: Mapping[str, Times]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One run. Arrays are (n,), of each request of the trace; times from the trace's start.

    hit_tokens: read from each tier, by name ("hbm", "dram", "nvme").
    prefetch_bytes: "timely", "late", "wasted", and "unused": brought, and neither used nor gone.
    block_events: blocks looked up, read, filled, evicted and moved, all together.
    gpu_ns: how long the GPU was at work; prefill and decoding are taken to overlap.
    """

    tiers: Tiers
    costs: Costs
    arrival_ns: Times
    start_ns: Times
    first_token_ns: Times
    end_ns: Times
    input_tokens: Times
    output_tokens: Times
    computed_tokens: Times
    hit_tokens: Mapping[str, Times]
    moved: Mapping[str, Moved]
    prefetch_bytes: Mapping[str, int]
    evicted_pages: Mapping[str, int]
    block_events: int
    gpu_ns: int
    joules: float
    timeline: Timeline

    @property
    def ttft_ns(self) -> Times:
        """From arrival to the first token: (n,)."""
        return self.first_token_ns - self.arrival_ns

    @property
    def makespan_ns(self) -> int:
        """From the first arrival to the last end."""
        return int(self.end_ns.max(initial=0))

    @property
    def hit_ratio(self) -> float:
        """Tokens read over prompt tokens."""
        read = sum(int(tokens.sum()) for tokens in self.hit_tokens.values())
        return read / max(1, int(self.input_tokens.sum()))

    @property
    def nvme_written_bytes(self) -> int:
        """What the drive was given to keep."""
        moved = self.moved.get("dram>nvme")
        return moved.bytes if moved else 0

    @property
    def drive_writes_per_day(self) -> float:
        """How often a day a drive of `costs.drive_bytes` would be written over."""
        days = self.makespan_ns / SECOND_NS / _DAY_S
        return self.nvme_written_bytes / self.costs.drive_bytes / days if days else 0.0

    def ttft_seconds(self, quantile: float) -> float:
        """A quantile of the time to the first token."""
        times = self.ttft_ns
        return float(np.quantile(times, quantile)) / SECOND_NS if len(times) else 0.0

    @property
    def usd(self) -> float:
        """GPU time that was used, and the tiers for as long as the run took, of all ranks."""
        costs, hours = self.costs, self.makespan_ns / SECOND_NS / 3600
        gpu = self.gpu_ns / SECOND_NS / 3600 * costs.usd_per_gpu_hour
        dram = self.tiers.dram / GIB * hours * costs.usd_per_dram_gib_hour
        nvme = self.tiers.nvme / GIB * hours * costs.usd_per_nvme_gib_hour
        return (gpu + dram + nvme) * costs.gpus

    @property
    def usd_per_million_tokens(self) -> float:
        """The same over the tokens of prompts and answers."""
        tokens = int(self.input_tokens.sum() + self.output_tokens.sum())
        return self.usd / tokens * 1e6 if tokens else 0.0

    def summary(self) -> dict[str, float]:
        """The totals by name, units in the names."""
        found: dict[str, float] = {
            "requests": len(self.arrival_ns),
            "hit_ratio": self.hit_ratio,
            **{f"hit_tokens_{tier}": int(n.sum()) for tier, n in self.hit_tokens.items()},
            "computed_tokens": int(self.computed_tokens.sum()),
            "ttft_seconds_p50": self.ttft_seconds(0.5),
            "ttft_seconds_p90": self.ttft_seconds(0.9),
            "ttft_seconds_p99": self.ttft_seconds(0.99),
            **{f"moved_bytes_{link}": moved.bytes for link, moved in self.moved.items()},
            "drive_writes_per_day": self.drive_writes_per_day,
            **{f"prefetch_bytes_{how}": n for how, n in self.prefetch_bytes.items()},
            **{f"evicted_pages_{tier}": n for tier, n in self.evicted_pages.items()},
            "gpu_seconds": self.gpu_ns / SECOND_NS,
            "makespan_seconds": self.makespan_ns / SECOND_NS,
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "joules": self.joules,
            "block_events": self.block_events,
        }
        return found

    def is_same(self, other: Outcome) -> bool:
        """Whether two runs came to the same in everything, requests and timeline included."""
        return all(
            _is_same(getattr(self, item.name), getattr(other, item.name)) for item in fields(self)
        )


def _is_same(one: object, two: object) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and bool(np.array_equal(one, two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_is_same(one[key], two[key]) for key in one)
    if isinstance(one, Timeline) and isinstance(two, Timeline):
        return all(
            _is_same(getattr(one, item.name), getattr(two, item.name)) for item in fields(one)
        )
    return one == two
