"""Scrub: read and verify everything in a cold directory at a bounded rate, over several sittings.

Progress. How far a pass got is kept in the user's cache directory, one small file for each layout's
folder, named by the hash of its path: in the folder itself it would be a file that the store does
not know. It holds the store's id, so that another store at the same path is begun anew, and the
damaged pages found so far, which are read again when the pass goes on, so that the last report is
whole. It is removed when a pass over all folders is done. Lost or damaged, it costs a pass from the
beginning.

A rewritten page may be missed by a pass that was interrupted before: its write is newer than the
pass, and is read by the next one. Every read waits for its turn, headers too. Single owner.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Protocol

import msgspec

from tierkv.core.errors import ConfigError
from tierkv.upkeep.pace import Pace
from tierkv.upkeep.reading import Look, layout_directories, looking
from tierkv.upkeep.report import LayoutReport, header_flaws, payload_flaws, report_of

#: Progress is written this often at most: a stop costs no more than this much reading again.
SAVE_SECONDS: Final = 5.0
#: Between two passes nothing is read or locked.
PAUSE_SECONDS: Final = 60.0
#: A pass that finds more than this is reported in full, but goes on with only so many.
_DAMAGED_MAX: Final = 100_000

_Page = Annotated[int, msgspec.Meta(ge=0)]


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """How far a pass got: pages below `next_page` were read."""

    store_id: str
    next_page: _Page = 0
    damaged: Annotated[list[_Page], msgspec.Meta(max_length=_DAMAGED_MAX)] = []


class Listener(Protocol):
    """Who is told how a scrub goes."""

    def began(self, root: Path, next_page: int, pages: int) -> None:
        """A folder is being read, from `next_page` of `pages` on."""

    def finished(self, report: LayoutReport) -> None:
        """A folder was read to its end."""

    def stopped(self, root: Path, next_page: int | None) -> None:
        """A folder was left at `next_page`, None while its headers were still being read."""


def default_progress_directory() -> Path:
    """Beneath the user's cache directory. Raises ConfigError where there is none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(base) if base.startswith("/") else Path("~/.cache").expanduser()
    except RuntimeError:
        raise ConfigError("there is no home directory; cure: set XDG_CACHE_HOME") from None
    return cache / "tierkv" / "scrub"


@dataclass(slots=True)
class Scrub:
    """One or more passes over the folders at `path`."""

    path: Path
    bytes_per_s: int
    listener: Listener
    key_file: Path | None = None
    progress_directory: Path = field(default_factory=default_progress_directory)
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def run(self, *, once: bool) -> bool:
        """Pass after pass until one finds damage, or one only; True if nothing was damaged.

        Raises ConfigError for what is no cold directory or is in use; KeyboardInterrupt, with the
        progress written, where it is interrupted.
        """
        pace = Pace(self.bytes_per_s, now=self.now, sleep=self.sleep)
        while True:
            roots = layout_directories(self.path)
            reports = [self._scrub(root, pace) for root in roots]
            for root in roots:
                progress_file(self.progress_directory, root).unlink(missing_ok=True)
            is_good = not any(report.damage for report in reports)
            if once or not is_good:
                return is_good
            self.sleep(PAUSE_SECONDS)

    def _scrub(self, root: Path, pace: Pace) -> LayoutReport:
        file = progress_file(self.progress_directory, root)
        progress: Progress | None = None
        try:
            with looking(root, before_read=pace.take, key_file=self.key_file) as look:
                progress = load_progress(file, look.shape.store_id.hex())
                self.listener.began(root, progress.next_page, look.pages_max)
                report = self._read(look, progress, file)
                # Kept until the whole pass is done: a folder is not read twice in one.
                progress.next_page = look.pages_max
                save_progress(file, progress)
        except KeyboardInterrupt:
            if progress is not None:
                save_progress(file, progress)
            self.listener.stopped(root, None if progress is None else progress.next_page)
            raise
        self.listener.finished(report)
        return report

    def _read(self, look: Look, progress: Progress, file: Path) -> LayoutReport:
        again = set(progress.damaged)
        headers = [h for h in look.scan.headers if h.page >= progress.next_page or h.page in again]
        flaws = header_flaws(look)
        saved_at = self.now()
        for header, flaw in payload_flaws(look, headers):
            if flaw is not None:
                flaws.append(flaw)
                if header.page not in again and len(progress.damaged) < _DAMAGED_MAX:
                    progress.damaged.append(header.page)
            progress.next_page = max(progress.next_page, header.page + 1)
            if self.now() - saved_at >= SAVE_SECONDS:
                save_progress(file, progress)
                saved_at = self.now()
        return report_of(look, flaws, is_deep=True)


def progress_file(directory: Path, root: Path) -> Path:
    """Where the progress of the folder `root` is kept."""
    return directory / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.json"


def load_progress(file: Path, store_id: str) -> Progress:
    """The progress in `file`, or none yet if it is lost, damaged, or of another store."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Progress)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Progress(store_id)
    return found if found.store_id == store_id else Progress(store_id)


def save_progress(file: Path, progress: Progress) -> None:
    """Write `file`, mode 0600, whole or not at all."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    tmp = file.with_suffix(f".{os.getpid()}.tmp")
    tmp.unlink(missing_ok=True)
    descriptor = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(msgspec.json.encode(progress))
        out.flush()
        os.fsync(out.fileno())
    tmp.replace(file)
