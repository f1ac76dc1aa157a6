"""Sweep: what policies make of a trace at several sizes of one tier, beside the optimum.

A *cell* is one policy at one size. Hits are tokens of the longest prefix that was resident when a
request came, over all prompt tokens. "Gap closed" is how far a policy comes from LRU, leaf first,
to the optimum: 0 as LRU, 1 as the optimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tierkv.core.registry import known_name
from tierkv.plan.policies import POLICIES
from tierkv.sim.fast import adaptive_hits, lru_hits
from tierkv.sim.optimum import optimum_hits
from tierkv.sim.replay import replay
from tierkv.sim.trace import Trace

#: What is shown beside every policy.
BASE: Final = "lru"
OPTIMUM: Final = "optimum"
ADAPTIVE: Final = "adaptive"


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one size. `hit_tokens`: (n,), of each request."""

    policy: str
    capacity_blocks: int
    hit_tokens: NDArray[np.int64]

    def ratio(self, trace: Trace, first: float = 0.0, last: float = 1.0) -> float:
        """Hit tokens over prompt tokens, of that part of the requests."""
        part = slice(int(first * trace.requests), int(last * trace.requests))
        return float(self.hit_tokens[part].sum() / max(1, trace.input_tokens[part].sum()))


def policy_names() -> list[str]:
    """What a sweep can run, the optimum not counted."""
    return [ADAPTIVE, *(name for name in POLICIES if name != ADAPTIVE)]


def run_cell(trace: Trace, policy: str, capacity_blocks: int, *, hints: bool = False) -> Cell:
    """Replay a trace. Raises ValueError for an unknown policy.

    hints: `adaptive` is told why answers ended and when sessions go on, where the trace knows it.
    """
    if policy == OPTIMUM:
        blocks = optimum_hits(trace, capacity_blocks)
    elif policy == BASE:
        blocks = lru_hits(trace, capacity_blocks)
    elif policy == ADAPTIVE:
        blocks = adaptive_hits(trace, capacity_blocks, hints=hints)
    else:
        ranked = POLICIES.load(known_name(policy, policy_names()))(capacity_blocks)
        found = replay(ranked, trace.starts, trace.blocks, capacity_blocks, trace.arrival_ns)
        blocks = found.prefix_hits
    tokens = blocks.astype(np.int64) * trace.block_tokens
    return Cell(policy, capacity_blocks, np.minimum(tokens, trace.input_tokens))


def sweep(
    trace: Trace, policies: Iterable[str], capacities: Iterable[int], *, hints: bool = False
) -> Iterator[Cell]:
    """All cells, those of LRU and of the optimum first at each size."""
    names = dict.fromkeys([BASE, OPTIMUM, *policies])
    for capacity in capacities:
        for name in names:
            yield run_cell(trace, name, capacity, hints=hints)


def gap_closed(value: float, base: float, optimum: float) -> float:
    """0 where a policy hits as LRU does, 1 where it hits as the optimum; nan if those are equal."""
    return (value - base) / (optimum - base) if optimum > base else float("nan")
