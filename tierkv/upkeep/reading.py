"""A cold directory opened for looking: locked, recovered in rehearsal, and not changed.

The code that looks is the store's own: `SegmentDirectory.open` and `SegmentIO.scan` run over a file
engine that reads, and that only takes note of what it is told to write or remove. So what is said
here about the next start is what the next start does. Single owner.

A protected directory can be looked at without its key: then checksums are verified, which find
faults, and not the tags, which find forgers.

The lock is held all the while, where there is a lock file; one is not made, as that would be a
change. A store that is started meanwhile is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from tierkv.core.errors import ConfigError, CorruptData, TierFailed
from tierkv.core.geometry import ALIGN_BYTES, GIB, PagePlan
from tierkv.tiers.files.base import FileEngine
from tierkv.tiers.seals import NO_SEAL, load_seal
from tierkv.tiers.seals.base import Seal
from tierkv.tiers.seals.without_key import WithoutKey
from tierkv.tiers.segment_directory import SegmentDirectory
from tierkv.tiers.segment_format import SegmentShape
from tierkv.tiers.segment_header import SegmentHeader, parse_segment_header
from tierkv.tiers.segment_io import Scan, SegmentIO
from tierkv.tiers.segment_manifest import Manifest
from tierkv.upkeep.looking_files import LookingFiles, reading_engine

#: No page is larger, so a forged manifest cannot ask for all memory.
_PAGE_BYTES_MAX: Final = 64 * GIB
_PAGE_BLOCKS_MAX: Final = 1 << 20

REWRITE: Final = "none is needed: the next start makes it again"
DISK: Final = (
    "see the kernel's log (dmesg) and the device's health (smartctl); blocks are recomputed"
)
RECOMPUTE: Final = "none is needed: a miss, and its blocks are recomputed and stored anew"


class Weight(StrEnum):
    """How bad a flaw is."""

    #: Something that was stored is not there any more.
    DAMAGE = "damage"
    #: Worth a word, and nothing is lost.
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Flaw:
    """One thing that is wrong: where, what, what it costs, and the cure."""

    weight: Weight
    file: str
    what: str
    cure: str
    page: int | None = None
    #: Blocks that have to be computed again; at most that many unless `is_exact`.
    blocks: int = 0
    is_exact: bool = True

    def as_dict(self) -> dict[str, str | int | bool | None]:
        """For JSON."""
        return {
            "weight": self.weight.value,
            "file": self.file,
            "page": self.page,
            "what": self.what,
            "blocks_lost": self.blocks,
            "blocks_lost_is_exact": self.is_exact,
            "cure": self.cure,
        }


@dataclass(slots=True)
class Look:
    """An open directory of one layout, and what its headers say."""

    root: Path
    files: LookingFiles
    plan: PagePlan
    shape: SegmentShape
    pages_max: int
    #: None where it is lost or damaged.
    manifest: Manifest | None
    directory: SegmentDirectory
    io: SegmentIO
    scan: Scan
    is_clean: bool
    #: None where the directory has no protection; `WithoutKey` where no key was given.
    seal: Seal | None
    flaws: list[Flaw]


class _Found(SegmentDirectory):
    """A directory of a layout that is not known yet; never opened."""

    def __init__(self, files: FileEngine) -> None:
        plan = PagePlan(1, 1, 1, 1, 1, 1, ALIGN_BYTES, 1)
        super().__init__(files, plan, b"", pages_max=1, pages_per_segment=1)

    def manifest(self) -> Manifest | None:
        return self._read_manifest()

    def names(self) -> list[tuple[str, int]]:
        return self._segment_names()

    def header(self, handle: int) -> SegmentHeader:
        return parse_segment_header(self._headers.read(handle))

    def _expect_seal(self, text: bytes, manifest: Manifest) -> None:
        """It says itself how it is protected; the rehearsal holds it to that."""

    def lock_holder(self) -> str:
        return self._lock_holder()


class _Rehearsed(SegmentDirectory):
    """A directory whose repairs are not made, and so not logged either."""

    def _found(self, finding: str) -> None:
        self.findings.append(finding)


def layout_directories(path: Path) -> list[Path]:
    """The layouts' folders at `path`: itself, or those right beneath it. Follows no link beneath.

    Raises ConfigError for anything that is not a cold directory.
    """
    path = path.expanduser().absolute()
    cure = "name the folder of tiers.cold.directory, or one layout's folder in it"
    try:
        if _holds_segments(path):
            return [path]
        with os.scandir(path) as entries:
            names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        # A name that begins with a dot is a drill's copy, or not ours.
        inner = [path / name for name in sorted(names) if not name.startswith(".")]
        found = [folder for folder in inner if _holds_segments(folder)]
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such directory; {cure}") from None
    except NotADirectoryError:
        raise ConfigError(f"{path} is not a directory; {cure}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {cure}") from None
    if not found:
        raise ConfigError(
            f"{path} is not a cold directory: neither it nor a folder in it holds a manifest or "
            f"segments; {cure}"
        )
    return found


def _holds_segments(path: Path) -> bool:
    with os.scandir(path) as entries:
        return any(
            e.name == "manifest" or re.fullmatch(r"segment-\d{8}\.tkv", e.name, re.ASCII)
            for e in entries
        )


@contextmanager
def looking(
    root: Path,
    *,
    before_read: Callable[[int], None] | None = None,
    key_file: Path | None = None,
) -> Iterator[Look]:
    """Lock and open the folder of one layout and read its headers; changes nothing.

    Raises ConfigError if it is in use, unsafe, of another format, or of another key.
    """
    files = _files(root, before_read)
    try:
        yield _look(root, files, key_file)
    finally:
        files.shutdown()


def _files(root: Path, before_read: Callable[[int], None] | None) -> LookingFiles:
    try:
        inner = reading_engine(root)
    except OSError as error:
        raise ConfigError(f"{root}: {error.strerror}") from None
    try:
        return LookingFiles(inner, before_read)
    except BlockingIOError:
        holder = _Found(inner).lock_holder()
        inner.shutdown()
        raise ConfigError(
            f"{root} is in use by {holder}; cure: stop that store, or wait for its end, then ask "
            "again"
        ) from None
    except OSError as error:
        inner.shutdown()
        raise ConfigError(f"{root}: {error}") from None


@dataclass(slots=True)
class _Survey:
    """What is found before anything is recovered."""

    manifest: Manifest | None = None
    shape: SegmentShape | None = None
    heads: dict[str, SegmentHeader] = field(default_factory=dict)
    numbers: dict[int, str] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)

    def damage(self, file: str, what: str, cure: str, *, blocks: int = 0) -> None:
        self.flaws.append(Flaw(Weight.DAMAGE, file, what, cure, None, blocks, is_exact=not blocks))

    def note(self, file: str, what: str, cure: str) -> None:
        self.flaws.append(Flaw(Weight.NOTE, file, what, cure))


def _look(root: Path, files: LookingFiles, key_file: Path | None) -> Look:
    survey = _Survey()
    found = _Found(files)
    _survey_manifest(root, files, found, survey)
    _survey_segments(files, found, survey)
    _survey_names(root, files, survey)
    shape = survey.shape
    if shape is None:
        raise ConfigError(
            f"{root}: the manifest and every segment header are lost, so nothing in it can be "
            "recovered; cure: remove its contents (what it held is recomputed)"
        )
    _compare(survey, shape)
    manifest = survey.manifest
    # Without a manifest nobody knows a block's bytes; recovery and checksums need them not.
    layers, tokens, layer_bytes = 1, 1, shape.warm_page_bytes // shape.warm_page_blocks
    if manifest is not None:
        layers, tokens = manifest.layers, manifest.block_tokens
        layer_bytes = manifest.block_layer_bytes
    plan = PagePlan(
        layers=layers,
        block_tokens=tokens,
        block_layer_bytes=layer_bytes,
        hot_page_tokens=1,
        hot_page_bytes=layer_bytes,
        warm_page_blocks=shape.warm_page_blocks,
        warm_page_bytes=shape.warm_page_bytes,
        cold_page_warm_pages=shape.pages_per_segment,
    )
    pages_max = (max([0, *survey.numbers]) + 1) * shape.pages_per_segment
    seal = _seal_of(survey, shape.protection, key_file)
    directory = _Rehearsed(
        files,
        plan,
        shape.fingerprint,
        pages_max=pages_max,
        pages_per_segment=shape.pages_per_segment,
        seal=seal,
    )
    io = SegmentIO(files, directory, plan)
    try:
        is_clean = directory.open()
        scan = io.scan()
    except (OSError, TierFailed) as error:
        raise ConfigError(f"{root}: {error}") from None
    _survey_lengths(files, directory, survey)
    if not is_clean and manifest is not None:
        cure = "none is needed: the next start verifies the newest pages; --deep does so now"
        survey.note("manifest", "the last store did not stop cleanly", cure)
    return Look(
        root=root,
        files=files,
        plan=plan,
        shape=directory.shape,
        pages_max=pages_max,
        manifest=manifest,
        directory=directory,
        io=io,
        scan=scan,
        is_clean=is_clean,
        seal=seal,
        flaws=survey.flaws,
    )


def _seal_of(survey: _Survey, protection: str, key_file: Path | None) -> Seal | None:
    """The seal that a directory names. ConfigError for a key that cannot be used."""
    if protection == NO_SEAL and key_file is not None:
        survey.note("manifest", "it is not protected, so the key was not used", "none is needed")
    if protection != NO_SEAL and key_file is None:
        return WithoutKey(protection)
    return load_seal(protection, key_file)


def _survey_manifest(root: Path, files: LookingFiles, found: _Found, survey: _Survey) -> None:
    try:
        manifest = found.manifest()
        if manifest is None:
            survey.damage("manifest", "it is missing", REWRITE)
            return
        survey.shape = _shape_of(manifest)
        survey.manifest = manifest
    except CorruptData as error:
        survey.damage("manifest", str(error), REWRITE)
        files.hide("manifest")
    except OSError as error:
        cure = "the store cannot start: remove the manifest, it is made again from the segments"
        survey.damage("manifest", str(error), cure)
        files.hide("manifest")
    except TierFailed as error:
        raise ConfigError(f"{root}: {error}") from None


def _shape_of(manifest: Manifest) -> SegmentShape:
    """The sizes in a manifest, if they are possible; else CorruptData."""
    try:
        fingerprint = bytes.fromhex(manifest.fingerprint)
    except ValueError:
        raise CorruptData("manifest: the fingerprint is not hexadecimal") from None
    page_bytes, blocks = manifest.warm_page_bytes, manifest.warm_page_blocks
    is_possible = (
        len(fingerprint) == 32
        and ALIGN_BYTES <= page_bytes <= _PAGE_BYTES_MAX
        and page_bytes % ALIGN_BYTES == 0
        and 1 <= blocks <= _PAGE_BLOCKS_MAX
        and min(manifest.layers, manifest.block_tokens, manifest.block_layer_bytes) >= 1
    )
    if not is_possible:
        raise CorruptData(f"manifest: impossible sizes: {page_bytes=} {blocks=}")
    plan = PagePlan(1, 1, 1, 1, 1, blocks, page_bytes, 1)
    return SegmentShape.of(
        plan,
        fingerprint=fingerprint,
        store_id=bytes.fromhex(manifest.store_id),
        pages_per_segment=manifest.pages_per_segment,
        protection=manifest.protection,
    )


def _survey_segments(files: LookingFiles, found: _Found, survey: _Survey) -> None:
    """Every segment's header; one that a store could not open is hidden from what follows."""
    for name, number in found.names():
        survey.numbers[number] = name
        try:
            handle = files.open(name)
        except OSError as error:
            cure = "the store cannot start: remove the file, what it held is recomputed"
            survey.damage(name, error.strerror or str(error), cure, blocks=_segment_blocks(survey))
            files.hide(name)
            continue
        try:
            survey.heads[name] = found.header(handle)
        except CorruptData as error:
            survey.damage(name, f"its header: {error}", REWRITE)
        except OSError as error:
            is_sealed = survey.shape is not None and survey.shape.protection != NO_SEAL
            lost = _segment_blocks(survey) if is_sealed else 0  # the salt is in it
            survey.damage(name, f"its header cannot be read: {error}", DISK, blocks=lost)
        finally:
            files.close(handle)
    if survey.shape is None:
        survey.shape = next((head.shape for head in survey.heads.values()), None)


def _compare(survey: _Survey, shape: SegmentShape) -> None:
    """Which segments are of another store or place, and which are missing."""
    for number, name in survey.numbers.items():
        head = survey.heads.get(name)
        if head is not None and (head.shape, head.number) != (shape, number):
            what = f"it is segment {head.number} of store {head.shape.store_id.hex()}"
            cure = "move it away to keep it: the next start removes it, as no page of it is ours"
            survey.damage(name, what, cure, blocks=_segment_blocks(survey))
    if survey.manifest is None:
        return
    for number in set(survey.manifest.segments) - set(survey.numbers):
        cure = "none is needed: what it held is recomputed"
        name = f"segment-{number:08d}.tkv"
        survey.damage(name, "it is missing", cure, blocks=_segment_blocks(survey))


def _segment_blocks(survey: _Survey) -> int:
    shape = survey.shape
    return 0 if shape is None else shape.pages_per_segment * shape.warm_page_blocks


def _survey_lengths(files: LookingFiles, directory: SegmentDirectory, survey: _Survey) -> None:
    shape = directory.shape
    for segment in directory.segments.values():
        rest = files.size(segment.handle) - shape.segment_bytes(0)
        if rest < 0 or rest % shape.slot_bytes:
            what = f"it is cut off after {segment.slots} whole pages"
            cure = "none is needed: what is missing is recomputed"
            lost = (shape.pages_per_segment - segment.slots) * shape.warm_page_blocks
            survey.damage(survey.numbers[segment.number], what, cure, blocks=lost)


def _survey_names(root: Path, files: LookingFiles, survey: _Survey) -> None:
    """Names that are not a store's own, and things that are no plain files; none is opened."""
    known = {"lock", "manifest", *survey.numbers.values()}
    plain = set(files.inner.names())
    others: list[str] = []
    with suppress(OSError), os.scandir(root) as entries:
        others = sorted(e.name for e in entries if e.name not in known or e.name not in plain)
    for name in others:
        if name not in plain:
            survey.note(name, "it is no plain file; links are not followed", "remove it")
        elif name.endswith(".tmp"):
            survey.note(name, "half made when a store ended", "the next start removes it")
        else:
            survey.note(name, "the store does not know this file", "move it elsewhere")
