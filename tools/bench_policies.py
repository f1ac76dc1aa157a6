"""How far `adaptive` comes from LRU to the optimum, on real serving traces and on hard ones.

    python tools/bench_policies.py [--quick] [--json FILE] [--check] [--rows A,B,..] [--traces DIR]

The traces are in ../shared/traces, or where --traces or TIERKV_TRACES says. Hits are tokens of the
longest resident prefix over prompt tokens, of the second half of a trace; gap closed = (policy -
LRU leaf-first) / (optimum - LRU leaf-first). One configuration for all; no hints unless said.
`conversation`, `agents`: gap closed, mean of sizes. `hints`: agents, told why answers ended and
when sessions go on. `regret`: the worst half and twentieth of any trace and size against LRU.
`capacity`: the share of LRU's capacity at which `adaptive` hits as much. `ghosts`: gap closed where
only 4 blocks a place are remembered. `rates`: block references a second on one core. `memory`:
bytes a block that is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from measuring import Row, options_of, report
from stress_traces import stress_traces

from tierkv.sim import Trace, open_trace
from tierkv.sim.fast import adaptive_cache, adaptive_hits, lru_hits, replay_into
from tierkv.sim.optimum import optimum_hits

ROWS: Final = "conversation,agents,hints,regret,capacity,ghosts,rates,memory"
CONVERSATION: Final = (0.01, 0.02, 0.05, 0.10)
AGENTS: Final = (0.001, 0.002, 0.005, 0.01)
#: Interleavings of the agents' sessions: seed, hours over which they begin.
INTERLEAVINGS: Final = ((7, 12), (11, 4), (12, 24))
STRESS: Final = (0.02, 0.05, 0.10, 0.25)
_WINDOWS: Final = 20


def main() -> int:
    """Run the chosen rows; see the module."""
    parser = options_of(__doc__.splitlines()[0], ROWS)
    parser.add_argument("--traces", type=Path, help="where the real traces are")
    options = parser.parse_args()
    near = Path(__file__).resolve().parents[2] / "shared" / "traces"
    traces = Traces(options.traces or Path(os.environ.get("TIERKV_TRACES", near)), options.quick)
    rows: list[Row] = []
    for name, measure in (
        ("conversation", conversation_rows),
        ("agents", agents_rows),
        ("hints", hints_rows),
        ("regret", regret_rows),
        ("capacity", capacity_rows),
        ("ghosts", ghosts_rows),
        ("rates", rates_rows),
        ("memory", memory_rows),
    ):
        if name in options.rows:
            rows += measure(traces)
    return report(rows, options, "adaptive, between LRU leaf-first and the optimum")


class Traces:
    """The real traces, read when asked for; those of the agents one at a time: they are large."""

    def __init__(self, root: Path, quick: bool) -> None:
        self._root = root
        self.interleavings = INTERLEAVINGS[:1] if quick else INTERLEAVINGS
        self.mooncake = cache(self._mooncake)
        self._last: tuple[tuple[int, int], Trace] | None = None

    def _mooncake(self, name: str) -> Trace:
        return open_trace(str(self._root / "mooncake" / f"{name}_trace.jsonl.zst"), keep=False)

    def agents(self, seed: int, hours: int) -> Trace:
        """The public sessions, beginning uniformly over some hours."""
        if self._last is None or self._last[0] != (seed, hours):
            self._last = None
            archive = self._root / "kv-cache-tester" / "cc_public.tar.zst"
            settings = {"seed": str(seed), "spread": f"{hours}h"}
            found = open_trace(str(archive), settings=settings, keep=False)
            self._last = (seed, hours), found
        return self._last[1]

    def each(self) -> Iterator[tuple[str, Trace, tuple[float, ...]]]:
        """Name, trace and sizes of all that are judged for regret."""
        yield "conversation", self.mooncake("conversation"), (*CONVERSATION, 0.25)
        yield "synthetic", self.mooncake("synthetic"), (0.01, 0.05, 0.10, 0.25)
        for seed, hours in self.interleavings:
            name = f"agents, seed {seed}, {hours} h"
            yield name, self.agents(seed, hours), (*AGENTS, 0.02, 0.05)
        for trace in stress_traces():
            yield trace.name, trace, STRESS


def tokens_of(trace: Trace, hits: np.ndarray) -> np.ndarray:
    """Hit tokens of each request."""
    return np.minimum(hits.astype(np.int64) * trace.block_tokens, trace.input_tokens)


def percent(trace: Trace, hits: np.ndarray, first: float = 0.5, last: float = 1.0) -> float:
    """Hit tokens over prompt tokens of a part of the requests."""
    part = slice(int(first * trace.requests), int(last * trace.requests))
    return 100 * float(tokens_of(trace, hits)[part].sum() / trace.input_tokens[part].sum())


_base: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}


def base_of(trace: Trace, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits of LRU and of the optimum, computed once."""
    key = id(trace.blocks), capacity
    if key not in _base:
        _base[key] = lru_hits(trace, capacity), optimum_hits(trace, capacity)
    return _base[key]


def closed(trace: Trace, share: float, hits: np.ndarray) -> float:
    """The part of the gap that is closed, of the second half."""
    low, high = (percent(trace, found) for found in base_of(trace, places(trace, share)))
    return (percent(trace, hits) - low) / (high - low)


def places(trace: Trace, share: float) -> int:
    """Blocks of a cache that has this share of a trace's unique ones."""
    return max(1, int(trace.unique_blocks * share))


def gap_row(
    what: str, trace: Trace, sizes: tuple[float, ...], *, hints: bool = False
) -> tuple[Row, float]:
    """Gap closed at some sizes, and their mean."""
    found = [
        closed(trace, share, adaptive_hits(trace, places(trace, share), hints=hints))
        for share in sizes
    ]
    note = ", ".join(f"{100 * s:g} %: {f:.3f}" for s, f in zip(sizes, found, strict=True))
    return Row(what, float(np.mean(found)), None, True, "closed", note), float(np.mean(found))


def conversation_rows(traces: Traces) -> list[Row]:
    """Mooncake's conversation trace; its synthetic one to be known."""
    row, mean = gap_row("conversation, sizes", traces.mooncake("conversation"), CONVERSATION)
    other, _ = gap_row("synthetic, sizes", traces.mooncake("synthetic"), (0.01, 0.05, 0.10, 0.25))
    return [Row("conversation, mean", mean, 0.30, True, "closed"), row, other]


def agents_rows(traces: Traces, *, hints: bool = False) -> list[Row]:
    """Agent sessions, interleaved in several ways."""
    rows, means = [], []
    told = " with hints" if hints else ""
    for seed, hours in traces.interleavings:
        what = f"agents{told}, seed {seed}, {hours} h"
        row, mean = gap_row(what, traces.agents(seed, hours), AGENTS, hints=hints)
        rows.append(row)
        means.append(mean)
    reach = 0.68 if hints else 0.62
    return [Row(f"agents{told}, mean", float(np.mean(means)), reach, True, "closed"), *rows]


def hints_rows(traces: Traces) -> list[Row]:
    """As `agents_rows`, told what an engine knows."""
    return agents_rows(traces, hints=True)


def regret_rows(traces: Traces) -> list[Row]:
    """The worst that `adaptive` does against LRU anywhere, in points of the hit ratio."""
    halves: list[tuple[float, str]] = []
    windows: list[tuple[float, str]] = []
    for name, trace, sizes in traces.each():
        for share in sizes:
            capacity = places(trace, share)
            ours, lru = adaptive_hits(trace, capacity), lru_hits(trace, capacity)
            for parts, found in ((2, halves), (_WINDOWS, windows)):
                for part in range(parts):
                    first, last = part / parts, (part + 1) / parts
                    delta = percent(trace, ours, first, last) - percent(trace, lru, first, last)
                    found.append((delta, f"{name}, {100 * share:g} %, part {part + 1} of {parts}"))
    rows = []
    for what, found, reach in (("half", halves, -0.3), ("twentieth", windows, -2.0)):
        worst, where = min(found)
        rows.append(Row(f"worst {what} against LRU", float(worst), reach, True, "points", where))
    return rows


def capacity_rows(traces: Traces) -> list[Row]:
    """The share of LRU's capacity at which `adaptive` hits as much."""
    rows = []
    for what, trace, share, reach in (
        ("conversation, 5 %", traces.mooncake("conversation"), 0.05, 0.60),
        ("agents, 0.5 %", traces.agents(*traces.interleavings[0]), 0.005, 0.40),
    ):
        wanted = percent(trace, base_of(trace, places(trace, share))[0])
        low, high = 0.05, 1.0
        for _ in range(9):
            middle = (low + high) / 2
            found = percent(trace, adaptive_hits(trace, places(trace, share * middle)))
            low, high = (low, middle) if found >= wanted else (middle, high)
        note = f"LRU's {wanted:.2f} %"
        rows.append(Row(f"capacity for LRU's hits, {what}", high, reach, False, "x LRU's", note))
    return rows


def ghosts_rows(traces: Traces) -> list[Row]:
    """What a bounded memory of what was given up costs."""
    rows = []
    for what, trace, sizes in (
        ("conversation", traces.mooncake("conversation"), CONVERSATION),
        ("agents", traces.agents(*traces.interleavings[0]), AGENTS),
    ):
        for ghosts in (1.0, 4.0):
            found = [
                closed(trace, s, adaptive_hits(trace, places(trace, s), ghosts_per_place=ghosts))
                for s in sizes
            ]
            name = f"{what}, {ghosts:g} ghosts a place"
            rows.append(Row(name, float(np.mean(found)), None, True, "closed"))
    return rows


def rates_rows(traces: Traces) -> list[Row]:
    """Block references a second: the median of some replays after one that compiles."""
    rows = []
    for what, trace, share, reaches in (
        ("conversation", traces.mooncake("conversation"), 0.05, (30, 1.5)),
        ("agents", traces.agents(*traces.interleavings[0]), 0.005, (30, 25)),
    ):
        for name, run, reach in zip(
            ("LRU", "adaptive"), (lru_hits, adaptive_hits), reaches, strict=True
        ):
            taken = []
            for _ in range(4):
                start = time.perf_counter()
                run(trace, places(trace, share))
                taken.append(time.perf_counter() - start)
            rate = trace.references / float(np.median(taken[1:])) / 1e6
            rows.append(Row(f"{name}, {what}", rate, reach, True, "M references/s"))
    return rows


def memory_rows(traces: Traces) -> list[Row]:
    """Bytes of `adaptive` by block that it knows, at the end of a trace."""
    rows = []
    for what, trace, share in (
        ("conversation, 5 %", traces.mooncake("conversation"), 0.05),
        ("agents, 0.5 %", traces.agents(*traces.interleavings[0]), 0.005),
    ):
        cache_ = adaptive_cache(trace, places(trace, share), 4.0)
        replay_into(cache_, trace, places(trace, share))
        known = np.count_nonzero(cache_.blocks["group"] >= 0)
        groups_ = np.count_nonzero(cache_.groups["blocks"] > 0)
        ranks = sum(part.itemsize for part in cache_.ranks)
        used = known * cache_.blocks.itemsize + groups_ * (cache_.groups.itemsize + ranks)
        note = f"{known:,} blocks in {groups_:,} groups; tables besides, {tables(cache_):,} bytes"
        rows.append(Row(f"memory, {what}", used / known, 64, False, "bytes a block", note))
    return rows


def tables(cache_: object) -> int:
    """Bytes of the model, whatever the size of the cache."""
    return sum(part.nbytes for part in cache_.model)  # type: ignore[attr-defined]


if __name__ == "__main__":
    raise SystemExit(main())
