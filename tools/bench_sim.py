"""How fast the event-driven simulator is: block events per second on one core, three tiers.

    python tools/bench_sim.py [--quick] [--json FILE] [--check] [--rows conversation,agents]
                              [--profile N]

A block event is a block that a request looks up, reads, fills, evicts or moves. Making the trace
does not count. `--quick` takes a tenth of the requests; `--profile N` prints the N functions that
take longest, and measures nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from typing import Final, NamedTuple

from measuring import Row, options_of, report

from tierkv.sim import EngineSettings, Outcome, Trace, open_trace, simulate

REACH: Final = 1e6


class Case(NamedTuple):
    """A trace and the tiers it is sent through."""

    trace: str
    tiers: str


CASES: Final = {
    "conversation": Case("builtin:chat", "hbm=8GiB,dram=64GiB,nvme=1TiB"),
    "agents": Case("builtin:agents", "hbm=16GiB,dram=256GiB,nvme=4TiB"),
}


def run(trace: Trace, case: Case) -> Outcome:
    """One run; the lease of what was read ends with the copy, as `Store.get` does it."""
    return simulate(trace, case.tiers, settings=EngineSettings(pins=False))


def measured(name: str, options: argparse.Namespace) -> list[Row]:
    """The row of one trace."""
    case = CASES[name]
    trace = open_trace(case.trace)
    trace = trace.cut(0, trace.requests // 10 if options.quick else trace.requests)
    run(trace.cut(0, 100), case)
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(run, trace, case)
        pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)
        return []
    start = time.process_time()
    outcome = run(trace, case)
    took = time.process_time() - start
    note = f"{case.trace} {case.tiers}: {outcome.block_events:,} in {took:.1f} s"
    return [Row(name, outcome.block_events / took / 1e6, REACH / 1e6, unit="M/s", note=note)]


def main() -> int:
    """Run the rows that were asked for."""
    parser = options_of(__doc__ or "", ",".join(CASES))
    parser.add_argument("--profile", type=int, default=0, help="print so many functions")
    options = parser.parse_args()
    rows = [row for name in options.rows for row in measured(name, options)]
    return report(rows, options, "block events per second of CPU time")


if __name__ == "__main__":
    sys.exit(main())
