"""Plant mistakes in a copy of tierkv, one by one, and see that the suite finds each.

    python tools/canaries.py [--only WORDS] [--json FILE]

A suite that finds nothing proves nothing unless it would have found something. Each plant changes a
few words of the product; then one drill (with seeds, until it finds something), or one part of the
tests, has to fail. What it found is shown with the seed and case to have it again. First the same
checks run on an unchanged copy, where they have to pass. Exits 1 where a mistake was not found, or
where a plant does not fit the code any more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
#: Checks that run beside each other.
WORKERS = 2
#: A check that takes longer has hung, which is a find as well.
LIMIT_S = 300


class Drill(NamedTuple):
    """A drill of `tierkv.testing.drills`: so many cases of seed 1, then of seed 2, and on."""

    module: str
    cases: int
    seeds: int = 1

    @property
    def words(self) -> str:
        """How it is called."""
        return f"drill {self.module}"

    def command(self) -> list[str]:
        """Exits 1 and prints the first find if there is one."""
        program = (
            "import importlib, logging, sys\n"
            "logging.disable(logging.CRITICAL)\n"
            f"drill = importlib.import_module('tierkv.testing.drills.{self.module}')\n"
            f"for seed in range(1, {self.seeds + 1}):\n"
            f"    for kind, lines in drill.run({self.cases}, seed).wrong.items():\n"
            "        sys.exit(f'{kind}: {lines[0]}')\n"
        )
        return [sys.executable, "-c", program]


class Tests(NamedTuple):
    """Tests of one file whose names match."""

    file: str
    expression: str

    @property
    def words(self) -> str:
        """How they are called."""
        return self.file

    def command(self) -> list[str]:
        """Exits 1 where one fails."""
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-k", self.expression]
        return [sys.executable, "-m", "pytest", *options, self.file]


class Canary(NamedTuple):
    """A mistake: in which file, which words become which, and what must find it."""

    mistake: str
    file: str
    words: str
    planted: str
    check: Drill | Tests


CANARIES = (
    Canary(
        "a short write is taken for a whole one",
        "tierkv/tiers/files/direct.py",
        "            views = _after(views, moved)\n",
        "            views = _after(views, moved) if move is os.preadv else []\n",
        Tests("tests/test_file_engines.py", "short_transfers"),
    ),
    Canary(
        "a write that failed is ignored",
        "tierkv/tiers/segment_io.py",
        "            self._files.write(segment.handle, start, buffers)\n",
        "            with __import__('contextlib').suppress(OSError):\n"
        "                self._files.write(segment.handle, start, buffers)\n",
        Drill("nth_fault", 3_000),
    ),
    Canary(
        "the checksum is skipped",
        "tierkv/tiers/segment_io.py",
        "        verify_page(header, payload, shape, page=wanted.page, "
        "generation=wanted.generation)\n",
        "        pass\n",
        Drill("crashes", 3_000),
    ),
    Canary(
        "a page is not told from an older one in its slot",
        "tierkv/tiers/segments.py",
        "            expected: list[int] = self._generations[numbers].tolist()\n",
        "            expected: list[int] = [int(g and 1) for g in self._generations[numbers]]\n",
        Drill("crashes", 2_000),
    ),
    Canary(
        "a block is published before its bytes are complete",
        "tierkv/reading.py",
        "            memory.fill(item, rows)\n            done += 1\n"
        "            with runtime.lock:\n"
        "                runtime.handle(ev.Filled(item.ticket, True))\n",
        "            done += 1\n"
        "            with runtime.lock:\n"
        "                runtime.handle(ev.Filled(item.ticket, True))\n"
        "            memory.fill(item, rows)\n",
        Drill("interleavings", 200),
    ),
    Canary(
        "parents are evicted before their children",
        "tierkv/plan/planner.py",
        "        movement.track(tier, reversed(ticket.pages), now_ns)\n",
        "        movement.track(tier, ticket.pages, now_ns)\n",
        Tests("tests/test_planner.py", "eviction"),
    ),
    Canary(
        "children are recovered before their parents",
        "tierkv/plan/recovery.py",
        "    return ready\n",
        "    return ready[::-1]\n",
        Drill("interleavings", 200),
    ),
    Canary(
        "a slot is used again while it is read",
        "tierkv/plan/planner.py",
        "        for span in spans:\n            pins[span.page] += 1\n"
        "        record = LeaseRecord(blocks, (), [(TierId.HOST, span.page) for span in spans], "
        "namespace)\n",
        "        record = LeaseRecord(blocks, (), [], namespace)\n",
        Drill("interleavings", 400, seeds=4),
    ),
    Canary(
        "a slot is used again before the newer copy is durable",
        "tierkv/plan/residency.py",
        "            offsets = [offset for begun, offset in entries if begun < sync]\n",
        "            offsets = [offset for begun, offset in entries if begun <= sync]\n",
        Drill("interleavings", 500, seeds=4),
    ),
    Canary(
        "a lease reads where it has not pinned",
        "tierkv/plan/leases.py",
        "                if at >= 0 and at // table.page_blocks in pages:\n",
        "                if at >= 0:\n",
        Drill("interleavings", 1_000, seeds=10),
    ),
    Canary(
        "an id is taken for the block that had it before",
        "tierkv/plan/radix.py",
        "        return node is not None and node.keys[self._position[block]] == key\n",
        "        return node is not None\n",
        Tests("tests/test_planner.py", "got_its_id"),
    ),
    Canary(
        "a sync syncs nothing",
        "tierkv/tiers/segments.py",
        "                    self._files.sync(self._directory.segments[segment].handle)\n",
        "                    pass\n",
        Drill("crashes", 2_000),
    ),
    Canary(
        "a failed sync is believed by the next",
        "tierkv/tiers/segments.py",
        "                    self._distrust(segment, written, error)\n",
        "                    pass\n",
        Drill("nth_fault", 3_000),
    ),
    Canary(
        "a flush counts what is only on its way",
        "tierkv/store.py",
        "        return is_there\n",
        "        return not runtime.planner.movement.dirty\n",
        Tests("tests/test_store.py", "only_begun"),
    ),
    Canary(
        "a generation is given out twice",
        "tierkv/tiers/segment_directory.py",
        "        epoch = max(manifest.epoch, epoch_seen) + 1\n",
        "        epoch = max(1, manifest.epoch, epoch_seen)\n",
        Tests("tests/test_segments.py", "generation_never or epoch_outlives"),
    ),
    Canary(
        "nobody is woken for a result",
        "tierkv/transfer/engine.py",
        "            del self._batches[transfer.id]\n            self._progress.notify_all()\n",
        "            del self._batches[transfer.id]\n",
        Drill("interleavings", 200),
    ),
    Canary(
        "two namespaces share a root",
        "tierkv/core/keys.py",
        "        if namespace != DEFAULT_NAMESPACE:  # tenants",
        "        if not namespace:  # tenants",
        Drill("layouts", 280),
    ),
)


class Found(NamedTuple):
    """What a check said of a copy."""

    failed: bool
    line: str
    seconds: float


def main() -> int:
    """Plant each and show what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="WORDS", help="mistakes with these words")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args()
    wanted = [one for one in CANARIES if not options.only or options.only in one.mistake]
    if not wanted:
        parser.error(f"no mistake has the words {options.only!r}")
    with ThreadPoolExecutor(WORKERS) as pool:
        healthy = dict(zip(checks := list(dict.fromkeys(one.check for one in wanted)),
                           pool.map(unchanged, checks), strict=True))  # fmt: skip
        found = list(pool.map(planted, wanted))
    show(wanted, found)
    if options.json:
        rows = [one._asdict() | {"check": one.check.words} | result._asdict()
                for one, result in zip(wanted, found, strict=True)]  # fmt: skip
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    wrong = [f"{check.words} fails without a plant: {result.line}"
             for check, result in healthy.items() if result.failed]  # fmt: skip
    wrong += [f"not found: {one.mistake}"
              for one, result in zip(wanted, found, strict=True) if not result.failed]  # fmt: skip
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    return 1 if wrong else 0


def unchanged(check: Drill | Tests) -> Found:
    """A check on a copy as it is."""
    with copied() as root:
        return run(check, root)


def planted(one: Canary) -> Found:
    """A mistake's check on a copy with the mistake."""
    with copied() as root:
        file = root / one.file
        text = file.read_text()
        if text.count(one.words) != 1:
            sys.exit(f"{one.mistake}: its place is {text.count(one.words)} times in {one.file}")
        file.write_text(text.replace(one.words, one.planted))
        return run(one.check, root)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the product and its tests."""
    with tempfile.TemporaryDirectory(prefix="tierkv-canary-") as place:
        root = Path(place)
        for name in ("tierkv", "tests", "tools", "configs"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        yield root


def run(check: Drill | Tests, root: Path) -> Found:
    """A check in a process of its own, on this copy."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    try:
        done = subprocess.run(
            check.command(), cwd=root, env=environment, capture_output=True, text=True,
            check=False, timeout=LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Found(True, f"hangs for {LIMIT_S} s", time.monotonic() - begun)
    words = done.stderr if isinstance(check, Drill) else done.stdout
    lines = [line for line in words.splitlines() if line.strip()]
    failed = [line for line in lines if re.match(r"FAILED|E  ", line)] or lines[-1:]
    return Found(done.returncode == 1, (failed or [""])[0], time.monotonic() - begun)


def show(canaries: list[Canary], found: list[Found]) -> None:
    """The table on the terminal."""
    table = Table(title="planted mistakes")
    for head in ("mistake", "checked by", "found", "first find", "time"):
        table.add_column(head)
    for one, result in zip(canaries, found, strict=True):
        answer = "yes" if result.failed else "NO"
        seconds = f"{result.seconds:.0f} s"
        table.add_row(one.mistake, one.check.words, answer, result.line[:120], seconds)
    Console(width=160).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
