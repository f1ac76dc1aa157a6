"""A file engine for looking: it reads, and only takes note of what it is told to change."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tierkv.tiers.files.base import Buffer, FileEngine, aligned_array, in_turns
from tierkv.tiers.files.direct import DirectFiles
from tierkv.tiers.files.portable import PortableFiles

_NO_LOCK: Final = -1
#: What every engine can read in one piece.
_PIECE_BYTES: Final = 4096


class LookingFiles:
    """`inner` for reading; what it is told to write or remove is believed and not done.

    `before_read` hears of each read's bytes first, and may wait. Reads are cut for it: somebody who
    needs the disk meanwhile waits for a piece, not for a page.
    """

    name = "looking"

    def __init__(self, inner: FileEngine, before_read: Callable[[int], None] | None = None) -> None:
        self.align_bytes = inner.align_bytes
        self.inner = inner
        self._before_read = before_read
        self._hidden: set[str] = set()
        self._lock_handle: int | None = inner.lock("lock") if "lock" in inner.names() else None

    @classmethod
    def probe(cls, root: Path) -> str | None:
        """None: it works where its inner engine does."""
        del root
        return None

    def hide(self, name: str) -> None:
        """Have no such file, as if it had been removed."""
        self._hidden.add(name)

    def names(self) -> list[str]:
        """The names of the files that are not hidden."""
        return [name for name in self.inner.names() if name not in self._hidden]

    def open(self, name: str, *, create: bool = False) -> int:
        """A handle of a file that is there."""
        if create:
            raise OSError(errno.EROFS, "not made while looking", name)
        return self.inner.open(name)

    def close(self, handle: int) -> None:
        """Give a handle back; the lock stays, until `shutdown`."""
        if handle not in (self._lock_handle, _NO_LOCK):
            self.inner.close(handle)

    def size(self, handle: int) -> int:
        """As the inner engine."""
        return self.inner.size(handle)

    def allocated(self, handle: int) -> int:
        """As the inner engine."""
        return self.inner.allocated(handle)

    def preallocate(self, handle: int, size_bytes: int) -> None:
        """Never asked for while looking."""
        raise OSError(errno.EROFS, f"no {size_bytes} bytes for {handle} while looking")

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """As the inner engine; where each read has its turn, in small pieces."""
        if self._before_read is None:
            self.inner.read(handle, offset, buffers)
            return
        for at, piece in in_turns(offset, buffers):
            self._before_read(len(piece))
            self.inner.read(handle, at, [piece])

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Believed and not done."""

    def sync(self, handle: int) -> None:
        """Nothing was written."""

    def rename(self, source: str, target: str) -> None:
        """Never asked for while looking."""
        raise OSError(errno.EROFS, f"not renamed to {target} while looking", source)

    def unlink(self, name: str) -> None:
        """Believed and not done."""
        self.hide(name)

    def sync_root(self) -> None:
        """Nothing was changed."""

    def lock(self, name: str) -> int:
        """The lock that this engine holds since it was made."""
        del name
        return _NO_LOCK if self._lock_handle is None else self._lock_handle

    def shutdown(self) -> None:
        """Unlock and close everything."""
        self.inner.shutdown()


def reading_engine(root: Path) -> DirectFiles | PortableFiles:
    """Past the page cache where that works: what is in RAM says nothing about the disk.

    The engines' own probes are not asked, as they write. Raises OSError.
    """
    direct = DirectFiles(root)
    if _can_read(direct):
        return direct
    direct.shutdown()
    return PortableFiles(root)


def _can_read(files: FileEngine) -> bool:
    """Whether the engine reads here, tried on a file that is there; writes nothing."""
    page = aligned_array(_PIECE_BYTES, _PIECE_BYTES)
    for name in files.names():
        try:
            handle = files.open(name)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            continue
        try:
            if files.size(handle) >= _PIECE_BYTES:
                files.read(handle, 0, [page.data])
                return True
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
        finally:
            files.close(handle)
    return True
