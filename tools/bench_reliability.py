"""What reliability costs: verifying, recovering, scrubbing, writing behind.

    python tools/bench_reliability.py [--quick] [--json FILE] [--check]
                                      [--rows verify,recovery,reclaim] [--directory DIR]

`verify`: cold reads through the store, over the same reads with verification taken out; medians of
adjacent reads whose order alternates. `recovery`: opening a cold tier of 16 GiB, whose payloads are
holes but for those that a start reads. `reclaim`: the 99th percentile of cold reads while something
else goes on, over the same without it, in windows that take turns; a ratio a round, and the median
of these. Writing behind is held against the same puts into a store without a cold tier: the copies
that a put makes are not reclaim, and take a core from the readers too.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self, TypeAlias
from unittest.mock import patch

import numpy as np
import psutil
from bench_store import LLAMA_8B, config_of, keys_of, layout_of, open_store, rows_array
from measuring import Pairs, Row, options_of, report, scratch

from tierkv.assembly import assemble
from tierkv.config import Config
from tierkv.core.geometry import GIB, MIB, Layout
from tierkv.core.keys import BlockKey
from tierkv.core.transfer import Urgency
from tierkv.store import Store
from tierkv.tiers import segment_io
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.files.direct import DirectFiles
from tierkv.transfer.lane import Job, Lane

#: Blocks of a chain: a cold page of 64 MiB.
CHAIN: Final = 32
SLOT_BYTES: Final = 2 * MIB + 8192
#: What `tierkv scrub` reads in a second unless told otherwise.
SCRUB_RATE: Final = 100e6
#: 2,000 tokens a second of Llama-3-8B.
PUT_RATE: Final = 256e6
#: How long a condition has its turn, twice that for large reads: a whole number of puts.
WINDOW_S: Final = 2 * 64 * MIB / PUT_RATE


def main() -> int:
    """Run the chosen rows; see the module."""
    options = options_of(__doc__.splitlines()[0], "verify,recovery,reclaim").parse_args()
    layout = layout_of(LLAMA_8B, 16)
    rows: list[Row] = []
    for name, measure in (
        ("verify", verify_rows),
        ("recovery", recovery_rows),
        ("reclaim", reclaim_rows),
    ):
        if name in options.rows:
            with scratch(options.directory) as place:
                rows += measure(layout, Path(place), 0.1 if options.quick else 1.0)
    return report(rows, options, "what reliability costs")


# ---- verifying


def verify_rows(layout: Layout, place: Path, scale: float) -> list[Row]:
    """Cold reads of 16 pages of 2 MiB and of cold pages of 64 MiB, with and without verifying."""
    count = max(8, int(24 * scale))
    rows: list[Row] = []
    config = config_of(layout, host=256 * MIB, cold=count * CHAIN * SLOT_BYTES, directory=place)
    with Store.open(config, layout) as store:
        chains = fill(store, layout, range(count))
        for batch, name in ((16, "2 MiB pages (batches of 16)"), (CHAIN, "64 MiB pages")):
            pairs = Pairs()
            parts = parts_of(chains, batch)
            for turn in range(max(1, int(16 * scale))):
                # Each turn pairs other parts, and none of them is in memory when it comes again.
                order = parts[turn:] + parts[:turn]
                for one, other in zip(order[::2], order[1::2], strict=False):
                    pairs.time(partial(read, store, one), partial(read_unverified, store, other))
            speed = batch * 2 * MIB / np.median(pairs.raw) / 1e9
            note = f"{len(pairs.ours)} pairs, {speed:.1f} GB/s unverified"
            what, unit = f"cold get, verified, {name}", "x unverified"
            rows.append(Row(what, pairs.ratio, 0.95, unit=unit, note=note))
            rows.append(Row(f"{what}, CPU", pairs.cpu, None, higher_is_better=False, unit=unit))
    return rows


@dataclass(frozen=True)
class Part:
    """Some blocks of a stored chain."""

    keys: list[BlockKey]
    first: int


def parts_of(chains: list[list[BlockKey]], batch: int) -> list[Part]:
    """All parts of `batch` blocks, in an order of their own."""
    parts = [Part(c[: first + batch], first) for c in chains for first in range(0, CHAIN, batch)]
    return [parts[int(n)] for n in np.random.default_rng(batch).permutation(len(parts))]


def fill(store: Store, layout: Layout, numbers: range) -> list[list[BlockKey]]:
    """Put chains of 64 MiB and make them durable."""
    _, source = rows_array(layout, CHAIN)
    source[:] = np.random.default_rng(0).integers(0, 256, source.shape, dtype=np.uint8)
    chains = [keys_of(store, number, CHAIN) for number in numbers]
    for keys in chains:
        assert store.put_keys(keys, source) == CHAIN
        assert store.flush()
    return chains


def read(store: Store, part: Part) -> None:
    """Bring the blocks of a part into pinned host memory."""
    match = store.match_keys(part.keys)
    with store.lease(match, first_block=part.first) as lease:
        assert lease.blocks == len(part.keys) - part.first


class AtOnce(Lane):
    """A lane without threads: what is given to it is done there and then."""

    def __init__(self) -> None:
        super().__init__("none", threads=0, inflight_bytes_max=0)

    def submit(self, jobs: list[Job], urgency: Urgency) -> None:
        """Run the jobs."""
        del urgency
        for job in jobs:
            job.run()


def read_unverified(store: Store, part: Part) -> None:
    """As `read`, but believe what the disk gives: no checksums, and no lane to make them on."""
    lanes = store._runtime.engine._lanes
    with (
        patch.object(segment_io, "verify_page", lambda *_, **__: None),
        patch.dict(lanes, check=AtOnce()),
    ):
        read(store, part)


# ---- recovering


class Holes(DirectFiles):
    """Files whose payloads, while `is_sparse`, stay holes that read as the zeros they were."""

    is_sparse = True

    def preallocate(self, handle: int, size_bytes: int) -> None:
        """Make the file that long, and reserve nothing."""
        if self.size(handle) < size_bytes:
            os.ftruncate(self._fd(handle), size_bytes)

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all but payloads of zeros."""
        for buffer in buffers:
            if not self.is_sparse or len(buffer) < 2 * MIB:
                super().write(handle, offset, [buffer])
            offset += len(buffer)


def recovery_rows(layout: Layout, place: Path, scale: float) -> list[Row]:
    """Opening a full tier of 16 GiB after a clean stop, and after a crash."""
    pages = int(8192 * scale) // CHAIN * CHAIN
    config = config_of(layout, host=128 * MIB, cold=pages * SLOT_BYTES, directory=place)
    write_holes(config, layout, pages)
    rows: list[Row] = []
    for how in ("a clean stop", "a crash"):
        tiers: list[float] = []
        whole: list[float] = []
        for _ in range(3):
            if how == "a crash":
                crash(config, layout)
            for file in place.rglob("segment-*"):
                drop_cache(file)
            tiers_s, whole_s = opening(config, layout, pages)
            tiers.append(tiers_s)
            whole.append(whole_s)
        size = pages * layout.pages.warm_page_bytes / GIB
        planner = np.median(np.array(whole) - np.array(tiers))
        note = f"{pages} pages, the planner {planner:.2f} s of it"
        what = f"opening {size:.3g} GiB after {how}"
        rows.append(Row(what, float(np.median(whole)), 1.0, False, "s", note))
    return rows


def opening(config: Config, layout: Layout, pages: int) -> tuple[float, float]:
    """Seconds to opened tiers, and to a store that knows all pages; then it is closed."""
    gc.collect()  # what an earlier store left behind
    start = time.perf_counter()
    parts = assemble(config, layout)
    tiers = time.perf_counter() - start
    with Store(config, layout, parts) as store:
        whole = time.perf_counter() - start
        assert store.snapshot()["tiers"]["cold,blocks"] == pages
    return tiers, whole


def write_holes(config: Config, layout: Layout, pages: int) -> None:
    """Put chains of zeros whose payloads are not written, and at the end what a start reads."""
    files: list[Holes] = []

    def holes(root: Path) -> Holes:
        files.append(Holes(root))
        return files[0]

    _, source = rows_array(layout, CHAIN)
    newest = pages - config.transfer.inflight_max // layout.pages.warm_page_bytes
    with Store.open(config, layout, files_for=holes) as store:
        for number in range(pages // CHAIN):
            files[0].is_sparse = number * CHAIN < newest
            source[:] = 0 if files[0].is_sparse else 7
            assert store.put_keys(keys_of(store, number, CHAIN), source) == CHAIN
            assert store.flush()


def crash(config: Config, layout: Layout) -> None:
    """Open the tier and leave it as a killed process does."""
    parts = assemble(config, layout)
    parts.engine.close()
    assert parts.files is not None
    parts.files.shutdown()
    parts.cold = parts.files = None
    parts.close()


def drop_cache(file: Path) -> None:
    """Have nothing of a file in the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


# ---- reclaiming

Condition: TypeAlias = Callable[[], AbstractContextManager[object]]


def reclaim_rows(layout: Layout, place: Path, scale: float) -> list[Row]:
    """The 99th percentile of cold reads beside a scrub, and beside writing behind and evicting."""
    rounds, windows, count = (8, 5, 16) if scale == 1 else (1, 2, 6)
    host, cold = count * 20 * MIB, 2 * count * CHAIN * SLOT_BYTES
    # Enough for all windows at this rate: between two passes a scrub reads nothing.
    scrubbed = max(4, int(1.5 * SCRUB_RATE * 3 * rounds * windows * WINDOW_S / (64 * MIB)))
    rows: list[Row] = []
    with (
        scrubbing(layout, place, scrubbed) as (scrub, scrub_rate),
        open_store(layout, host=host) as memory,
        open_store(layout, host=host, cold=cold, directory=place / "own") as store,
    ):
        fill(store, layout, range(count, 2 * count))  # older than what is read: evicted first
        chains = fill(store, layout, range(count))
        with Putter(layout, first=2 * count) as putter:
            conditions: dict[str, Condition] = {
                "alone": nullcontext,
                "again": nullcontext,  # how far two of a kind differ
                "scrub": scrub,
                "copies": partial(putter.putting, memory),
                "behind": partial(putter.putting, store),
            }
            for batch in (1, 16):
                reads = itertools.cycle(parts_of(chains, batch))
                seconds = WINDOW_S if batch == 1 else 2 * WINDOW_S
                p99 = [p99s(store, reads, conditions, windows, seconds) for _ in range(rounds)]
                rows += rows_of_p99s(f"{2 * batch} MiB", p99, scrub_rate())
    return rows


def p99s(
    store: Store,
    reads: Iterator[Part],
    conditions: dict[str, Condition],
    windows: int,
    seconds: float,
) -> dict[str, float]:
    """One round: the 99th percentile in seconds, by condition, over windows that take turns."""
    taken: dict[str, list[float]] = {name: [] for name in conditions}
    names = list(conditions)
    for turn in range(windows):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with conditions[name]():
                ends = time.perf_counter() + seconds
                while (start := time.perf_counter()) < ends:
                    read(store, next(reads))
                    taken[name].append(time.perf_counter() - start)
    return {name: float(np.percentile(times, 99)) for name, times in taken.items()}


def rows_of_p99s(size: str, rounds: list[dict[str, float]], scrub_rate: float) -> list[Row]:
    """The median over rounds of the ratio of two conditions."""

    def ratio(one: str, other: str) -> float:
        return float(np.median([found[one] / found[other] for found in rounds]))

    alone = float(np.median([found["alone"] for found in rounds])) * 1e3
    noise = (
        f"{scrub_rate / 1e6:.0f} MB/s; alone {alone:.2f} ms, again {ratio('again', 'alone'):.2f} x"
    )
    rate = f"{PUT_RATE / 1e6:.0f} MB/s"
    behind = f"with {rate} of puts; {ratio('behind', 'alone'):.2f} x alone"
    return [
        Row(
            f"p99 of reading {size}, scrub at its default rate",
            ratio("scrub", "alone"),
            *(1.1, False, "x alone", noise),
        ),
        Row(
            f"p99 of reading {size}, write-behind and eviction",
            ratio("behind", "copies"),
            *(1.1, False, "x puts in memory", behind),
        ),
    ]


@contextmanager
def scrubbing(
    layout: Layout, place: Path, count: int
) -> Iterator[tuple[Condition, Callable[[], float]]]:
    """`tierkv scrub` in a process of its own, which goes on only within what comes back first.

    What comes back second tells how many bytes a second it read then.
    """
    target = place / "scrubbed"
    with open_store(
        layout, host=64 * MIB, cold=count * CHAIN * SLOT_BYTES, directory=target
    ) as store:
        fill(store, layout, range(count))
    code = "import sys; sys.argv[0] = 'tierkv'; from tierkv.cli import main; main()"
    process = psutil.Popen(
        [sys.executable, "-c", code, "scrub", str(target)],
        env=os.environ | {"XDG_CACHE_HOME": str(place / "cache")},
        stdout=subprocess.DEVNULL,
    )
    seconds = 0.0

    @contextmanager
    def going_on() -> Iterator[None]:
        nonlocal seconds
        start = time.perf_counter()
        process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            process.send_signal(signal.SIGSTOP)
            seconds += time.perf_counter() - start

    try:
        while process.io_counters().read_bytes < 8 * MIB:
            assert process.poll() is None, "the scrub ended"
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        before = process.io_counters().read_bytes
        yield going_on, lambda: (process.io_counters().read_bytes - before) / seconds
    finally:
        process.kill()
        process.wait()


class Putter:
    """A thread that puts chains nobody has seen, at `PUT_RATE`, while it is told to."""

    def __init__(self, layout: Layout, *, first: int) -> None:
        _, self._rows = rows_array(layout, CHAIN)
        self._numbers = itertools.count(first)
        self._store: Store | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work)
        self._is_over = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(None, is_over=True)
        self._thread.join()

    @contextmanager
    def putting(self, store: Store) -> Iterator[None]:
        """Put into `store`; on leaving, all of it is written."""
        self._tell(store)
        try:
            yield
        finally:
            self._tell(None)
            store.flush()

    def _tell(self, store: Store | None, *, is_over: bool = False) -> None:
        with self._changed:
            self._store, self._is_over = store, is_over
            self._changed.notify_all()

    def _work(self) -> None:
        with self._changed:
            while not self._is_over:
                if self._store is None:
                    self._changed.wait()
                    continue
                start = time.perf_counter()
                keys = keys_of(self._store, next(self._numbers), CHAIN)
                self._store.put_keys(keys, self._rows)
                pause = 64 * MIB / PUT_RATE - (time.perf_counter() - start)
                self._changed.wait(max(0.001, pause))


if __name__ == "__main__":
    raise SystemExit(main())
