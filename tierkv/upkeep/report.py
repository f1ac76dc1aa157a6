"""What a look into a cold directory found: counts, what the next start keeps, and every flaw.

A page whose header was zeroed cannot be told from one that was erased: it counts as free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from tierkv.tiers.files.base import aligned_array
from tierkv.tiers.seals import NO_SEAL
from tierkv.tiers.seals.without_key import WithoutKey
from tierkv.tiers.segment_format import PageHeader
from tierkv.tiers.segment_io import Fault, Payload, Wanted
from tierkv.upkeep.lineage import reachable, roots_are_known
from tierkv.upkeep.reading import DISK, RECOMPUTE, Flaw, Look, Weight, layout_directories, looking

JSON_VERSION: Final = 1

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | bool | None"


@dataclass(slots=True)
class Counts:
    """Pages, blocks and bytes of one namespace."""

    pages: int = 0
    blocks: int = 0
    disk_bytes: int = 0

    def add(self, blocks: int, disk_bytes: int) -> None:
        """Count one page."""
        self.pages += 1
        self.blocks += blocks
        self.disk_bytes += disk_bytes


@dataclass(slots=True)
class LayoutReport:
    """One layout's folder. Pages are in one of: kept, dropped, free."""

    directory: Path
    fingerprint: str
    store_id: str
    is_clean: bool
    is_deep: bool
    protection: str
    #: Whether tags were verified; without the key only checksums were. True where there are none.
    has_key: bool
    segments: int
    disk_bytes: int
    warm_page_bytes: int
    pages: int
    pages_free: int
    #: What the next start finds again, and what of it a read then refuses (known if `is_deep`).
    pages_kept: int
    blocks_kept: int
    #: False where the salts would have to be known to tell; it is then the most it can be.
    blocks_kept_is_exact: bool
    #: Blocks in kept pages that are let go: an older copy, or their beginning is missing.
    blocks_let_go: int
    pages_dropped: int
    pages_refused: int
    #: Blocks of those pages, and all behind them: what is recomputed for them.
    blocks_refused: int
    namespaces: dict[str, Counts] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)

    @property
    def damage(self) -> list[Flaw]:
        """The flaws that lost something."""
        return [flaw for flaw in self.flaws if flaw.weight is Weight.DAMAGE]

    def as_dict(self) -> Json:
        """For JSON."""
        spaces: dict[str, Json] = {
            name: {"pages": n.pages, "blocks": n.blocks, "disk_bytes": n.disk_bytes}
            for name, n in sorted(self.namespaces.items())
        }
        flaws: list[Json] = [{**flaw.as_dict()} for flaw in self.flaws]
        return {
            "directory": str(self.directory),
            "fingerprint": self.fingerprint,
            "store_id": self.store_id,
            "clean_stop": self.is_clean,
            "protection": self.protection,
            "key_used": self.has_key if self.protection != NO_SEAL else None,
            "segments": self.segments,
            "disk_bytes": self.disk_bytes,
            "warm_page_bytes": self.warm_page_bytes,
            "pages": self.pages,
            "pages_free": self.pages_free,
            "recovery": {
                "pages_kept": self.pages_kept,
                "blocks_kept": self.blocks_kept,
                "blocks_kept_is_exact": self.blocks_kept_is_exact,
                "blocks_let_go": self.blocks_let_go,
                "pages_dropped": self.pages_dropped,
                "pages_refused_when_read": self.pages_refused if self.is_deep else None,
                "blocks_refused_when_read": self.blocks_refused if self.is_deep else None,
            },
            "namespaces": spaces,
            "flaws": flaws,
        }


def examine(
    path: Path,
    *,
    deep: bool,
    before_read: Callable[[int], None] | None = None,
    key_file: Path | None = None,
) -> list[LayoutReport]:
    """Check every layout's folder at `path`, with `deep` every payload too; changes nothing.

    Raises ConfigError for what is no cold directory, is in use, or is not of the key.
    """
    reports = []
    for root in layout_directories(path):
        with looking(root, before_read=before_read, key_file=key_file) as look:
            flaws = header_flaws(look)
            if deep:
                flaws += [flaw for _, flaw in payload_flaws(look, look.scan.headers) if flaw]
            reports.append(report_of(look, flaws, is_deep=deep))
    return reports


def as_json(path: Path, reports: list[LayoutReport], *, deep: bool) -> Json:
    """All reports as one JSON value; see `LayoutReport.as_dict`."""
    return {
        "version": JSON_VERSION,
        "directory": str(path),
        "deep": deep,
        "ok": not any(report.damage for report in reports),
        "layouts": [report.as_dict() for report in reports],
    }


def report_of(look: Look, flaws: list[Flaw], *, is_deep: bool) -> LayoutReport:
    """Count what is there; `flaws` are those of pages, the directory's own are added."""
    scan, shape = look.scan, look.shape
    slots = sum(segment.slots for segment in look.directory.segments.values())
    used = len(scan.headers) + len(scan.rejected) + len(scan.unreadable)
    dropped = len(scan.rejected) + len(scan.unreadable)
    spaces: dict[str, Counts] = {}
    for header in scan.headers:
        counts = spaces.setdefault(header.label.namespace, Counts())
        counts.add(len(header.label.blocks), shape.slot_bytes)
    blocks = sum(counts.blocks for counts in spaces.values())
    kept = reachable(scan.headers, shape.fingerprint)
    refused = {flaw.page for flaw in flaws if flaw.page is not None}
    refused -= scan.rejected.keys() | scan.unreadable.keys()
    left = reachable(scan.headers, shape.fingerprint, without=refused) if refused else kept
    return LayoutReport(
        directory=look.root,
        fingerprint=shape.fingerprint.hex(),
        store_id=shape.store_id.hex(),
        is_clean=look.is_clean,
        is_deep=is_deep,
        protection=shape.protection,
        has_key=not isinstance(look.seal, WithoutKey),
        segments=len(look.directory.segments),
        disk_bytes=sum(look.files.allocated(s.handle) for s in look.directory.segments.values()),
        warm_page_bytes=shape.warm_page_bytes,
        pages=slots,
        pages_free=slots - used,
        pages_kept=len(scan.headers),
        blocks_kept=len(kept),
        blocks_kept_is_exact=roots_are_known(scan.headers, shape.fingerprint),
        blocks_let_go=blocks - len(kept),
        pages_dropped=dropped,
        pages_refused=len(refused),
        blocks_refused=len(kept) - len(left),
        namespaces=spaces,
        flaws=look.flaws + flaws,
    )


def header_flaws(look: Look) -> list[Flaw]:
    """Pages whose header does not verify or cannot be read, in order."""
    hint = "" if look.is_clean else " (perhaps a write that the last stop cut short)"
    rejected = {page: reason + hint for page, reason in look.scan.rejected.items()}
    bad = [(page, reason, RECOMPUTE) for page, reason in rejected.items()]
    bad += [(page, reason, DISK) for page, reason in look.scan.unreadable.items()]
    most = look.shape.warm_page_blocks
    return [
        Flaw(Weight.DAMAGE, file_of(look, page), reason, cure, page, most, is_exact=False)
        for page, reason, cure in sorted(bad)
    ]


def payload_flaws(
    look: Look, headers: list[PageHeader], out: Payload | None = None
) -> Iterator[tuple[PageHeader, Flaw | None]]:
    """Read each page whole, into `out` if given; what is wrong with it, or None."""
    out = page_array(look) if out is None else out
    for header in headers:
        fault = read_page(look, header, out)
        if fault is None:
            yield header, None
            continue
        cure = DISK if isinstance(fault, OSError) else RECOMPUTE
        file, blocks = file_of(look, header.page), len(header.label.blocks)
        yield header, Flaw(Weight.DAMAGE, file, str(fault), cure, header.page, blocks)


def page_array(look: Look) -> Payload:
    """A place for one payload, aligned for the engine."""
    return aligned_array(look.shape.warm_page_bytes, max(look.files.align_bytes, 1))


def read_page(look: Look, header: PageHeader, out: Payload) -> Fault:
    """Read and verify one page into `out`."""
    return look.io.read_run([Wanted(header.page, header.generation, out)])[0]


def file_of(look: Look, page: int) -> str:
    """The name of the file that holds `page`."""
    return f"segment-{look.shape.segment_of(page):08d}.tkv"
