"""Change one word of the planner or of a tier at a time, and see whether the tests notice.

    python tools/mutation.py [--sample N] [--seed N] [--only WORDS] [--again FILE] [--json FILE]
                             [--check]

The mutants are mutmut's. A seed draws a sample of all there are, half of it of *meanings*
(operators, numbers, conditions, words) and half of *values* (an argument, or what is assigned,
becomes None or is not there): most of all are values, which are easier to notice. For each mutant
the tests that matter for its module run, in a copy of the repository. One that no test fails for
is a *survivor*, and is shown with its place. First the same tests run on an unchanged copy, where
they have to pass. `--again` runs the survivors of an earlier `--json` once more; `--check` exits 1
where too few were killed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
REACH_PERCENT = 85.0
#: Mutants that are tried beside each other, each in its own copy.
WORKERS = 2
#: A mutant may take so many times as long as the unchanged code, and so many seconds more.
LIMIT_FACTOR, LIMIT_EXTRA_S = 3, 15

#: Mutators of values; the others are of meanings.
VALUES = ("arg_removal", "assignment", "dict_arguments")

#: Which tests matter for which module, the longest name that fits counts. What stands before the
#: bar is quick and runs first: the rest need not be collected where it finds the mutant.
TESTS = {
    "tierkv/plan/": "plan_tables planner_moments planner_policies planner radix policies | "
    "zero_freed store store_edges store_staged",
    "tierkv/tiers/accelerator.py": "accelerator unified | driver host_arena slab",
    "tierkv/tiers/device.py": "memory_tiers slab tier_edges | store_staged zero_freed layers",
    "tierkv/tiers/slab.py": "slab | memory_tiers",
    "tierkv/tiers/host.py": "memory_tiers host_arena tier_edges | zero_freed unified store",
    "tierkv/tiers/numa.py": "host_arena tier_edges | unified accelerator doctor",
    "tierkv/tiers/unified.py": "unified | accelerator",
    "tierkv/tiers/files/": "file_engines tier_edges | segments seal",
    "tierkv/tiers/files/gds.py": "gds | file_engines",
    "tierkv/tiers/seals/": "seal tier_edges | scrub seal_store",
    "tierkv/tiers/": "segment_format segments tier_edges | seal scan golden scrub zero_freed",
}

#: What is no mutant, as it cannot change what the code does; printed with the result.
LEFT_OUT = """\
annotations, imports, type variables and what only a type checker reads
docstrings, texts of errors, asserts and logs, and names of threads
decorators and class options that only forbid (frozen, slots, gc), and zip's strict
changes after which the syntax tree is the same, or none"""
_FORBIDDING = {"frozen", "slots", "gc", "kw_only", "order"}

#: Loaded by every pytest that runs a mutant: a failure need not be made small, only seen, and code
#: that goes mad must not take the machine's memory or disk.
PLUGIN = """\
import resource
import signal

import hypothesis

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))


def pytest_configure(config):
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    parent = hypothesis.settings.default
    hypothesis.settings.register_profile(
        "mutation", parent, phases=phases, derandomize=True, report_multiple_bugs=False
    )
    hypothesis.settings.load_profile("mutation")
"""


Group: TypeAlias = tuple[str, ...]
Suite: TypeAlias = tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file."""

    file: str
    line: int
    kind: str
    text: str  # the whole changed file
    diff: str


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a mutant."""

    file: str
    line: int
    kind: str
    diff: str
    killed: bool
    how: str
    seconds: float


def main() -> int:
    """Try a sample of mutants and show who survived."""
    options = parse()
    root = options.root
    names = {
        path.relative_to(root).as_posix()
        for start in options.tests
        for path in ([root / start] if start.endswith(".py") else (root / start).rglob("*.py"))
    }
    files = sorted(name for name in names if options.only in name)
    mutants, count = drawn(root, files, options)
    suites = {one.file: tests_of(one.file, options.tests) for one in mutants}
    with ThreadPoolExecutor(WORKERS) as pool, copies(root, WORKERS) as roots:
        groups = list(dict.fromkeys(group for suite in suites.values() for group in suite))
        healthy = list(pool.map(lambda group: unchanged(group, roots), groups))
        sick = [how for how, _ in healthy if how]
        if sick:
            sys.exit("\n".join(f"unchanged code fails: {how}" for how in sick))
        limits = {
            group: LIMIT_FACTOR * seconds + LIMIT_EXTRA_S
            for group, (_, seconds) in zip(groups, healthy, strict=True)
        }
        results = list(pool.map(lambda one: tried(one, suites[one.file], limits, roots), mutants))
    show(results, count, options.seed)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=2) + "\n")
    killed = percent(results)
    return 1 if options.check and killed < REACH_PERCENT else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300, metavar="N", help="so many mutants")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--only", metavar="WORDS", default="", help="files with these words")
    parser.add_argument("--again", type=Path, metavar="FILE", help="survivors of this --json")
    parser.add_argument("--json", type=Path, help="write what became of each to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where the reach is missed")
    parser.add_argument("--root", type=Path, default=ROOT, help="another repository")
    parser.add_argument("--tests", type=json.loads, default=TESTS, help="its table, as JSON")
    options = parser.parse_args()
    options.root = options.root.resolve()
    return options


# ---- mutants


def drawn(
    root: Path, files: Sequence[str], options: argparse.Namespace
) -> tuple[list[Mutant], int]:
    """The mutants to try, in order of files and lines, and how many there are to draw from."""
    places = [place for file in files for place in Places(root, file).found]
    order = list(range(len(places)))
    random.Random(options.seed).shuffle(order)
    left = {True: options.sample // 2, False: options.sample - options.sample // 2}
    wanted = None
    if options.again:
        old = json.loads(options.again.read_text())
        wanted = {(one["file"], one["diff"]) for one in old if not one["killed"]}
    chosen: list[tuple[int, Mutant]] = []
    for number in order:
        is_value = places[number].kind in VALUES
        if wanted is None and not left[is_value]:
            continue
        mutant = places[number].mutant()
        if mutant and (wanted is None or (mutant.file, mutant.diff) in wanted):
            chosen.append((number, mutant))
            left[is_value] -= 1
    return [mutant for _, mutant in sorted(chosen, key=lambda one: one[0])], len(places)


class Place:
    """A node of a file and what it may become."""

    def __init__(
        self, places: Places, line: int, kind: str, node: cst.CSTNode, other: cst.CSTNode
    ) -> None:
        self.places, self.line, self.kind = places, line, kind
        self.node, self.other = node, other

    def mutant(self) -> Mutant | None:
        """The changed file; None where that is the same code, or none."""
        before = self.places.text
        changed = self.places.module.deep_replace(self.node, self.other)
        assert isinstance(changed, cst.Module)
        text = changed.code
        try:
            if ast.dump(ast.parse(text)) == ast.dump(ast.parse(before)):
                return None
        except SyntaxError:
            return None
        lines = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
        diff = "\n".join(line for line in lines if not re.match(r"---|\+\+\+|@@", line))
        return Mutant(self.places.file, self.line, self.kind, text, diff)


class Places(cst.CSTVisitor):
    """Every node of a file that may become another."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, root: Path, file: str) -> None:
        super().__init__()
        self.file = file
        self.text = (root / file).read_text(encoding="utf-8")
        wrapper = MetadataWrapper(cst.parse_module(self.text))
        self.module = wrapper.module
        self.found: list[Place] = []
        self._saying: list[cst.CSTNode] = []  # the raise or assert around a node
        wrapper.visit(self)

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Note what a node may become; False to leave out what is below it."""
        if isinstance(node, cst.Raise | cst.Assert) or _is_error(node):
            self._saying.append(node)
        if _is_left_out(node) or (self._saying and _is_text(node)):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                name = operator.__name__.removeprefix("operator_")
                line = self.get_metadata(PositionProvider, node, None)
                for other in operator(node):
                    if not _drops_what_is_left_out(node, other, bool(self._saying)):
                        number = line.start.line if line else 1
                        self.found.append(Place(self, number, name, node, other))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        """Leave a raise or an assert."""
        if self._saying and self._saying[-1] is original_node:
            self._saying.pop()


def _is_left_out(node: cst.CSTNode) -> bool:
    """See `LEFT_OUT`."""
    if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom):
        return True
    if isinstance(node, cst.Expr):
        return isinstance(node.value, cst.SimpleString | cst.ConcatenatedString)
    if isinstance(node, cst.If):
        return isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING"
    if isinstance(node, cst.Arg):
        name = node.keyword.value if node.keyword else ""
        is_thread = name == "name" and "tierkv-" in cst.Module([]).code_for_node(node)
        return is_thread or name in _FORBIDDING or name == "strict"
    if isinstance(node, cst.Assign | cst.AnnAssign):
        words = cst.Module([]).code_for_node(node)
        return re.match(r"__\w+__ =|\w+: TypeAlias|\w+ = TypeVar", words) is not None
    if isinstance(node, cst.Call):
        return re.match(r"logger\.|cast\(", cst.Module([]).code_for_node(node)) is not None
    return False


def _is_error(node: cst.CSTNode) -> bool:
    """Whether a call makes an error to be raised, or is told how to name what it may raise."""
    if not (isinstance(node, cst.Call) and isinstance(node.func, cst.Name)):
        return False
    name = node.func.value
    makes = re.search("(Error|Failed|Full|Data|Mismatch|Closed)$", name)
    return (makes or re.match(r"expect|checked|tier_errors|_as_os_error", name)) is not None


def _is_text(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleString | cst.FormattedString | cst.ConcatenatedString)


def _drops_what_is_left_out(node: cst.CSTNode, other: cst.CSTNode, is_said: bool) -> bool:
    """Whether a call became one without an argument that is left out, or that is said only."""
    if not (isinstance(node, cst.Call) and isinstance(other, cst.Call)):
        return False
    kept = {id(arg) for arg in other.args}
    gone = [arg for arg in node.args if id(arg) not in kept]
    return any(_is_left_out(arg) or (is_said and _is_text(arg.value)) for arg in gone)


# ---- running


def tests_of(file: str, table: Mapping[str, str]) -> Suite:
    """The tests that matter for a module, in groups that run one after the other."""
    words = table[max((name for name in table if file.startswith(name)), key=len)]
    return tuple(
        tuple(f"tests/test_{test}.py" for test in group.split()) for group in words.split("|")
    )


@contextmanager
def copies(root: Path, count: int) -> Iterator[queue.Queue[Path]]:
    """So many copies of a repository, to be taken and put back."""
    roots: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="tierkv-mutation-") as place:
        for number in range(count):
            copy = Path(place) / str(number) / "repository"
            ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
            shutil.copytree(root, copy, ignore=ignored)
            (copy / "mutation_plugin.py").write_text(PLUGIN)
            roots.put(copy)
        yield roots


def unchanged(group: Group, roots: queue.Queue[Path]) -> tuple[str, float]:
    """What fails of some tests on unchanged code, and how long they take."""
    copy = roots.get()
    begun = time.monotonic()
    try:
        return run(copy, group, None), time.monotonic() - begun
    finally:
        roots.put(copy)


def tried(
    mutant: Mutant, suite: Suite, limits: Mapping[Group, float], roots: queue.Queue[Path]
) -> Result:
    """Run the tests on a copy with the mutant in it, until some fail."""
    copy = roots.get()
    file = copy / mutant.file
    before = file.read_text(encoding="utf-8")
    begun = time.monotonic()
    try:
        for stale in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            stale.unlink()  # compiled from a text of the same second and size, it would be believed
        file.write_text(mutant.text, encoding="utf-8")
        how = next(filter(None, (run(copy, group, limits[group]) for group in suite)), "")
    finally:
        file.write_text(before, encoding="utf-8")
        roots.put(copy)
    sys.stderr.write("." if how else f"\n{mutant.file}:{mutant.line} survived\n")
    sys.stderr.flush()
    seconds = time.monotonic() - begun
    return Result(mutant.file, mutant.line, mutant.kind, mutant.diff, bool(how), how, seconds)


def run(copy: Path, group: Group, limit_s: float | None) -> str:
    """Run some tests of a copy in a process of their own; gives how they failed, or nothing."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "CI": "1"}
    if limit_s is not None:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no"]
    command += ["-p", "no:cacheprovider", "-p", "mutation_plugin"]
    command += [f"--basetemp={copy.parent}/basetemp", *group]
    with subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"no end within {limit_s:.0f} s"
    if process.returncode in (4, 5):
        raise RuntimeError(f"pytest {' '.join(group)} could not run:\n{said}")
    lines = [line for line in said.splitlines() if re.match("FAILED|ERROR", line)]
    lines += [f"pytest exited {process.returncode}"]
    return lines[0] if process.returncode else ""


# ---- showing


def percent(results: Sequence[Result]) -> float:
    """How many of a hundred were killed."""
    return 100.0 * sum(one.killed for one in results) / len(results) if results else 100.0


def show(results: Sequence[Result], count: int, seed: int) -> None:
    """The table on the terminal, then every survivor."""
    table = Table(title=f"{len(results):,} of {count:,} mutants, seed {seed}")
    for head in ("file", "killed", "survived"):
        table.add_column(head)
    killed = Counter(one.file for one in results if one.killed)
    survived = Counter(one.file for one in results if not one.killed)
    for file in sorted(killed | survived):
        table.add_row(file, str(killed[file]), str(survived[file]))
    for words, is_value in (("values", True), ("meanings", False)):
        some = [one for one in results if (one.kind in VALUES) == is_value]
        row = f"{sum(one.killed for one in some)} ({percent(some):.1f} %)"
        table.add_row(words, row, str(sum(not one.killed for one in some)))
    table.add_row("all", f"{killed.total()} ({percent(results):.1f} %)", str(survived.total()))
    console = Console(width=120)
    console.print(table)
    for one in results:
        if not one.killed:
            console.print(f"{one.file}:{one.line}: {one.kind}\n{one.diff}\n", markup=False)
    console.print(f"left out:\n{LEFT_OUT}", markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
