"""What a file engine promises to the cold tier.

An engine works beneath one root directory and knows files by plain names (no separators). Its
calls block; the transfer engine's file lane calls them from several threads at once, on
different ranges. A read or write moves exactly the bytes asked for or raises: a short read or
write is never an answer. Errors are `OSError` with the file's name; what they mean for the tier
is decided above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

#: A contiguous run of bytes, format "B"; writable where it is read into.
Buffer: TypeAlias = memoryview

#: A disk moves less than this in a fraction of the time that a page takes.
TURN_BYTES: Final = 128 << 10


def aligned_array(size_bytes: int, align_bytes: int) -> npt.NDArray[np.uint8]:
    """A zeroed uint8 array (size_bytes,) whose address is a multiple of `align_bytes`."""
    raw = np.zeros(size_bytes + align_bytes, dtype=np.uint8)
    start = -address_of(raw) % align_bytes
    return raw[start : start + size_bytes]


def address_of(array: npt.NDArray[np.uint8]) -> int:
    """Where the array's first byte lies in memory."""
    address: int = array.__array_interface__["data"][0]
    return address


def in_turns(offset: int, buffers: Sequence[Buffer]) -> Iterator[tuple[int, Buffer]]:
    """Cut a request into small ones: what somebody else asks of the disk waits for one of them.

    The offset and the bytes of each, at most `TURN_BYTES`.
    """
    for view in buffers:
        for at in range(0, len(view), TURN_BYTES):
            yield offset + at, view[at : at + TURN_BYTES]
        offset += len(view)


def check_name(name: str) -> str:
    """`name` if it is a plain file name, so that no path can leave the root; else ValueError."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


class FileEngine(Protocol):
    """Files of one directory, by name and handle. Any thread, unless a method says otherwise.

    `auto` passes over a class that sets `by_name_only = True`.
    """

    #: The name in the registry.
    name: str
    #: Alignment of offsets, lengths and buffer addresses that reads and writes need; 1 if none.
    align_bytes: int

    def __init__(self, root: Path) -> None: ...

    @classmethod
    def probe(cls, root: Path) -> str | None:
        """None if this engine works beneath `root`, else the reason why not."""
        ...

    def names(self) -> list[str]:
        """The names of all regular files in the root, sorted."""
        ...

    def open(self, name: str, *, create: bool = False) -> int:
        """A handle for reading and writing; creates the file, mode 0600, if asked and absent."""
        ...

    def close(self, handle: int) -> None:
        """Give a handle back."""
        ...

    def size(self, handle: int) -> int:
        """The file's length in bytes."""
        ...

    def allocated(self, handle: int) -> int:
        """Bytes of disk the file takes, holes not counted."""
        ...

    def preallocate(self, handle: int, size_bytes: int) -> None:
        """Make the file at least `size_bytes` long, blocks reserved, so that writes cannot ENOSPC.

        Bytes that were never written read as zeros.
        """
        ...

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers, in order, from `offset`. Raises OSError(EIO) at end of file.

        After an error the buffers hold anything.
        """
        ...

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order, at `offset`. After an error the range holds anything."""
        ...

    def sync(self, handle: int) -> None:
        """Make everything written through this handle durable (fdatasync)."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Replace `target` by `source` atomically."""
        ...

    def unlink(self, name: str) -> None:
        """Remove a file."""
        ...

    def sync_root(self) -> None:
        """Make names (creations, renames, removals) durable."""
        ...

    def lock(self, name: str) -> int:
        """A handle that holds an exclusive lock until closed. Raises BlockingIOError if held."""
        ...

    def shutdown(self) -> None:
        """Close every handle and end the engine's own threads, if it has any."""
        ...
