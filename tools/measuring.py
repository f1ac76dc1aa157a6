"""Measuring against a baseline: pairs of adjacent runs, medians, a table, an exit status.

Needs numpy only, until something is shown.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """One line of the table; without a `reach` it is there to be known."""

    what: str
    value: float
    reach: float | None
    higher_is_better: bool = True
    unit: str = "x raw"
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the reach is met."""
        if self.reach is None:
            return True
        return self.value >= self.reach if self.higher_is_better else self.value <= self.reach


class Pairs:
    """Times of ours and raw, batch by batch, in alternating order."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.raw: list[float] = []
        self.ours_cpu = 0.0
        self.raw_cpu = 0.0

    def time(self, ours: Callable[[], object], raw: Callable[[], object]) -> None:
        """Run both once."""
        for run in (ours, raw) if len(self.ours) % 2 else (raw, ours):
            cpu, start = time.process_time(), time.perf_counter()
            run()
            wall, used = time.perf_counter() - start, time.process_time() - cpu
            if run is ours:
                self.ours.append(wall)
                self.ours_cpu += used
            else:
                self.raw.append(wall)
                self.raw_cpu += used

    @property
    def ratio(self) -> float:
        """Raw / ours, median over batches."""
        return float(np.median(np.array(self.raw) / np.array(self.ours)))

    @property
    def cpu(self) -> float:
        """Ours / raw, in CPU seconds over all batches."""
        return self.ours_cpu / max(self.raw_cpu, 1e-9)


def best_of(run: Callable[[], object], times: int) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def copy_each(target: Bytes, source: Bytes, count: int) -> None:
    """Copy `count` blocks, one call each."""
    for n in range(count):
        np.copyto(target[n], source[n])


def aligned(size_bytes: int) -> Bytes:
    """Touched memory on page boundaries, on huge pages where the system gives them."""
    area = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(area, np.uint8)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(size_bytes), 14)
    array[:] = 7
    return array


class RawFiles:
    """One file per chunk of 2 MiB, O_DIRECT, 4 threads."""

    def __init__(self, root: Path, count: int) -> None:
        root.mkdir(parents=True)
        self._paths = [root / f"{n}" for n in range(count)]
        self._pool = ThreadPoolExecutor(4)

    def write(self, numbers: range, chunks: Bytes) -> None:
        """Write and fsync each file."""

        def one(item: tuple[int, int]) -> None:
            number, row = item
            handle = os.open(self._paths[number], os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
            assert os.pwritev(handle, [chunks[row]], 0) == chunks[row].nbytes
            os.fsync(handle)
            os.close(handle)

        list(self._pool.map(one, [(number, row) for row, number in enumerate(numbers)]))

    def read(self, numbers: range, chunks: Bytes) -> None:
        """Read each file."""

        def one(item: tuple[int, int]) -> None:
            number, row = item
            handle = os.open(self._paths[number], os.O_RDONLY | os.O_DIRECT)
            assert os.preadv(handle, [chunks[row]], 0) == chunks[row].nbytes
            os.close(handle)

        list(self._pool.map(one, [(number, row) for row, number in enumerate(numbers)]))


def scratch(directory: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A directory of its own on a disk (not on tmpfs), removed afterwards."""
    place = directory or Path.cwd()
    place.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=place, prefix=".bench-")


def options_of(description: str, rows: str) -> argparse.ArgumentParser:
    """A parser for what every benchmark takes; `rows` are the names of all its rows.

    `rows` of what it parses is a list of names.
    """

    def chosen(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(rows.split(",")))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {rows}")
        return names

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a tenth of the bytes, more noise")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a reach is missed")
    parser.add_argument("--rows", type=chosen, default=rows, help="which ones (default: all)")
    parser.add_argument("--directory", type=Path, help="where the disk rows write (default: .)")
    return parser


def report(rows: list[Row], options: argparse.Namespace, title: str) -> int:
    """Show the rows, write them where `--json` says; the status to exit with."""
    show(rows, title)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"holds": row.holds} for row in rows]))
    missed = [row.what for row in rows if not row.holds]
    if options.check and missed:
        sys.stderr.write(f"missed: {'; '.join(missed)}\n")
        return 1
    return 0


def show(rows: list[Row], title: str = "against raw in the same run") -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("what", "value", "reach", "", "note"):
        table.add_column(column, justify="left" if column in ("what", "note") else "right")
    for row in rows:
        sign = ">=" if row.higher_is_better else "<="
        mark = "[green]ok[/]" if row.holds else "[red]miss[/]"
        reach = "" if row.reach is None else f"{sign} {row.reach:g}"
        mark = mark if reach else ""
        table.add_row(row.what, f"{row.value:.3g} {row.unit}", reach, mark, row.note)
    Console(width=120).print(table)
