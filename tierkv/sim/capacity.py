"""Capacity: the cheapest DRAM and NVMe that reach a hit ratio.

A prefix that is found in either tier is a hit, and NVMe holds a copy of what is in DRAM, as a store
that writes behind does: the hit ratio is that of the larger tier alone. NVMe is slower, so that a
part of the hits, `dram_share`, shall be served by DRAM. Compared are DRAM alone, and DRAM for its
share with NVMe for all; the cheaper is the answer.

Curves of policies other than LRU are replays at a few sizes: of the whole trace where that is soon
done, else of a sample, which has sessions too few to stand for all. But the sample's LRU is known,
and so is the trace's, both exactly: what is taken from the sample is only how far the policy is
from LRU (a control variate). The error against full replays at two sizes is measured and stated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from tierkv import __version__
from tierkv.core.geometry import GIB
from tierkv.core.models import model_geometry
from tierkv.sim.curves import Curve, lru_curve, sampled
from tierkv.sim.study import Kind, Part, hits_of
from tierkv.sim.sweep import ADAPTIVE, BASE
from tierkv.sim.trace import Trace

#: Sizes of a sampled curve, as shares of the unique blocks, and those of them replayed whole.
POINTS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.5, 1.0)
CHECKED: Final = (0.02, 0.1)

#: A trace is sampled down to about so many references; what is compiled gets more of them.
_REPLAYED_MOST: Final = 1_500_000
_COMPILED_MOST: Final = 20_000_000


@dataclass(frozen=True, slots=True)
class PolicyCurve:
    """A policy's curve. sampled: the share of the trace that was replayed, 1 for all of it.

    error: the largest difference of hit ratios between the curve and full replays at the sizes
    `checked`, in blocks; 0 and () where the curve is exact.
    """

    policy: str
    curve: Curve
    sampled: float
    error: float
    checked: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted: a hit ratio for a model, at these dollars a GiB.

    dram_share: which part of the hits DRAM has to serve.
    """

    hit: float
    price_dram: float
    price_nvme: float
    dram_share: float
    model: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The cheapest sizes for one policy; `dram_blocks` and the rest are None if none will do.

    reachable: the hit ratio of a cache that never gives anything up.
    """

    policy: str
    reachable: float
    dram_blocks: int | None = None
    nvme_blocks: int | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The answers for a target, LRU's first, and the curves that they were read from."""

    trace_name: str
    part: str
    target: Target
    block_bytes: int
    answers: tuple[Answer, ...]
    curves: tuple[PolicyCurve, ...]

    def as_table(self) -> dict[str, object]:
        """As JSON has it."""
        rows = zip(self.answers, self.curves, strict=True)
        return {
            "tierkv": __version__,
            "trace": self.trace_name,
            "scored": self.part,
            "target": asdict(self.target),
            "block_bytes": self.block_bytes,
            "answers": [
                {
                    **asdict(answer),
                    "is_exact": curve.curve.is_exact,
                    "sampled": curve.sampled,
                    "error": curve.error,
                    "checked_blocks": curve.checked,
                }
                for answer, curve in rows
            ],
        }


def run_plan(
    trace: Trace,
    kinds: Sequence[Kind],
    part: Part,
    target: Target,
    *,
    hints: bool = False,
    tell: Callable[[str, int, int], None] = lambda _name, _done, _all: None,
) -> Plan:
    """The cheapest tiers for LRU and for every policy that was asked for."""
    block_bytes = model_geometry(target.model).token_bytes * trace.block_tokens
    everyone = [Kind(BASE), *(kind for kind in kinds if kind.name != BASE)]
    curves = []
    for number, kind in enumerate(everyone, 1):
        curves.append(policy_curve(trace, kind, part, hints=hints))
        tell(kind.name, number, len(everyone))
    answers = tuple(cheapest(curve, target, block_bytes) for curve in curves)
    return Plan(trace.name, part.name, target, block_bytes, answers, tuple(curves))


def policy_curve(
    trace: Trace, kind: Kind, part: Part, *, hints: bool = False, share: float | None = None
) -> PolicyCurve:
    """The curve of one policy: exact for LRU, of a sample for others.

    share: of the trace that is sampled; by its length if None.
    """
    if kind.name == BASE:
        return PolicyCurve(BASE, lru_curve(trace, part.first, part.last), 1.0, 0.0, ())
    sizes = sorted({max(1, round(point * trace.unique_blocks)) for point in POINTS})
    if share is None:
        most = _COMPILED_MOST if kind.name == ADAPTIVE else _REPLAYED_MOST
        share = min(1.0, most / max(1, trace.references))
    few = sampled(trace, share) if share < 1 else trace
    if share >= 1 or not few.requests:
        ratios = [
            hits_of(trace, kind, size, hints=hints).ratio(trace, *part.bounds) for size in sizes
        ]
        return PolicyCurve(kind.name, _rising(sizes, ratios), 1.0, 0.0, ())
    scale = few.unique_blocks / trace.unique_blocks
    whole_lru, few_lru = (lru_curve(one, *part.bounds) for one in (trace, few))
    ratios = []
    for size in sizes:
        small = max(1, round(size * scale))
        hit = hits_of(few, kind, small, hints=hints).ratio(few, *part.bounds)
        ratios.append(min(max(whole_lru.at(size) + hit - few_lru.at(small), 0.0), 1.0))
    curve = _rising(sizes, ratios)
    checked = tuple(max(1, round(point * trace.unique_blocks)) for point in CHECKED)
    error = max(
        abs(hits_of(trace, kind, size, hints=hints).ratio(trace, *part.bounds) - curve.at(size))
        for size in checked
    )
    return PolicyCurve(kind.name, curve, few.requests / trace.requests, error, checked)


def _rising(sizes: list[int], ratios: list[float]) -> Curve:
    """A larger tier may hit less by a hair; but a smallest size is wanted."""
    return Curve(np.array(sizes, np.int64), np.maximum.accumulate(ratios), False)


def cheapest(found: PolicyCurve, target: Target, block_bytes: int) -> Answer:
    """The cheaper of DRAM alone, and DRAM with NVMe, that reaches the target."""
    reachable = float(found.curve.ratios[-1]) if len(found.curve.ratios) else 0.0
    whole = found.curve.smallest(target.hit)
    if whole is None:
        return Answer(found.policy, reachable)
    fast = found.curve.smallest(target.hit * target.dram_share) if target.dram_share > 0 else 0
    fast = whole if fast is None else min(fast, whole)

    def cost(dram: int, nvme: int) -> float:
        return (dram * target.price_dram + nvme * target.price_nvme) * block_bytes / GIB

    dram, nvme = min([(whole, 0), (fast, whole)], key=lambda sizes: cost(*sizes))
    return Answer(found.policy, reachable, dram, nvme, cost(dram, nvme))
