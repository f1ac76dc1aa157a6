"""The promise under faults, in numbers: every drill, many cases, one table.

    python tools/reliability.py [--quick] [--seed N] [--only DRILL] [--json FILE] [--markdown FILE]

A line of a failure names its seed and case; ``tierkv.testing.drills.NAME.replay(seed, case)`` has
it again. Exits 1 where anything was wrong. The full run takes under 30 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tierkv.testing.drills import Tally
from tierkv.testing.drills.base import BROKEN, LEAKED, LOST, NOT_RUN, WRONG_BYTES


class Class(NamedTuple):
    """A drill's module, what it does in words, and its cases in a quick and in a full run."""

    module: str
    words: str
    quick: int
    full: int


CLASSES = (
    Class("crashes", "power lost at every call, 8 fates each", 20_000, 250_000),
    Class("interleavings", "the whole store in orders drawn by seed", 2_000, 50_000),
    Class("processes", "real processes killed and refused by a real kernel", 100, 2_000),
    Class("nth_fault", "n-th call fails, once and from then on", 5_000, 100_000),
    Class("flips", "bits flipped, pages swapped, cut and stale", 20_000, 500_000),
    Class("layouts", "put under one layout, get under another", 280, 3_000),
    Class("hostile", "hostile entries in the cache directory", 300, 50_060),
    Class("configs", "bad configurations, loaded and opened", 2_700, 20_300),
)
#: Parts of a drill that run beside each other.
PARTS = 2


def main() -> int:
    """Run the drills and show what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="as many cases as `make test`")
    parser.add_argument("--seed", type=int, default=1, help="of all cases")
    parser.add_argument("--only", action="append", metavar="DRILL", help="this drill only")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the table for docs/reliability.md")
    options = parser.parse_args()
    wanted = [one for one in CLASSES if not options.only or one.module in options.only]
    rows = []
    for one in wanted:
        tally = tallied(one, one.quick if options.quick else one.full, options.seed)
        count = sum(map(len, tally.wrong.values()))
        sys.stderr.write(f"{tally.drill}: {tally.cases:,} cases, {count} wrong\n")
        rows.append((one, tally))
    show(rows)
    if options.json:
        report = [asdict(tally) | one._asdict() for one, tally in rows]
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    for _, tally in rows:
        for kind, lines in tally.wrong.items():
            for line in lines[:10]:
                sys.stderr.write(f"{tally.drill}: {kind}: {line}\n")
    return 0 if all(tally.holds for _, tally in rows) else 1


def tallied(one: Class, cases: int, seed: int) -> Tally:
    """A drill's cases, in parts with seeds of their own."""
    share = -(-cases // PARTS)
    with ProcessPoolExecutor(
        PARTS, initializer=logging.disable, initargs=(logging.CRITICAL,)
    ) as pool:
        parts = list(pool.map(part, [one.module] * PARTS, [share] * PARTS,
                              range(seed, seed + PARTS)))  # fmt: skip
    whole = Tally(parts[0].drill, seed)
    for tally in parts:
        whole.cases += tally.cases
        whole.seconds = max(whole.seconds, tally.seconds)
        for kind, lines in tally.wrong.items():
            whole.wrong.setdefault(kind, []).extend(lines)
    return whole


def part(module: str, cases: int, seed: int) -> Tally:
    """Run in a process of its own."""
    run: Callable[[int, int], Tally] = import_module(f"tierkv.testing.drills.{module}").run
    return run(cases, seed)


def cells(one: Class, tally: Tally) -> list[str]:
    """One row of the table."""
    counts = [str(len(tally.wrong.get(kind, []))) for kind in HEAD_OF]
    seeds = f"{tally.seed}..{tally.seed + PARTS - 1}"
    return [one.words, f"{tally.cases:,}", seeds, *counts, f"{tally.seconds:.0f} s"]


#: What is counted, and what the table calls it.
HEAD_OF = {
    WRONG_BYTES: "wrong bytes",
    LOST: "durable lost",
    BROKEN: "errors",
    LEAKED: "leaks",
    NOT_RUN: "not run",
}
HEADS = ("what", "cases", "seeds", *HEAD_OF.values(), "time")


def show(rows: list[tuple[Class, Tally]]) -> None:
    """The table on the terminal."""
    table = Table(title="tierkv under faults")
    for head in HEADS:
        table.add_column(head)
    for one, tally in rows:
        table.add_row(*cells(one, tally))
    Console(width=120).print(table)


def markdown(rows: list[tuple[Class, Tally]]) -> str:
    """The table as docs/reliability.md holds it."""
    lines = [" | ".join(["", *HEADS, ""]).strip(), "|---" * len(HEADS) + "|"]
    lines += [" | ".join(["", *cells(one, tally), ""]).strip() for one, tally in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
