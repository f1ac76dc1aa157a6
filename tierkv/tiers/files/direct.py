"""Direct files: O_DIRECT with preadv and pwritev, from the calling thread.

Bytes go between the caller's buffers and the device without a copy and without the page cache, so
the host tier is the only cache of them in RAM and a checksum checks what the device holds.
Offsets, lengths and addresses are multiples of 4096, which satisfies every device we know.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tierkv.tiers.files.base import Buffer
from tierkv.tiers.files.root import RootedFiles

_IOV_MAX = os.sysconf("SC_IOV_MAX")


class DirectFiles(RootedFiles):
    """The engine for local disks. Any thread; holds no thread of its own."""

    name = "direct"
    align_bytes = 4096
    open_flags = getattr(os, "O_DIRECT", 0)

    @classmethod
    def probe(cls, root: Path) -> str | None:
        """None if O_DIRECT works beneath `root`, else the reason why not."""
        if not cls.open_flags:
            return "this platform has no O_DIRECT"
        return super().probe(root)

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers, in order, from `offset`. Raises OSError(EIO) at end of file."""
        with self._named(handle):
            self._move_all(os.preadv, self._fd(handle), offset, buffers)

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order, at `offset`."""
        with self._named(handle):
            self._move_all(os.pwritev, self._fd(handle), offset, buffers)

    def _move_all(
        self,
        move: Callable[[int, Sequence[Buffer], int], int],
        fd: int,
        offset: int,
        buffers: Sequence[Buffer],
    ) -> None:
        """Repeat `move` until every buffer is done. EINTR is retried inside `move` (PEP 475)."""
        views = [view for view in buffers if len(view)]
        while views:
            batch = views[:_IOV_MAX]
            moved = move(fd, batch, offset)
            # After a short transfer only whole sectors count, as the next call must be aligned.
            moved -= moved % self.align_bytes
            if moved <= 0:
                raise OSError(errno.EIO, f"end of file or no progress at offset {offset}")
            offset += moved
            views = _after(views, moved)


def _after(views: Sequence[Buffer], moved: int) -> list[Buffer]:
    """What is left of `views` once their first `moved` bytes are done."""
    for index, view in enumerate(views):
        if moved < len(view):
            return [view[moved:], *views[index + 1 :]]
        moved -= len(view)
    return []
