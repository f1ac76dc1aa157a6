"""Study: policies at sizes on one trace, as figures; what `tierkv sim` prints and draws.

A cell's task is independent of all others. Large traces are replayed by several processes, each of
which gets the trace once. Of the tasks, `adaptive` is first, and alone until it is compiled, since
on a machine that has never run it that takes longer than most replays.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from tierkv.core.errors import ConfigError
from tierkv.plan.policies.base import EvictionPolicy
from tierkv.sim.replay import replay
from tierkv.sim.summary import known_blocks
from tierkv.sim.sweep import ADAPTIVE, BASE, OPTIMUM, Cell, gap_closed, run_cell
from tierkv.sim.trace import Trace
from tierkv.sim.user_policy import Checked, load_policy, split_program, told

#: Points of a timeline.
BINS: Final = 120
#: Below so many references, times cells, one process is sooner ready than several have started.
_WORTH_PROCESSES: Final = 20_000_000


@dataclass(frozen=True, slots=True)
class Kind:
    """A policy to run: one of the registry by name, or a user's class, `FILE.py:CLASS`."""

    name: str
    program: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Which requests are scored; all are replayed."""

    name: str
    first: float
    last: float

    @property
    def bounds(self) -> tuple[float, float]:
        """First and last as one."""
        return self.first, self.last


PARTS: Final = {
    "first": Part("first half", 0.0, 0.5),
    "second": Part("second half", 0.5, 1.0),
    "all": Part("all", 0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Size:
    """A size of the tier: blocks, their share of the trace's unique ones, bytes of a model."""

    blocks: int
    share: float
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy at one size. timeline: hit ratio in each of `BINS` spans, nan where no request."""

    policy: str
    blocks: int
    hit: float
    timeline: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of every table: shares from 0 to 1; gap: nan where LRU is the optimum."""

    size: Size
    policy: str
    hit: float
    lru: float
    optimum: float
    gap: float


@dataclass(frozen=True, slots=True)
class Study:
    """All cells. `policies`: as asked for; LRU and the optimum are at every size besides.

    reachable: what a cache without limit hits of the part that is scored.
    """

    trace: Trace
    part: Part
    hints: bool
    model: str | None
    sizes: tuple[Size, ...]
    policies: tuple[str, ...]
    outcomes: dict[tuple[str, int], Outcome]
    reachable: float

    def rows(self) -> Iterator[Row]:
        """Size by size, policy by policy."""
        for size in self.sizes:
            lru = self.outcomes[BASE, size.blocks].hit
            optimum = self.outcomes[OPTIMUM, size.blocks].hit
            for name in self.policies:
                hit = self.outcomes[name, size.blocks].hit
                yield Row(size, name, hit, lru, optimum, gap_closed(hit, lru, optimum))


def hits_of(trace: Trace, kind: Kind, capacity: int, *, hints: bool = False) -> Cell:
    """One cell. Raises ConfigError, with file and line, where a user's policy fails."""
    if kind.program is None:
        return run_cell(trace, kind.name, capacity, hints=hints)
    policy, (path, _) = load_policy(kind.program), split_program(kind.program)
    try:
        made = cast("EvictionPolicy", Checked(policy(capacity)))
        found = replay(made, trace.starts, trace.blocks, capacity, trace.arrival_ns)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the program's own
        raise ConfigError(told(path, error)) from None
    tokens = found.prefix_hits.astype(np.int64) * trace.block_tokens
    return Cell(kind.name, capacity, np.minimum(tokens, trace.input_tokens))


def run_study(
    trace: Trace,
    kinds: Sequence[Kind],
    sizes: Sequence[Size],
    part: Part,
    *,
    hints: bool = False,
    model: str | None = None,
    processes: int | None = None,
    tell: Callable[[str, int, int], None] = lambda _name, _done, _all: None,
) -> Study:
    """Run every cell. processes: as many as seem worth it if None. tell: (policy, done, all)."""
    everyone = list({kind.name: kind for kind in [*kinds, Kind(BASE), Kind(OPTIMUM)]}.values())
    tasks = _in_order(everyone, [size.blocks for size in sizes])
    if processes is None:
        is_worth = trace.references * len(tasks) >= _WORTH_PROCESSES
        processes = min(len(os.sched_getaffinity(0)), 8, len(tasks)) if is_worth else 1
    outcomes = {}
    for number, found in enumerate(_outcomes(trace, tasks, part, hints, processes), 1):
        outcomes[found.policy, found.blocks] = found
        tell(found.policy, number, len(tasks))
    names = tuple(kind.name for kind in kinds)
    reachable = _reachable(trace, part)
    return Study(trace, part, hints, model, tuple(sizes), names, outcomes, reachable)


def _in_order(kinds: Sequence[Kind], capacities: Sequence[int]) -> list[tuple[Kind, int]]:
    slow = [kind for kind in kinds if kind.name == ADAPTIVE]
    quick = sorted(
        (k for k in kinds if k.name != ADAPTIVE), key=lambda k: k.name in (BASE, OPTIMUM)
    )
    firsts = [(kind, capacities[0]) for kind in slow]
    rest = [(kind, capacity) for capacity in capacities[1:] for kind in slow]
    return firsts + [(kind, capacity) for kind in quick for capacity in capacities] + rest


def _outcomes(
    trace: Trace, tasks: list[tuple[Kind, int]], part: Part, hints: bool, processes: int
) -> Iterator[Outcome]:
    if processes <= 1:
        for kind, capacity in tasks:
            yield _outcome(trace, kind, capacity, part, hints)
        return
    context = multiprocessing.get_context("spawn")
    given = (trace, part, hints)
    with _soon_compiled(), ProcessPoolExecutor(processes, context, _Worker.begin, given) as pool:
        waiting = [pool.submit(_Worker.run, kind, capacity) for kind, capacity in tasks]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _soon_compiled() -> Iterator[None]:
    """Processes that are started within compile a quarter sooner; what they compile is as fast."""
    before = os.environ.get("NUMBA_OPT")
    os.environ.setdefault("NUMBA_OPT", "2")
    try:
        yield
    finally:
        if before is None:
            del os.environ["NUMBA_OPT"]


class _Worker:
    """What a process of the pool holds: the trace, sent once."""

    given: tuple[Trace, Part, bool]

    @classmethod
    def begin(cls, trace: Trace, part: Part, hints: bool) -> None:
        cls.given = trace, part, hints

    @classmethod
    def run(cls, kind: Kind, capacity: int) -> Outcome:
        trace, part, hints = cls.given
        return _outcome(trace, kind, capacity, part, hints)


def _outcome(trace: Trace, kind: Kind, capacity: int, part: Part, hints: bool) -> Outcome:
    cell = hits_of(trace, kind, capacity, hints=hints)
    return Outcome(kind.name, capacity, cell.ratio(trace, *part.bounds), timeline(trace, cell))


def timeline(trace: Trace, cell: Cell) -> NDArray[np.float64]:
    """(BINS,): hit tokens over prompt tokens in equal spans of the trace's time."""
    span = max(1, -(-(trace.duration_ns + 1) // BINS))
    places = trace.arrival_ns // span
    hit = np.bincount(places, cell.hit_tokens, BINS)
    asked = np.bincount(places, trace.input_tokens, BINS)
    ratios = np.full(BINS, np.nan)
    np.divide(hit, asked, out=ratios, where=asked > 0)
    return ratios


def _reachable(trace: Trace, part: Part) -> float:
    known = known_blocks(trace).astype(np.int64) * trace.block_tokens
    endless = Cell("endless", trace.unique_blocks, np.minimum(known, trace.input_tokens))
    return endless.ratio(trace, *part.bounds)
