"""Branch coverage of what moves and keeps blocks: the planner, the tiers, the lanes, the store.

    python tools/branch_coverage.py [--json FILE] [--check] [-- PYTEST ARGUMENTS]

Runs the tests under coverage.py in a temporary copy, with threads and the processes that tests
start. A file's figure is the lower of its lines and its branches. Nothing is left out of it: what
needs a device is counted as missed, and listed with its reason below the table, with the figure
that the rest alone would have. `--check` exits 1 where a package is below the reach, naming its
files that are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from canaries import copied
from coverage import Coverage
from rich.console import Console
from rich.table import Table

REACH_PERCENT = 95.0

#: What is measured: a package's name, and the beginnings of its files' names.
PACKAGES = {
    "plan": ("tierkv/plan/",),
    "tiers": ("tierkv/tiers/",),
    "transfer": ("tierkv/transfer/",),
    "store": (
        "tierkv/store.py",
        "tierkv/runtime.py",
        "tierkv/reading.py",
        "tierkv/memory.py",
        "tierkv/assembly.py",
    ),
}

#: Tests that reach none of these files, or only as others do: kernels, codecs, texts, tools.
OF_OTHER_THINGS = (
    "bench_reliability", "codecs", "demo", "geometry", "gpu_check", "kv_buffer", "models",
    "mutation_tool", "prefill_cost", "readme", "relayout", "streaming", "tidy",
    "transformers_cache", "triton_pages", "units",
)  # fmt: skip
#: Tests that draw many cases of what others do once, and take minutes: they add hardly a line.
#: Two cannot run here at all. The drill of interleavings holds every thread but one, and a lock of
#: coverage.py's may be held with it; in the drill of processes the n-th allocation fails, and
#: coverage.py makes some of its own.
DRILLS = (
    "drill_command", "drill_flips", "drill_hostile", "drill_interleavings", "drill_layouts",
    "drill_processes", "drills", "seal_store", "six_faults", "store_machine",
)  # fmt: skip

#: What cannot run without a device: file, function, and who runs it.
NEEDS_DEVICE = (
    ("tierkv/tiers/slab.py", "allocate_slab", "CuPy's memory; tools/gpu_check.py"),
    ("tierkv/tiers/slab.py", "export_slab", "a handle of CUDA's; tools/gpu_check.py"),
    ("tierkv/tiers/device.py", "DeviceTier._in_order", "torch's streams; tools/gpu_check.py"),
    ("tierkv/transfer/streams.py", "CudaStreams.encode", "Triton on a device; tools/gpu_check.py"),
    ("tierkv/transfer/streams.py", "CudaStreams.decode", "Triton on a device; tools/gpu_check.py"),
    ("tierkv/transfer/streams.py", "CudaStreams._current", "torch's streams; tools/gpu_check.py"),
    (
        "tierkv/assembly.py",
        "_staging",
        "a ring on a card; rings on recorded streams are in tests/test_staging.py and others",
    ),
)


class File(NamedTuple):
    """What was run of one file."""

    name: str
    lines: int
    lines_run: int
    branches: int
    branches_run: int
    missed: str
    on_device: tuple[int, int, int, int]  # of these, what needs one

    @property
    def percent(self) -> float:
        """The lower of lines and branches."""
        return _lower(self[1:5])

    @property
    def rest(self) -> float:
        """As `percent`, of what needs no device."""
        return _lower([a - b for a, b in zip(self[1:5], self.on_device, strict=True)])


def main() -> int:
    """Run the tests, show what they ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where the reach is missed")
    parser.add_argument("arguments", nargs="*", metavar="PYTEST ARGUMENT")
    options = parser.parse_args()
    with copied() as root, tempfile.TemporaryDirectory(prefix="tierkv-coverage-") as place:
        code = run_tests(root, Path(place), options.arguments)
        found = read(root, Path(place))
    show(found)
    if options.json:
        rows = {package: [one._asdict() for one in files] for package, files in found.items()}
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if code:
        sys.stderr.write(f"the tests failed: pytest exited {code}\n")
        return 1
    short = below(found)
    for line in short:
        sys.stderr.write(f"below {REACH_PERCENT:g} %: {line}\n")
    return 1 if options.check and short else 0


def run_tests(root: Path, place: Path, arguments: list[str]) -> int:
    """Run the tests of a copy under coverage; data files go to `place`. Gives pytest's status."""
    place.chmod(0o777)  # processes of other users write there too
    settings = place / "coveragerc"
    settings.write_text(
        "[run]\n"
        "branch = true\n"
        "parallel = true\n"
        "concurrency = thread\n"
        "patch =\n    subprocess\n    _exit\n    fork\n"
        f"data_file = {place}/data\n"
        f"source = {root}/tierkv\n"
        "disable_warnings = no-data-collected, module-not-imported, module-not-measured\n"
    )
    tests = [
        str(path.relative_to(root))
        for path in sorted((root / "tests").glob("test_*.py"))
        if path.stem.removeprefix("test_") not in (*OF_OTHER_THINGS, *DRILLS)
    ]
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
    command += ["-q", "-n", "2", "-p", "no:cacheprovider", *(arguments or tests)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CI": "1"}
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


def read(root: Path, place: Path) -> dict[str, list[File]]:
    """What the data files say, by package."""
    coverage = Coverage(config_file=str(place / "coveragerc"))
    coverage.combine()
    report = place / "report.json"
    coverage.json_report(outfile=str(report))
    files = {
        Path(name).resolve().relative_to(root.resolve()).as_posix(): figures
        for name, figures in json.loads(report.read_text())["files"].items()
    }
    return {
        package: [_file(name, files[name]) for name in sorted(files) if name.startswith(starts)]
        for package, starts in PACKAGES.items()
    }


def _file(name: str, figures: dict[str, Any]) -> File:
    lines, branches = figures["missing_lines"], figures["missing_branches"]
    jumps = [f"{a}→{b if b > 0 else 'end'}" for a, b in branches if not {a, b} & set(lines)]
    on_device = [
        _counts(figures["functions"][function])
        for file, function, _ in NEEDS_DEVICE
        if file == name
    ]
    sums = [sum(column) for column in zip((0, 0, 0, 0), *on_device, strict=True)]
    missed = " ".join([*_ranges(lines), *jumps])
    return File(name, *_counts(figures), missed, (sums[0], sums[1], sums[2], sums[3]))


def _counts(figures: dict[str, Any]) -> tuple[int, int, int, int]:
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    lines, lines_run, branches, branches_run = (int(figures["summary"][name]) for name in names)
    return lines, lines_run, branches, branches_run


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Line numbers, neighbours joined."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [f"{first}-{last}" if last > first else str(first) for first, last in found]


def _lower(counts: Sequence[Any]) -> float:
    lines, lines_run, branches, branches_run = counts
    return min(_percent(lines_run, lines), _percent(branches_run, branches))


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 100.0


def whole(package: str, files: list[File]) -> File:
    """A package's files as one."""
    sums = [sum(column) for column in zip(*(one[1:5] for one in files), strict=True)]
    device = [sum(column) for column in zip(*(one.on_device for one in files), strict=True)]
    on_device = (device[0], device[1], device[2], device[3])
    return File(package, sums[0], sums[1], sums[2], sums[3], "", on_device)


def below(found: dict[str, list[File]]) -> list[str]:
    """Packages below the reach, each with its files that are."""
    lines = []
    for package, files in found.items():
        figure = whole(package, files).percent
        if figure < REACH_PERCENT:
            names = [
                f"{one.name} {one.percent:.1f}" for one in files if one.percent < REACH_PERCENT
            ]
            lines.append(f"{package} {figure:.1f}: {', '.join(names)}")
    return lines


def show(found: dict[str, list[File]]) -> None:
    """The table on the terminal, and what needs a device."""
    table = Table(title="lines and branches that the tests run")
    for head in ("file", "lines", "run", "branches", "run", "missed: lines, and jumps between"):
        table.add_column(head)
    for package, files in found.items():
        for one in [whole(package, files), *files]:
            table.add_row(
                f"[b]{one.name}[/b]" if one.name == package else f"  {one.name}",
                f"{one.lines:,}", f"{_percent(one.lines_run, one.lines):.1f} %",
                f"{one.branches:,}", f"{_percent(one.branches_run, one.branches):.1f} %",
                one.missed,
            )  # fmt: skip
    console = Console(width=160)
    console.print(table)
    for file, function, why in NEEDS_DEVICE:
        console.print(f"needs a device: {file}: {function}: {why}", markup=False)
    for package, files in found.items():
        one = whole(package, files)
        console.print(
            f"{package}: {one.percent:.1f} %, {one.rest:.1f} % without those", markup=False
        )


if __name__ == "__main__":
    raise SystemExit(main())
