"""Page I/O of the cold tier: runs of pages to and from their slots; keeps no tables.

A run is consecutive pages of one segment, moved by one request: header, payload, header, payload.
Payloads go straight between the device and the caller's arrays where those are aligned for the
engine, else through an aligned bounce of the calling thread. Checksums are computed by the writing
thread, and by whoever makes the call that a fetch gives back (xxhash releases the GIL): so one run
can be verified while the next is read. Any thread.

Under a protection the writing thread also makes the tags, and whoever verifies reveals payloads in
place. What a seal hides goes from the caller's array through a bounce that is encrypted into, so
the array stays as it is and no plain byte goes to the disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import CorruptData, TierFailed
from tierkv.core.geometry import PagePlan
from tierkv.tiers.files.base import Buffer, FileEngine, address_of, aligned_array, in_turns
from tierkv.tiers.seals.base import SegmentSeal
from tierkv.tiers.segment_directory import SegmentDirectory, SegmentFile
from tierkv.tiers.segment_format import (
    PageHeader,
    SegmentShape,
    encode_page_header,
    encode_sealed_page,
    expect_page_tag,
    is_blank,
    open_sealed_page,
    parse_page_header,
    verify_page,
)

#: A start waits for the disk, not for a core: headers are small, and far apart.
SCAN_THREADS: Final = 4
#: A directory of fewer slots is read by one thread, in order.
_SCAN_SLOTS_MIN: Final = 1024

#: Header buffers kept for the next reads.
_SPARE_HEADERS_MAX: Final = 256

Payload: TypeAlias = npt.NDArray[np.uint8]
Raised = TypeVar("Raised", CorruptData, OSError)
#: Why a page cannot be used, or None.
Fault: TypeAlias = CorruptData | OSError | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """One page to read: which write of it, and where to."""

    page: int
    generation: int
    out: Payload


@dataclass(slots=True)
class Scan:
    """What the headers on disk say; `rejected` and `unreadable` are pages with the reason."""

    headers: list[PageHeader]
    rejected: dict[int, str]
    unreadable: dict[int, str]


class SegmentIO:
    """Moves and verifies pages of an open `SegmentDirectory`."""

    def __init__(
        self,
        files: FileEngine,
        directory: SegmentDirectory,
        plan: PagePlan,
        *,
        erase_payloads: bool = False,
    ) -> None:
        self._files = files
        self._erase_payloads = erase_payloads
        self._directory = directory
        self._plan = plan
        self._scratch = _Scratch(files.align_bytes)
        self._spare_headers: deque[Payload] = deque(maxlen=_SPARE_HEADERS_MAX)

    def runs(self, pages: Sequence[int], pages_max: int) -> list[list[int]]:
        """Indices of `pages` as runs of at most `pages_max`, sorted by page."""
        pages_per_segment = self._shape.pages_per_segment
        runs: list[list[int]] = []
        next_page = -1
        for index in sorted(range(len(pages)), key=pages.__getitem__):
            page = pages[index]
            is_new_segment = page % pages_per_segment == 0
            if page != next_page or is_new_segment or len(runs[-1]) == pages_max:
                runs.append([])
            runs[-1].append(index)
            next_page = page + 1
        return runs

    def write_run(
        self, headers: Sequence[PageHeader], payloads: Sequence[Payload], *, gives_way: bool = False
    ) -> None:
        """Write one run, making its segment if need be. Raises OSError, ValueError.

        `gives_way`: in small requests, so that nobody who reads waits for all of it.
        """
        shape = self._shape
        segment = self._directory.ensure(headers[-1].page)
        buffers: list[Buffer] = []
        spaces = self._headers(len(headers))
        seal = segment.seal
        hides = seal is not None and seal.hides
        throughs = self._bounces(payloads, for_all=hides)
        for header, space, payload, through in zip(
            headers, spaces, payloads, throughs, strict=True
        ):
            if through is not payload and not hides:
                through[:] = payload
            if seal is None:
                encode_page_header(shape, header, through.data, space.data)
            else:
                encode_sealed_page(
                    shape, header, payload.data, space.data, seal=seal, stored=through.data
                )
            buffers += (space.data, through.data)
        start = shape.offset_of(headers[0].page)
        if not gives_way:
            self._files.write(segment.handle, start, buffers)
            return
        for offset, piece in in_turns(start, buffers):
            self._files.write(segment.handle, offset, [piece])

    def read_run(self, run: Sequence[Wanted]) -> list[Fault]:
        """Read and verify one run; per page None, or why its `out` holds anything."""
        return self.fetch_run(run)()

    def fetch_run(self, run: Sequence[Wanted]) -> Callable[[], list[Fault]]:
        """Read one run now; the call that comes back verifies it, as `read_run`, on any thread."""
        shape = self._shape
        spaces = [self._take_header() for _ in run]
        throughs = self._bounces([wanted.out for wanted in run])
        buffers: list[Buffer] = []
        for space, through in zip(spaces, throughs, strict=True):
            buffers += (space.data, through.data)
        try:
            segment = self._directory.segments[shape.segment_of(run[0].page)]
            self._files.read(segment.handle, shape.offset_of(run[0].page), buffers)
            seal = segment.seal
        except OSError as error:
            faults: list[Fault] = [_bare(error)]
            if len(run) > 1:  # one bad sector must cost one page: ask for each alone
                faults = [self.read_run([wanted])[0] for wanted in run]
            return lambda: faults
        for wanted, through in zip(run, throughs, strict=True):
            if through is not wanted.out:  # the bounce is this thread's, and soon used again
                wanted.out[:] = through

        def verify() -> list[Fault]:
            pairs = zip(run, spaces, strict=True)
            if seal is None:
                found: list[Fault] = [_fault(s.data, w.out.data, shape, w) for w, s in pairs]
            else:
                found = [_sealed_fault(s.data, w.out.data, shape, w, seal) for w, s in pairs]
            self._spare_headers.extend(spaces)
            return found

        return verify

    def erase(self, page: int) -> int | None:
        """Zero a page's header; the number of its segment, None if it has none. Raises OSError.

        With `erase_payloads` the payload too, in the same request.
        """
        segment = self._directory.segments.get(self._shape.segment_of(page))
        if segment is None or page % self._shape.pages_per_segment >= segment.slots:
            return None
        blank = self._headers(1)[0]
        blank[:] = 0
        buffers: list[Buffer] = [blank.data]
        if self._erase_payloads:
            payload = self._scratch.rows("bounce", 1, self._shape.warm_page_bytes)[0]
            payload[:] = 0
            buffers.append(payload.data)
        self._files.write(segment.handle, self._shape.offset_of(page), buffers)
        return segment.number

    def scan(self, *, threads: int = 1) -> Scan:
        """Read every page header on disk, and no payload; by `threads` where that is worth it."""
        segments = [segment for _, segment in sorted(self._directory.segments.items())]
        if sum(segment.slots for segment in segments) < _SCAN_SLOTS_MIN:
            threads = 1
        with ThreadPoolExecutor(threads, "tierkv-scan") as pool:
            parts = list((pool.map if threads > 1 else map)(self._scan_segment, segments))
        found = Scan(headers=[], rejected={}, unreadable={})
        for part in parts:
            found.headers += part.headers
            found.rejected |= part.rejected
            found.unreadable |= part.unreadable
        return found

    def _scan_segment(self, segment: SegmentFile) -> Scan:
        shape = self._shape
        space = self._headers(1)[0]
        found = Scan(headers=[], rejected={}, unreadable={})
        first = segment.number * shape.pages_per_segment
        for page in range(first, first + segment.slots):
            try:
                self._files.read(segment.handle, shape.offset_of(page), [space.data])
                if not is_blank(space.data):
                    found.headers.append(_header_of(space.data, shape, page, segment.seal))
            except OSError as error:
                found.unreadable[page] = str(error)
            except CorruptData as error:
                found.rejected[page] = str(error)
        return found

    def torn(self, headers: Sequence[PageHeader], newest_max: int) -> dict[int, str]:
        """Which of the `newest_max` newest pages do not verify: writes that a stop cut short."""
        newest = sorted(headers, key=lambda header: header.generation, reverse=True)[:newest_max]
        faults = {h.page: self.fault_of(h.page, h.generation, deep=True) for h in newest}
        return {page: reason for page, reason in faults.items() if reason is not None}

    def fault_of(self, page: int, generation: int, *, deep: bool) -> str | None:
        """Why a page's header, and with `deep` its payload, is not that write; or None."""
        shape = self._shape
        if deep:
            out = self._scratch.rows("payload", 1, shape.warm_page_bytes)[0]
            fault = self.read_run([Wanted(page, generation, out)])[0]
            return None if fault is None else str(fault)
        space = self._headers(1)[0]
        segment = self._directory.segments[shape.segment_of(page)]
        try:
            self._files.read(segment.handle, shape.offset_of(page), [space.data])
            if _header_of(space.data, shape, page, segment.seal).generation != generation:
                return f"page {page}: another write than generation {generation} is in its slot"
        except (CorruptData, OSError, TierFailed) as error:
            return str(error)
        return None

    @property
    def _shape(self) -> SegmentShape:
        return self._directory.shape

    def _take_header(self) -> Payload:
        try:
            return self._spare_headers.pop()
        except IndexError:
            return aligned_array(self._shape.header_bytes, self._files.align_bytes)

    def _headers(self, count: int) -> list[Payload]:
        return self._scratch.rows("headers", count, self._shape.header_bytes)

    def _bounces(self, arrays: Sequence[Payload], *, for_all: bool = False) -> list[Payload]:
        """Each array itself if the engine can take it, else an aligned place to copy through.

        `for_all`: an aligned place for each.
        """
        align = self._files.align_bytes
        is_fit = align == 1 or not any(address_of(array) % align for array in arrays)
        if is_fit and not for_all:
            return list(arrays)
        rows = self._scratch.rows("bounce", len(arrays), self._plan.warm_page_bytes)
        if for_all:
            return rows
        pairs = zip(arrays, rows, strict=True)
        return [row if address_of(array) % align else array for array, row in pairs]


class _Scratch(threading.local):
    """Aligned buffers of one thread, by purpose; each grows to the largest need and stays."""

    def __init__(self, align_bytes: int) -> None:
        self._align_bytes = align_bytes
        self._arrays: dict[str, Payload] = {}

    def rows(self, purpose: str, count: int, row_bytes: int) -> list[Payload]:
        """`count` aligned arrays of `row_bytes`, valid until this thread asks again."""
        array = self._arrays.get(purpose)
        if array is None or len(array) < count * row_bytes:
            array = aligned_array(count * row_bytes, self._align_bytes)
            self._arrays[purpose] = array
        return [array[index * row_bytes : (index + 1) * row_bytes] for index in range(count)]


def _bare(error: Raised) -> Raised:
    """An error that is handed on as a value: its frames would keep the payload's memory in use."""
    context = error.__context__
    if context is not None:
        context.__traceback__ = None
    return error.with_traceback(None)


def _fault(
    header: Buffer, payload: Buffer, shape: SegmentShape, wanted: Wanted
) -> CorruptData | None:
    try:
        verify_page(header, payload, shape, page=wanted.page, generation=wanted.generation)
    except CorruptData as error:
        return _bare(error)
    return None


def _header_of(
    data: Buffer, shape: SegmentShape, page: int, seal: SegmentSeal | None
) -> PageHeader:
    """As `parse_page_header`, with its tag verified where there is one."""
    header = parse_page_header(data, shape, page)
    if seal is not None:
        expect_page_tag(data, shape, page, seal)
    return header


def _sealed_fault(
    header: Buffer, payload: Buffer, shape: SegmentShape, wanted: Wanted, seal: SegmentSeal
) -> CorruptData | None:
    try:
        open_sealed_page(
            header, payload, shape, page=wanted.page, generation=wanted.generation, seal=seal
        )
    except CorruptData as error:
        return _bare(error)
    return None
