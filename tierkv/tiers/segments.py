"""The cold tier: warm pages in segment files, verified on every read.

Model. A page number, given by the planner, is a place: segment `page // pages_per_segment`, one
slot in it. The only state in RAM is a generation per page, 0 where nothing readable is stored. A
generation is made once, ever (see `segment_directory`), so (store id, page, generation) names one
write, and a read that finds any other write in the slot, or that write with any byte changed, is a
miss. Which block lies where is the planner's knowledge; headers keep it for the next start.

Invariants:
- A page is readable only after its write returned and only until its next write or erase began.
- A batch written together becomes readable together, or not at all.
- `sync` returns only if every page that was readable when it was called is durable.
- After a failed sync of a segment nothing written to it since the last good one is readable, as the
  kernel may have dropped any of it and will not say so again.

Threads. `read_pages`, `write_pages`, `erase` and `sync` from any thread; whoever calls them keeps a
page from being read and written at once (a broken promise costs a miss, never wrong bytes). `open`
and `close`: single owner. One lock guards the tables, and no I/O happens under it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from tierkv.core.errors import CorruptData, GeometryMismatch, TierFailed
from tierkv.core.geometry import MIB, PagePlan
from tierkv.core.tier import ColdUsage, PageLabel, RecoveredPage
from tierkv.tiers.files.base import FileEngine
from tierkv.tiers.seals.base import Seal
from tierkv.tiers.segment_directory import EPOCH_SHIFT, SegmentDirectory
from tierkv.tiers.segment_errors import open_error, tier_errors
from tierkv.tiers.segment_format import PageHeader
from tierkv.tiers.segment_io import SCAN_THREADS, Fault, Payload, SegmentIO, Wanted

logger = logging.getLogger(__name__)

#: Scattered small pages are joined up to this much, so that a job is worth its hand-over.
_JOIN_BYTES: Final = MIB


class SegmentTier:
    """Verified pages on disk, by page number."""

    def __init__(
        self,
        files: FileEngine,
        plan: PagePlan,
        fingerprint: bytes,
        *,
        pages_max: int,
        segment_cold_pages: int = 16,
        inflight_max_bytes: int = 256 * MIB,
        seal: Seal | None = None,
        erase_payloads: bool = False,
    ) -> None:
        self.pages_max = pages_max
        self._files = files
        self._plan = plan
        self._inflight_max_bytes = inflight_max_bytes
        self._directory = SegmentDirectory(
            files,
            plan,
            fingerprint,
            pages_max=pages_max,
            pages_per_segment=segment_cold_pages * plan.cold_page_warm_pages,
            seal=seal,
        )
        self._io = SegmentIO(files, self._directory, plan, erase_payloads=erase_payloads)
        self._is_open = False
        self._findings: list[str] = []
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._generations = np.zeros(pages_max, dtype=np.uint64)
        self._next_generation = 0
        self._quarantined: set[int] = set()
        self._half_written: set[int] = set()  # a write to them began, and did not return good
        self._distrusted: set[int] = set()
        self._unsynced: dict[int, set[int]] = {}
        self._erased: dict[int, set[int]] = {}  # by segment, since its last sync
        self._lost_erasures: set[int] = set()  # by a failed sync
        self._failed_syncs: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()
        # Held over a whole sync, so that a second caller does not return before the first is done.
        self._syncing = threading.Lock()

    @property
    def quarantined(self) -> frozenset[int]:
        """Pages whose slot failed a read; unreadable until they are written again."""
        with self._lock:
            return frozenset(self._quarantined)

    @property
    def io_errors(self) -> int:
        """Errors of the disk so far; needs no lock."""
        return self._counts["io_errors"]

    @property
    def failed_syncs(self) -> int:
        """How often a segment could not be synced."""
        with self._lock:
            return self._failed_syncs.total()

    @property
    def distrusted(self) -> frozenset[int]:
        """Pages lost to a failed sync and not written since."""
        with self._lock:
            return frozenset(self._distrusted)

    @property
    def withheld(self) -> list[int]:
        """Pages that cannot be written: something else has taken their segment's name."""
        return self._directory.withheld

    def open(self) -> list[RecoveredPage]:
        """Create or recover the tier: lock it, read every page header, return what is stored.

        After an unclean stop the newest pages, `inflight_max_bytes` of them, are read in full and
        the torn ones dropped. One key may be in two pages: the higher generation is the newer.
        Raises TierFailed if the directory is in use, unsafe, or of another layout, format or key.
        """
        try:
            was_clean = self._directory.open()
            try:
                pages = self._recover(was_clean)
            except BaseException:
                self._directory.release()
                raise
        except OSError as error:
            raise open_error(error) from error
        self._is_open = True
        logger.info("cold tier opened pages=%d clean=%s", len(pages), was_clean)
        return pages

    def write_pages(
        self,
        pages: Sequence[int],
        payloads: Sequence[Payload],
        labels: Sequence[PageLabel],
        *,
        gives_way: bool = False,
    ) -> None:
        """Store `payloads`, each (warm_page_bytes,) uint8, under `pages`; blocks until written.

        Consecutive pages go in one request, or where it `gives_way` to readers in small ones. All
        become readable, or on an error none: TierFull without space, TierFailed on a device error,
        ValueError or GeometryMismatch for what cannot be stored. Durable after a good `sync`.
        """
        numbers = self._checked_batch(pages, payloads)
        if len(labels) != len(numbers) or len(set(numbers)) != len(numbers):
            raise ValueError("write_pages needs distinct pages and one label for each")
        runs = self._io.runs(numbers, self._plan.cold_page_warm_pages)
        segments = {self._directory.shape.segment_of(page) for page in numbers}
        with self._lock:
            first = self._next_generation
            self._next_generation += len(numbers)
            self._generations[numbers] = 0
            self._half_written.update(numbers)
            self._lost_erasures.difference_update(numbers)
            failed_syncs = {segment: self._failed_syncs[segment] for segment in segments}
        headers = [
            PageHeader(page, first + index, label)
            for index, (page, label) in enumerate(zip(numbers, labels, strict=True))
        ]
        with tier_errors("cannot write to the cold tier", self._count_io_error):
            try:
                for run in runs:
                    heads, bodies = [headers[i] for i in run], [payloads[i] for i in run]
                    self._io.write_run(heads, bodies, gives_way=gives_way)
            except OSError:
                self._erase_all(numbers)
                raise
        with self._lock:
            if any(self._failed_syncs[segment] != n for segment, n in failed_syncs.items()):
                raise TierFailed("a sync failed while these pages were being written")
            self._generations[numbers] = np.arange(first, first + len(numbers), dtype=np.uint64)
            self._half_written.difference_update(numbers)
            for page in numbers:
                self._unsynced.setdefault(self._directory.shape.segment_of(page), set()).add(page)
                self._quarantined.discard(page)
                self._distrusted.discard(page)
            self._counts["pages_written"] += len(numbers)

    def read_pages(self, pages: Sequence[int], outs: Sequence[Payload]) -> list[bool]:
        """Read `pages` into `outs`, each (warm_page_bytes,) uint8; True where verified.

        Consecutive pages come in one request. False, with anything in its `out`, is a page that is
        not stored, that does not verify, or that the device cannot read; the last two are counted
        and quarantined. Data faults never raise.
        """
        return self.fetch_pages(pages, outs)()

    def fetch_pages(
        self, pages: Sequence[int], outs: Sequence[Payload]
    ) -> Callable[[], list[bool]]:
        """Read as `read_pages` does; the call that comes back verifies, on any thread.

        Until it has been made, nothing in `outs` may be believed.
        """
        numbers = self._checked_batch(pages, outs)
        with self._lock:
            expected: list[int] = self._generations[numbers].tolist()
        stored = [index for index, generation in enumerate(expected) if generation]
        runs = self._io.runs([numbers[i] for i in stored], self._plan.cold_page_warm_pages)
        fetched: list[tuple[int, Wanted]] = []
        checks: list[Callable[[], list[Fault]]] = []
        for run in runs:
            picks = [stored[i] for i in run]
            wanted = [Wanted(numbers[i], expected[i], outs[i]) for i in picks]
            checks.append(self._io.fetch_run(wanted))
            fetched += zip(picks, wanted, strict=True)

        def verify() -> list[bool]:
            good = [False] * len(numbers)
            faults = [fault for check in checks for fault in check()]
            for (index, page), fault in zip(fetched, faults, strict=True):
                good[index] = fault is None
                if fault is not None:
                    self._reject(page, fault)
            with self._lock:
                self._counts["pages_read"] += sum(good)
            return good

        return verify

    def sync(self, *, failures_before: int | None = None) -> None:
        """Make every page written so far durable.

        Raises TierFailed if a segment cannot be synced, now, in a call that this one waited for, or
        since there were `failures_before`: its pages since its last good sync are `distrusted`.
        """
        if failures_before is None:
            failures_before = self.failed_syncs
        with self._syncing:
            self._erase_again()
            with self._lock:
                unsynced, self._unsynced = self._unsynced, {}
                erased, self._erased = self._erased, {}
                self._counts["syncs"] += 1
            for segment, written in unsynced.items():
                try:
                    self._files.sync(self._directory.segments[segment].handle)
                except OSError as error:
                    self._distrust(segment, written, error)
                    with self._lock:
                        self._lost_erasures |= erased.get(segment, set())
            with self._lock:
                failures = self._failed_syncs.total() - failures_before
        if failures:
            raise TierFailed(
                f"{failures} syncs of cold segments failed; what they held since their last good "
                "sync is forgotten; cure: check the device's health"
            )

    def erase(self, pages: Sequence[int]) -> None:
        """Forget `pages` now, and, after the next good `sync`, over restarts too.

        Headers are zeroed, and with `erase_payloads` what they name; else payload bytes stay on
        the disk until the slot is written again.
        """
        self._expect_open()
        numbers = self._checked_pages(pages)
        with self._lock:
            self._generations[numbers] = 0
        with tier_errors("cannot erase in the cold tier", self._count_io_error):
            for page in numbers:
                self._erase_header(page)

    def pieces(self, pages: Sequence[int], piece_bytes: int) -> list[list[int]]:
        """Cut a batch into jobs for parallel calls: lists of indices into `pages`.

        A piece is one run of consecutive pages of at most `piece_bytes` (or one page); only runs
        of a fraction of a MiB share a piece. Every index is in exactly one piece.
        """
        numbers = self._checked_pages(pages)
        page_bytes = self._plan.warm_page_bytes
        runs = self._io.runs(numbers, max(1, piece_bytes // page_bytes))
        join_pages = min(piece_bytes, _JOIN_BYTES) // page_bytes
        pieces: list[list[int]] = []
        for run in runs:
            if pieces and len(pieces[-1]) + len(run) <= join_pages:
                pieces[-1].extend(run)
            else:
                pieces.append(run)
        return pieces

    def close(self) -> None:
        """Sync, note that the stop was clean, unlock; the file engine stays with who made it.

        Raises TierFailed, unlocked all the same.
        """
        if not self._is_open:
            return
        self._is_open = False
        is_clean = False
        try:
            is_erased = self._erase_all(self.quarantined | self.distrusted | self._half_written)
            self.sync()
            is_clean = is_erased and not self.distrusted
        finally:
            try:
                self._directory.close(clean=is_clean)
            except OSError as error:
                raise TierFailed(f"cannot close the cold directory: {error}") from error

    def check(self, *, deep: bool = False) -> list[str]:
        """What is or was wrong, in words: found at `open` and put right, or there now.

        Reads the manifest and every header, with `deep` every payload too. Changes nothing.
        """
        self._expect_open()
        found = self._directory.findings + self._findings + self._directory.check()
        found += [f"page {page}: quarantined" for page in sorted(self.quarantined)]
        found += [f"page {page}: lost to a failed sync" for page in sorted(self.distrusted)]
        with self._lock:
            stored = [
                (int(p), int(self._generations[p])) for p in np.flatnonzero(self._generations)
            ]
        for page, generation in stored:
            reason = self._io.fault_of(page, generation, deep=deep)
            # A page that was written or erased meanwhile is not a finding.
            if reason is not None and self._generations[page] == generation:
                found.append(reason)
        return found

    def usage(self) -> ColdUsage:
        """Bytes on disk, and counters."""
        segments = list(self._directory.segments.values())
        disk_bytes = sum(self._files.allocated(segment.handle) for segment in segments)
        with self._lock:
            count = self._counts
            return ColdUsage(
                disk_bytes=disk_bytes,
                segments=len(segments),
                stored=int(np.count_nonzero(self._generations)),
                quarantined=len(self._quarantined),
                distrusted=len(self._distrusted),
                pages_read=count["pages_read"],
                pages_written=count["pages_written"],
                pages_corrupt=count["pages_corrupt"],
                pages_torn=count["pages_torn"],
                io_errors=count["io_errors"],
                syncs=count["syncs"],
            )

    def _expect_open(self) -> None:
        if not self._is_open:
            raise TierFailed("the cold tier is not open")

    def _checked_pages(self, pages: Sequence[int]) -> list[int]:
        numbers = [int(page) for page in pages]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.pages_max:
            raise ValueError(f"a page of {numbers} is outside 0..{self.pages_max - 1}")
        return numbers

    def _checked_batch(self, pages: Sequence[int], arrays: Sequence[Payload]) -> list[int]:
        self._expect_open()
        if len(arrays) != len(pages):
            raise ValueError(f"{len(pages)} pages but {len(arrays)} arrays")
        shape = (self._plan.warm_page_bytes,)
        for array in arrays:
            if array.dtype != np.uint8 or array.shape != shape or not array.flags.c_contiguous:
                raise GeometryMismatch(
                    f"a cold page is contiguous uint8 {shape}, got {array.dtype} {array.shape}"
                )
        return self._checked_pages(pages)

    def _reject(self, wanted: Wanted, fault: CorruptData | OSError) -> None:
        """Forget and quarantine a page that failed a read, unless it was rewritten meanwhile."""
        with self._lock:
            if self._generations[wanted.page] != wanted.generation:
                return
            self._generations[wanted.page] = 0
            self._quarantined.add(wanted.page)
            self._counts["io_errors" if isinstance(fault, OSError) else "pages_corrupt"] += 1
        logger.warning("cold page quarantined page=%d reason=%s", wanted.page, fault)

    def _distrust(self, segment: int, written: set[int], error: OSError) -> None:
        logger.warning("cold segment sync failed segment=%d reason=%s", segment, error)
        with self._lock:
            self._failed_syncs[segment] += 1
            self._counts["io_errors"] += 1
            # Writes that ended while the sync was failing may be among what the kernel dropped.
            lost = written | self._unsynced.pop(segment, set())
            for page in lost:
                self._generations[page] = 0
            self._distrusted |= lost

    def _erase_header(self, page: int) -> None:
        segment = self._io.erase(page)
        with self._lock:
            self._note_erased(segment, page)

    def _note_erased(self, segment: int | None, page: int) -> None:
        if segment is not None:
            self._unsynced.setdefault(segment, set())
            self._erased.setdefault(segment, set()).add(page)

    def _erase_again(self) -> None:
        """Write anew what a failed sync may have dropped; locked, so that no write begins there."""
        with tier_errors("cannot erase in the cold tier", self._count_io_error), self._lock:
            for page in sorted(self._lost_erasures):
                self._note_erased(self._io.erase(page), page)
                self._lost_erasures.discard(page)

    def _erase_all(self, pages: Iterable[int]) -> bool:
        """Keep the next start from finding pages that this one gave up on; False if it may.

        The header of a write that failed would be the newest of its blocks, before an older copy.
        """
        is_erased = True
        for page in pages:
            try:
                self._erase_header(page)
            except OSError as error:
                logger.info("cold page left in place page=%d reason=%s", page, error)
                is_erased = is_erased and page not in self._half_written
        return is_erased

    def _count_io_error(self) -> None:
        with self._lock:
            self._counts["io_errors"] += 1

    def _recover(self, was_clean: bool) -> list[RecoveredPage]:
        """Fill the tables from the headers on disk and start a new epoch."""
        scan = self._io.scan(threads=SCAN_THREADS)
        newest = max((header.generation for header in scan.headers), default=0)
        epoch = self._directory.begin(newest >> EPOCH_SHIFT)
        newest_max = self._inflight_max_bytes // self._plan.warm_page_bytes
        torn = {} if was_clean else self._io.torn(scan.headers, newest_max)
        for page in (*scan.rejected, *torn):
            self._erase_header(page)
        kept = [header for header in scan.headers if header.page not in torn]
        self._next_generation = self._directory.first_generation(epoch)
        self._generations[:] = 0
        for header in kept:
            self._generations[header.page] = header.generation
        self._quarantined = set(scan.unreadable)
        self._counts["io_errors"] += len(scan.unreadable)
        self._counts["pages_torn"] += len(torn)
        # A header cut short by a stop looks like any other damage.
        self._counts["pages_corrupt" if was_clean else "pages_torn"] += len(scan.rejected)
        reasons = (scan.unreadable | scan.rejected | torn).items()
        self._findings = [f"dropped at open: {reason}" for _, reason in sorted(reasons)]
        return [RecoveredPage(header.page, header.generation, header.label) for header in kept]
