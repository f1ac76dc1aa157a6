"""What both engines on a real file system share: one directory, opened once, never left.

Every name is opened relative to the root's descriptor, without following links, and must turn out
to be a regular file of ours with one name; anything else in its place (a symbolic or hard link, a
device, a pipe, another user's file) is refused with its name. Handles are our own numbers, so a
handle used after `close` fails with EBADF instead of reaching a file that took the descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from tierkv.tiers.files.base import Buffer, aligned_array, check_name
from tierkv.tiers.files.beneath import open_beneath, open_directory

#: O_NONBLOCK keeps a pipe or device that took a file's place from blocking the open.
_OPEN_FLAGS = os.O_RDWR | os.O_NONBLOCK


class RootedFiles(ABC):
    """Names, handles, locks and durability of one directory; subclasses move the bytes.

    The directory is created, mode 0700, if absent. Any thread.
    """

    name: str
    align_bytes: int = 1
    #: Flags that this engine adds when it opens a file for reading and writing.
    open_flags: int = 0

    def __init__(self, root: Path) -> None:
        self._root = root
        self._root_fd = _open_root(root)
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._files: dict[int, tuple[int, str]] = {}

    @classmethod
    def probe(cls, root: Path) -> str | None:
        """None if this engine works beneath `root`, else the reason why not.

        Writes, syncs and reads back a scratch file; creates the root if it is absent.
        """
        name = f"probe-{os.getpid()}-{threading.get_ident()}.tmp"
        try:
            engine = cls(root)
        except OSError as error:
            return str(error)
        try:
            return engine._write_and_read_back(name)
        except OSError as error:
            return f"{root}: {cls.name} I/O is refused here: {error}"
        finally:
            with suppress(OSError):
                engine.unlink(name)
            engine.shutdown()

    def names(self) -> list[str]:
        """The names of all regular files in the root, sorted."""
        with os.scandir(self._root_fd) as entries:
            return sorted(e.name for e in entries if e.is_file(follow_symlinks=False))

    def open(self, name: str, *, create: bool = False) -> int:
        """A handle for reading and writing; creates the file, mode 0600, if asked and absent."""
        return self._adopt(self._open_beneath(name, self.open_flags, create=create), name)

    def close(self, handle: int) -> None:
        """Give a handle back; a lock that it holds is released."""
        with self._lock:
            file = self._files.pop(handle, None)
        if file is None:
            raise OSError(errno.EBADF, "handle is not open", str(self._root))
        os.close(file[0])

    def size(self, handle: int) -> int:
        """The file's length in bytes."""
        return os.fstat(self._fd(handle)).st_size

    def allocated(self, handle: int) -> int:
        """Bytes of disk the file takes, holes not counted."""
        # stat(2) counts in units of 512 bytes, whatever the file system's block size.
        return os.fstat(self._fd(handle)).st_blocks * 512

    def preallocate(self, handle: int, size_bytes: int) -> None:
        """Make the file at least `size_bytes` long with its blocks reserved."""
        with self._named(handle):
            os.posix_fallocate(self._fd(handle), 0, size_bytes)

    @abstractmethod
    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers, in order, from `offset`. Raises OSError(EIO) at end of file."""

    @abstractmethod
    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order, at `offset`."""

    def sync(self, handle: int) -> None:
        """Make everything written to the file durable (fdatasync)."""
        # Always the descriptor of `open`: the kernel reports a lost write once per descriptor
        # that was open when it was lost.
        with self._named(handle):
            os.fdatasync(self._fd(handle))

    def rename(self, source: str, target: str) -> None:
        """Replace `target` by `source` atomically."""
        fd = self._root_fd
        os.rename(check_name(source), check_name(target), src_dir_fd=fd, dst_dir_fd=fd)
        with self._lock:
            for handle, (file, name) in self._files.items():
                if name == source:
                    self._files[handle] = (file, target)

    def unlink(self, name: str) -> None:
        """Remove a file."""
        os.unlink(check_name(name), dir_fd=self._root_fd)

    def sync_root(self) -> None:
        """Make names (creations, renames, removals) durable."""
        os.fsync(self._root_fd)

    def lock(self, name: str) -> int:
        """A handle that holds an exclusive lock until closed. Raises BlockingIOError if held."""
        fd = self._open_beneath(name, 0, create=True)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise OSError(error.errno, error.strerror, str(self._root / name)) from error
        return self._adopt(fd, name)

    def shutdown(self) -> None:
        """Close every handle and the root; the engine cannot be used afterwards."""
        with self._lock:
            files, self._files = self._files, {}
            root_fd, self._root_fd = self._root_fd, -1
        for fd, _ in files.values():
            os.close(fd)
        if root_fd >= 0:
            os.close(root_fd)

    def _fd(self, handle: int) -> int:
        return self._file(handle)[0]

    def _file(self, handle: int) -> tuple[int, str]:
        """Descriptor and present name of a handle."""
        file = self._files.get(handle)
        if file is None:
            raise OSError(errno.EBADF, "handle is not open", str(self._root))
        return file

    def _adopt(self, fd: int, name: str) -> int:
        with self._lock:
            handle = next(self._numbers)
            self._files[handle] = (fd, name)
        return handle

    @contextmanager
    def _named(self, handle: int) -> Iterator[None]:
        """Puts the file's path into an OSError that lacks it, as all on descriptors do."""
        try:
            yield
        except OSError as error:
            if error.filename is not None:
                raise
            path = str(self._root / self._file(handle)[1])
            raise OSError(error.errno, error.strerror, path) from error

    def _open_beneath(self, name: str, flags: int, *, create: bool = False) -> int:
        """A checked descriptor of a plain file in the root."""
        flags |= _OPEN_FLAGS | (os.O_CREAT if create else 0)
        path = str(self._root / check_name(name))
        try:
            fd = open_beneath(name, flags, self._root_fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
        reason = _refusal(os.fstat(fd))
        if reason is not None:
            os.close(fd)
            raise OSError(errno.EPERM, f"refused: {reason}", path)
        return fd

    def _write_and_read_back(self, name: str) -> str | None:
        handle = self.open(name, create=True)
        size = 4 * 4096
        wrote = aligned_array(size, 4096)
        wrote[:] = 0xA5
        found = aligned_array(size, 4096)
        self.preallocate(handle, 2 * size)
        self.write(handle, size, [wrote.data])
        self.sync(handle)
        self.read(handle, size, [found.data])
        return None if bytes(found) == bytes(wrote) else f"{self._root}: read back other bytes"


def _open_root(root: Path) -> int:
    """A descriptor of the root directory, created 0700 if absent; OSError if it is unsafe.

    A link in its place is followed if we made it: it is how a directory is moved to another disk.
    """
    try:
        _make_directory(root)
        fd = open_directory(str(root), _link_refusal)
    except OSError as error:
        words = f"{error.strerror}; cure: a directory of yours there, or another place"
        raise OSError(error.errno, words, error.filename) from error
    status = os.fstat(fd)
    reason = None
    if status.st_uid != os.geteuid():
        reason = f"it belongs to uid {status.st_uid}, not to us (uid {os.geteuid()}); cure: chown"
    elif status.st_mode & 0o022:
        reason = f"others may write to it (mode {status.st_mode & 0o777:04o}); cure: chmod 700"
    if reason is not None:
        os.close(fd)
        raise OSError(errno.EPERM, f"refused: {reason}", str(root))
    return fd


def _make_directory(path: Path) -> None:
    """Make it, mode 0700, and what is missing above it; one by one, as `parents=True` recurses."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        for parent in reversed(path.parents):
            parent.mkdir(exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)


def _link_refusal(status: os.stat_result) -> str | None:
    """Why a link in the root's place is not followed, or None."""
    if status.st_uid == os.geteuid():
        return None
    return f"refused: it is a link of uid {status.st_uid}, not of ours (uid {os.geteuid()})"


def _refusal(status: os.stat_result) -> str | None:
    """Why a file cannot be trusted, or None."""
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_nlink != 1:
        return f"it has {status.st_nlink} names (hard links)"
    if status.st_uid != os.geteuid():
        return f"it belongs to uid {status.st_uid}, not to us (uid {os.geteuid()})"
    if status.st_mode & 0o022:
        return f"others may write to it (mode {status.st_mode & 0o777:04o}); cure: chmod 600"
    return None
