"""Drills: break a copy of a cold directory, and count what a store would serve from it.

The copy is made beside the folder, on the same file system, and removed in the end; the folder
itself is only read. What the copy must hold is told by the bytes of each page that verified before
anything was broken. Then the store's own cold tier opens the broken copy and is asked for all of
them: each comes back with the same bytes and the same blocks, or it is a miss.

A broken copy that shall be kept is a copy of that copy, made when the fault was made and before a
start without it has put anything right.

    corrupt    bits flipped in pages' headers and payloads
    enospc     no write finds room; what is stored must still be served, also after a new start
    kill-disk  in the middle of reading, every call fails; all comes back with the disk
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from tierkv.core.errors import ConfigError, TierFailed, TierFull, TierKVError
from tierkv.core.geometry import MIB, PagePlan
from tierkv.core.tier import PageLabel
from tierkv.core.units import format_bytes
from tierkv.testing.files import Fault, FaultyFiles, from_then_on
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.files.portable import PortableFiles
from tierkv.tiers.seals.base import Seal
from tierkv.tiers.seals.without_key import WithoutKey
from tierkv.tiers.segment_format import SegmentShape
from tierkv.tiers.segment_io import Payload
from tierkv.tiers.segments import SegmentTier
from tierkv.upkeep import DrillKind
from tierkv.upkeep.reading import Look, layout_directories, looking
from tierkv.upkeep.report import page_array, payload_flaws

#: What a copy is called; `layout_directories` passes such names over.
COPY_PREFIX: Final = ".tierkv-drill-"
_COPY_BYTES: Final = 4 * MIB
#: Left free beside the copy: a drill must not be what fills a disk.
_SPARE_BYTES: Final = 16 * MIB
#: More slots than this are no tier of ours: the table of generations alone would take 8 GiB.
_PAGES_MAX: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Sound:
    """What a page held before anything was broken."""

    digest: bytes
    label: PageLabel


@dataclass(slots=True)
class Copy:
    """The copy, and what it must hold."""

    root: Path
    plan: PagePlan
    shape: SegmentShape
    seal: Seal | None
    pages_max: int
    sound: dict[int, Sound]
    damaged_before: int
    #: Where it is copied once more when it is broken.
    kept: Path | None

    def keep(self) -> None:
        """Copy it as it is now, if that is wanted."""
        if self.kept is not None:
            shutil.copytree(self.root, self.kept, dirs_exist_ok=True)


@dataclass(slots=True)
class Served:
    """Pages by what came of asking for them."""

    right: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)
    wrong: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Outcome:
    """What a drill on one folder showed."""

    directory: Path
    kind: DrillKind
    seed: int
    #: Pages that verified before, and pages that did not even then (not part of the drill).
    pages: int
    damaged_before: int
    #: Pages or calls that were broken, and how many of those were noticed: a miss or an error.
    broken: int = 0
    noticed: int = 0
    #: Pages with other bytes or other blocks than before, as served: must be none.
    wrong: set[int] = field(default_factory=set)
    #: Unharmed pages that were not served.
    lost: set[int] = field(default_factory=set)

    @property
    def held(self) -> bool:
        """Whether every fault was noticed, and nothing else was lost or wrong."""
        return self.noticed == self.broken > 0 and not self.wrong and not self.lost

    def judge(self, served: Served, broken: Iterable[int]) -> None:
        """Take over a round of reading in which pages `broken` may be missed, others not."""
        self.wrong |= served.wrong
        self.lost |= served.missed - set(broken)


def run_drill(
    path: Path,
    kind: DrillKind,
    *,
    seed: int,
    count: int = 16,
    key_file: Path | None = None,
    keep: Path | None = None,
) -> list[Outcome]:
    """Drill each layout's folder at `path`, with `count` pages broken in a copy of each.

    `keep`, which must not exist yet, becomes what `path` is, broken. Raises ConfigError for what is
    no cold directory, is in use, holds nothing, is protected by another key or one that was not
    given, or where a copy does not fit.
    """
    play = {
        DrillKind.CORRUPT: _corrupt,
        DrillKind.ENOSPC: _enospc,
        DrillKind.KILL_DISK: _kill_disk,
    }[kind]
    outcomes = []
    roots = layout_directories(path)
    is_one = roots == [path.expanduser().absolute()]
    with _quiet(), _keeping(keep, path) as kept:
        for root in roots:
            place = kept if kept is None or is_one else kept / root.name
            with _copied(root, key_file, place) as copy:
                if not copy.sound:
                    raise ConfigError(f"{root} holds no page that verifies: nothing to drill with")
                found = Outcome(root, kind, seed, len(copy.sound), copy.damaged_before)
                play(copy, found, random.Random(seed), count)  # noqa: S311 - chance, not secrets
                outcomes.append(found)
    return outcomes


def _corrupt(copy: Copy, found: Outcome, rng: random.Random, count: int) -> None:
    broken = _some(copy, rng, count)
    with _engine(copy.root) as files:
        for page in broken:
            _flip_bits(files, copy.shape, page, rng)
        copy.keep()
        with _opened(files, copy) as ask:
            served = ask(copy.sound)
    found.broken, found.noticed = len(broken), len(served.missed & set(broken))
    found.judge(served, broken)


def _enospc(copy: Copy, found: Outcome, rng: random.Random, count: int) -> None:
    """Overwrite stored pages, and ask for a new segment, where no write finds room."""
    rewritten = _some(copy, rng, count)
    new = copy.pages_max
    with _engine(copy.root) as files:
        faulty = FaultyFiles(files)
        with _opened(faulty, copy, more_pages=1) as ask:
            faulty.schedule = from_then_on(0, Fault.ENOSPC)
            label = copy.sound[rewritten[0]].label
            for page in (*rewritten, new):
                found.broken += 1
                found.noticed += _is_refused(ask, page, label, rng, TierFull)
            found.judge(ask(copy.sound), rewritten)
    copy.keep()
    _restart(copy, found, rewritten)


def _kill_disk(copy: Copy, found: Outcome, rng: random.Random, count: int) -> None:
    """Fail every call from the middle of reading on; `count` pages were asked for by then."""
    order = rng.sample(sorted(copy.sound), len(copy.sound))
    # At least one page is asked for afterwards.
    before, after = order[: min(count, len(order) - 1)], order[min(count, len(order) - 1) :]
    with _engine(copy.root) as files:
        faulty = FaultyFiles(files)
        with _opened(faulty, copy) as ask:
            found.judge(ask(before), ())
            faulty.schedule = from_then_on(0, Fault.EIO)
            served = ask(after)
            found.judge(served, after)
            # One write more: it must fail, and say so.
            label = copy.sound[after[0]].label
            is_refused = _is_refused(ask, after[0], label, rng, TierFailed)
    found.broken = len(after) + 1
    found.noticed = len(served.missed) + is_refused
    copy.keep()
    _restart(copy, found, ())


def _restart(copy: Copy, found: Outcome, rewritten: Sequence[int]) -> None:
    """A new start on the copy, with the fault gone: all that was not overwritten is there."""
    with _engine(copy.root) as files, _opened(files, copy) as ask:
        found.judge(ask(copy.sound), rewritten)


def _is_refused(
    ask: _Ask, page: int, label: PageLabel, rng: random.Random, kind: type[TierKVError]
) -> bool:
    """Whether writing other bytes to `page` ends with an error of this kind."""
    payload = aligned_array(ask.page_bytes, 4096)
    payload[:] = memoryview(rng.randbytes(len(payload)))
    try:
        ask.tier.write_pages([page], [payload], [label])
    except kind:
        return True
    return False


class _Ask:
    """An open tier over a copy, and what it recovered."""

    def __init__(self, tier: SegmentTier, copy: Copy) -> None:
        self.tier = tier
        self.page_bytes = copy.shape.warm_page_bytes
        self._copy = copy
        self._labels = {page.page: page.label for page in tier.open()}
        self._out: Payload = aligned_array(self.page_bytes, 4096)

    def __call__(self, pages: Iterable[int]) -> Served:
        """Ask for every page that was sound, and compare."""
        served = Served()
        for page in pages:
            known = self._copy.sound[page]
            self._out[:] = 0
            if page not in self._labels or not self.tier.read_pages([page], [self._out])[0]:
                served.missed.add(page)
            elif (_digest(self._out), self._labels[page]) == (known.digest, known.label):
                served.right.add(page)
            else:
                served.wrong.add(page)
        return served


@contextmanager
def _opened(files: FileEngine, copy: Copy, *, more_pages: int = 0) -> Iterator[_Ask]:
    """The cold tier over a copy; a stop that fails is part of a drill."""
    tier = SegmentTier(
        files,
        copy.plan,
        copy.shape.fingerprint,
        pages_max=copy.pages_max + more_pages,
        segment_cold_pages=1,
        seal=copy.seal,
    )
    ask = _Ask(tier, copy)
    try:
        yield ask
    finally:
        with suppress(TierFailed, TierFull):
            tier.close()


def _some(copy: Copy, rng: random.Random, count: int) -> list[int]:
    return rng.sample(sorted(copy.sound), min(count, len(copy.sound)))


def _flip_bits(files: FileEngine, shape: SegmentShape, page: int, rng: random.Random) -> None:
    """Flip one to eight bits of a page's header or of its payload."""
    size = rng.choice((shape.header_bytes, shape.warm_page_bytes))
    offset = shape.offset_of(page) + (0 if size == shape.header_bytes else shape.header_bytes)
    handle = files.open(f"segment-{shape.segment_of(page):08d}.tkv")
    data = aligned_array(size, 4096)
    files.read(handle, offset, [data.data])
    for bit in rng.sample(range(8 * size), rng.randint(1, 8)):
        data[bit // 8] ^= 1 << bit % 8
    files.write(handle, offset, [data.data])
    files.close(handle)


@contextmanager
def _keeping(keep: Path | None, path: Path) -> Iterator[Path | None]:
    """Where broken copies are put together; becomes `keep` if all went well, else is removed."""
    if keep is None:
        yield None
        return
    keep = keep.expanduser().absolute()
    cure = "cure: name a folder that does not exist, outside of what is drilled"
    if os.path.lexists(keep):
        raise ConfigError(f"--keep {keep}: it exists; {cure}")
    if keep.resolve().is_relative_to(path.expanduser().resolve()):
        raise ConfigError(f"--keep {keep}: it lies in {path}; {cure}")
    is_new = not keep.parent.exists()
    try:
        keep.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=COPY_PREFIX, dir=keep.parent))
    except OSError as error:
        raise ConfigError(f"--keep {keep}: it cannot be made: {error.strerror}; {cure}") from None
    try:
        yield made
        made.rename(keep)
    except BaseException:
        shutil.rmtree(made)
        if is_new:
            keep.parent.rmdir()
        raise


@contextmanager
def _copied(root: Path, key_file: Path | None, kept: Path | None) -> Iterator[Copy]:
    """A copy beside `root`, with what it holds; removed in the end, whatever happens.

    `kept` is where it is copied once more: an empty folder, or one that can be made.
    """
    with looking(root, key_file=key_file) as look:
        if isinstance(look.seal, WithoutKey):
            raise ConfigError(
                f"{root} is protected by {look.seal.name}, and no store can be opened on a copy "
                "without its key; cure: --key-file"
            )
        segments = look.directory.segments.values()
        size = sum(look.files.size(segment.handle) for segment in segments)
        _require_room(root, root.parent, size * (1 + _is_beside(root, kept)))
        if kept is not None:
            _require_room(root, kept if kept.exists() else kept.parent, size)
        try:
            folder = Path(tempfile.mkdtemp(prefix=COPY_PREFIX, dir=root.parent))
        except OSError as error:
            raise ConfigError(f"{root.parent}: no copy can be made: {error.strerror}") from None
        try:
            _copy_files(look, folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
    try:
        yield _survey(folder, key_file, kept)
    finally:
        shutil.rmtree(folder)


def _is_beside(root: Path, kept: Path | None) -> bool:
    """Whether both copies are on one file system."""
    return kept is not None and root.stat().st_dev == kept.parent.stat().st_dev


def _require_room(root: Path, place: Path, size: int) -> None:
    free = shutil.disk_usage(place).free
    if size + _SPARE_BYTES > free:
        raise ConfigError(
            f"{root}: a copy takes {format_bytes(size)} in {place}, and {format_bytes(free)} are "
            "free there; cure: free some space, or drill a smaller directory"
        )


def _copy_files(look: Look, folder: Path) -> None:
    names = [f"segment-{number:08d}.tkv" for number in sorted(look.directory.segments)]
    names += ["manifest"] if look.manifest is not None else []
    with _engine(look.root) as source, _engine(folder) as target:
        for name in names:
            reader, writer = source.open(name), target.open(name, create=True)
            size = source.size(reader)
            for offset in range(0, size, _COPY_BYTES):
                piece = aligned_array(min(_COPY_BYTES, size - offset), 4096)
                source.read(reader, offset, [piece.data])
                target.write(writer, offset, [piece.data])
            source.close(reader)
            target.close(writer)


def _survey(folder: Path, key_file: Path | None, kept: Path | None) -> Copy:
    """What a copy holds, before anything is broken."""
    with looking(folder, key_file=key_file) as look:
        if look.pages_max > _PAGES_MAX:
            raise ConfigError(f"{folder}: {look.pages_max} pages are more than a drill can hold")
        out = page_array(look)
        sound, damaged = {}, len(look.scan.rejected) + len(look.scan.unreadable)
        for header, flaw in payload_flaws(look, look.scan.headers, out):
            if flaw is None:
                sound[header.page] = Sound(_digest(out), header.label)
            damaged += flaw is not None
        return Copy(folder, look.plan, look.shape, look.seal, look.pages_max, sound, damaged, kept)


@contextmanager
def _engine(root: Path) -> Iterator[PortableFiles]:
    """Through the page cache: a copy is about checksums and errors, not about the disk."""
    files = PortableFiles(root)
    try:
        yield files
    finally:
        files.shutdown()


def _digest(payload: Payload) -> bytes:
    return xxhash.xxh3_128_digest(payload.data)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tier's warnings, which a drill provokes, off a terminal without a log set up."""
    logger, handler = logging.getLogger("tierkv"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
