"""Status: a small file by which other processes learn how a living store's breaker stands.

One JSON file for each store, mode 0600, ``PID-RANDOM.json`` in a directory of the user's own, mode
0700: `tierkv` in `XDG_RUNTIME_DIR`, or `tierkv-UID` beneath the directory for temporary files.
Never beneath the cold directory: that disk may hang. It is written when the store opens and at each
change of state, whole or not at all, and removed when the store closes.

What cannot be written is logged once and disturbs nobody. One thread at a time writes; another that
finds it at work leaves the change to it and goes on, so that a hung file system holds no more than
one. What a dead process left behind is removed by whoever lists what there is.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec
import psutil

from tierkv.transfer.breaker import Breaker, State

logger = logging.getLogger(__name__)

#: A file of ours is far smaller; a larger one is not read.
_STATUS_BYTES_MAX: Final = 64 << 10
#: The kernel tells when it started in whole seconds, and psutil counts from there.
_START_ERROR_S: Final = 1.0


_Wall = Annotated[float, msgspec.Meta(ge=0, le=1e11)]


class Status(msgspec.Struct, frozen=True):
    """How a store's cold tier stood at `written`; both times are wall times in seconds.

    `since` is when the breaker closed, or when it first opened after it was last closed.
    """

    pid: int
    directory: str
    state: int
    since: _Wall
    skipped: int
    written: _Wall


class StatusFile:
    """The status of one store; `open`, `write` and `close` never raise. Any thread."""

    def __init__(self, directory: Path, breaker: Breaker) -> None:
        self._directory = os.fsencode(directory).decode("utf-8", "backslashreplace")
        self._breaker = breaker
        self._path: Path | None = None
        self._is_closed_breaker = True
        self._since = time.time()
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._is_wanted = False
        self._is_writing = False
        self._is_over = False

    def open(self) -> None:
        """Write the first status, and another one at each change of state from now on."""
        try:
            folder = _own_directory()
        except OSError as error:
            logger.warning("no status file: `tierkv doctor` will not list this store: %s", error)
            return
        self._path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        self._breaker.on_change = self.write
        self.write()

    def write(self) -> None:
        """Write how it stands now, or have the thread that is writing do so."""
        with self._lock:
            self._is_wanted = True
            if self._is_writing:
                return
            self._is_writing = True
        while True:
            with self._lock:
                if self._is_over:
                    self._remove()
                if not self._is_wanted or self._is_over:
                    self._is_writing = False
                    return
                self._is_wanted = False
            self._write()

    def close(self) -> None:
        """Remove the file; a thread that is writing it now removes it when it is done."""
        self._breaker.on_change = None
        with self._lock:
            self._is_over = True
            if not self._is_writing:
                self._remove()

    def _write(self) -> None:
        """By one thread at a time."""
        if self._path is None:
            return
        breaker, now = self._breaker, time.time()
        state = breaker.state
        if (state is State.CLOSED) != self._is_closed_breaker:
            self._is_closed_breaker, self._since = state is State.CLOSED, now
        found = Status(
            os.getpid(), self._directory, state, self._since, breaker.skipped, written=now
        )
        try:
            _replace(self._path, msgspec.json.encode(found))
        except OSError as error:
            self._path = None
            logger.warning("status file is given up, for `tierkv doctor` only: %s", error)

    def _remove(self) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def living_stores() -> list[Status]:
    """The status of every store of this user that is open, by pid; what dead ones left is removed.

    A file that cannot be read, or is no status, is passed over.
    """
    found: list[Status] = []
    for folder in _places():
        try:
            _expect_own(folder)
            paths = sorted(folder.iterdir())
        except OSError:
            continue  # not there, or not ours: no store of this user has written there
        found += _living_in(paths)
    return sorted(found, key=lambda status: status.pid)


def _living_in(paths: list[Path]) -> Iterator[Status]:
    for path in paths:
        pid, _, rest = path.name.partition("-")
        if not (pid.isascii() and pid.isdigit() and rest.endswith((".json", ".tmp"))):
            continue
        try:
            written = path.lstat().st_mtime
            if not _is_alive(int(pid), written):
                path.unlink()
            elif rest.endswith(".json"):
                yield _read(path)
        except (OSError, ValueError):  # it went away meanwhile, or is none of ours
            continue


def _is_alive(pid: int, written: float) -> bool:
    """Whether the process that wrote something at `written` lives; not another with its pid."""
    try:
        process = psutil.Process(pid)
        is_first = process.create_time() <= written + _START_ERROR_S
        return is_first and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OverflowError):
        return False


def _read(path: Path) -> Status:
    """Raises OSError, ValueError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a plain file")
        status = msgspec.json.decode(file.read(_STATUS_BYTES_MAX), type=Status)
    State(status.state)
    return status


def _places() -> list[Path]:
    """Where a store of this user may have left its status, in the order in which it tries them."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    beneath = [Path(runtime) / "tierkv"] if runtime.startswith("/") else []
    return [*beneath, Path(tempfile.gettempdir()) / f"tierkv-{os.geteuid()}"]


def _own_directory() -> Path:
    """The first place that is ours or can be made so. Raises OSError with every reason."""
    reasons = []
    for folder in _places():
        try:
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            _expect_own(folder)
        except OSError as error:
            reasons.append(str(error))
        else:
            return folder
    raise OSError(errno.EPERM, "; ".join(reasons))


def _expect_own(folder: Path) -> None:
    """OSError unless it is a directory, no link, that this user owns and no other may enter."""
    status = folder.lstat()
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_ours or status.st_mode & 0o077:
        raise OSError(errno.EPERM, "refused: not a directory of this user's own", str(folder))


def _replace(path: Path, data: bytes) -> None:
    tmp = path.with_suffix(".tmp")
    tmp.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(tmp, flags, 0o600), "wb") as file:
        file.write(data)
    tmp.replace(path)
