"""File engines for tests: a simulated disk that can crash, and a wrapper that fails by seed.

`MemoryFiles` keeps two states of every file: what a reader sees, and what would survive. A write
survives for sure once its file is synced, a name once the root is. `crash` draws, sector by sector,
what else survived; name changes survive in order, as in a journal. This is stricter than most file
systems, which is its purpose.

`FaultyFiles` wraps any engine and makes its calls fail, lie or wait, by a schedule or at rates.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from tierkv.testing.faults import ERRNO, Fault, Schedule, at_rates, from_then_on, once
from tierkv.tiers.files.base import Buffer, FileEngine, address_of, check_name

__all__ = ["Fault", "FaultyFiles", "MemoryFiles", "Schedule", "at_rates", "from_then_on", "once"]


@dataclass(slots=True, eq=False)
class _Inode:
    """One file: bytes as read now, bytes that survive, and the writes in between, in order."""

    seen: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)


class MemoryFiles:
    """A file engine on a simulated disk. Any thread; handles end with `crash` and `shutdown`."""

    name = "memory"
    align_bytes = 4096

    def __init__(self, root: Path, *, seed: int = 0, capacity_bytes: int = 1 << 40) -> None:
        self._root = root
        self._capacity_bytes = capacity_bytes
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._numbers = count(1)
        self._names: dict[str, _Inode] = {}
        self._durable_names: dict[str, _Inode] = {}
        self._unsynced_names: list[dict[str, _Inode]] = []
        self._handles: dict[int, _Inode] = {}
        self._locks: dict[int, str] = {}

    @classmethod
    def probe(cls, root: Path) -> str | None:
        """None: it works anywhere; `root` is only a name."""
        del root
        return None

    def crash(self) -> None:
        """Lose power: every file and name becomes what happened to survive."""
        with self._lock:
            survived = self._random.randint(0, len(self._unsynced_names))
            if survived:
                self._durable_names = self._unsynced_names[survived - 1]
            self._names = dict(self._durable_names)
            self._unsynced_names.clear()
            # In the order of their names: a seed gives the same fates in every process.
            for inode in dict.fromkeys(self._names[name] for name in sorted(self._names)):
                self._settle(inode)
            self.shutdown()

    def copy(self, *, seed: int) -> MemoryFiles:
        """The same disk as it is now, with another fate: nothing is shared, no handle is open."""
        with self._lock:
            other = MemoryFiles(self._root, seed=seed, capacity_bytes=self._capacity_bytes)
            made: dict[int, _Inode] = {}

            def twin(inode: _Inode) -> _Inode:
                if id(inode) not in made:
                    parts = bytearray(inode.seen), bytearray(inode.durable), list(inode.unsynced)
                    made[id(inode)] = _Inode(*parts)
                return made[id(inode)]

            def twins(names: dict[str, _Inode]) -> dict[str, _Inode]:
                return {name: twin(inode) for name, inode in names.items()}

            other._names = twins(self._names)
            other._durable_names = twins(self._durable_names)
            other._unsynced_names = [twins(names) for names in self._unsynced_names]
            return other

    def fail_sync(self, handle: int) -> None:
        """Drop a part of a file's unsynced writes and call it clean, as a failed fsync may."""
        with self._lock:
            self._settle(self._inode(handle))

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        with self._lock:
            return sorted(self._names)

    def open(self, name: str, *, create: bool = False) -> int:
        """A handle; creates the file if asked and absent."""
        check_name(name)
        with self._lock:
            if name not in self._names:
                if not create:
                    raise OSError(errno.ENOENT, "no such file", name)
                self._change_names({**self._names, name: _Inode()})
            handle = next(self._numbers)
            self._handles[handle] = self._names[name]
        return handle

    def close(self, handle: int) -> None:
        """Give a handle back."""
        with self._lock:
            self._inode(handle)
            del self._handles[handle]
            self._locks.pop(handle, None)

    def size(self, handle: int) -> int:
        """The file's length in bytes."""
        return len(self._inode(handle).seen)

    def allocated(self, handle: int) -> int:
        """The file's length: this disk has no holes."""
        return self.size(handle)

    def preallocate(self, handle: int, size_bytes: int) -> None:
        """Make the file at least `size_bytes` long."""
        with self._lock:
            self._apply(self._inode(handle), size_bytes, b"")

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers, in order, from `offset`."""
        self._check_alignment(offset, buffers)
        with self._lock:
            inode = self._inode(handle)
            for view in buffers:
                if offset + len(view) > len(inode.seen):
                    raise OSError(errno.EIO, "end of file", str(self._root))
                view[:] = inode.seen[offset : offset + len(view)]
                offset += len(view)

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order, at `offset`."""
        self._check_alignment(offset, buffers)
        with self._lock:
            self._apply(self._inode(handle), offset, b"".join(buffers))

    def sync(self, handle: int) -> None:
        """Make everything written to the file durable."""
        with self._lock:
            inode = self._inode(handle)
            inode.durable = bytearray(inode.seen)
            inode.unsynced.clear()

    def rename(self, source: str, target: str) -> None:
        """Replace `target` by `source` atomically."""
        check_name(target)
        with self._lock:
            self._expect_name(source)
            names = dict(self._names)
            names[target] = names.pop(source)
            self._change_names(names)

    def unlink(self, name: str) -> None:
        """Remove a file."""
        with self._lock:
            self._expect_name(name)
            self._change_names({n: inode for n, inode in self._names.items() if n != name})

    def sync_root(self) -> None:
        """Make names durable."""
        with self._lock:
            self._durable_names = dict(self._names)
            self._unsynced_names.clear()

    def lock(self, name: str) -> int:
        """A handle that holds an exclusive lock until closed."""
        with self._lock:
            if name in self._locks.values():
                raise OSError(errno.EAGAIN, "locked", name)
            handle = self.open(name, create=True)
            self._locks[handle] = name
        return handle

    def shutdown(self) -> None:
        """Close every handle; the disk keeps what was written, for the next user."""
        with self._lock:
            self._handles.clear()
            self._locks.clear()

    def _inode(self, handle: int) -> _Inode:
        inode = self._handles.get(handle)
        if inode is None:
            raise OSError(errno.EBADF, "handle is not open", str(self._root))
        return inode

    def _expect_name(self, name: str) -> None:
        if check_name(name) not in self._names:
            raise OSError(errno.ENOENT, "no such file", name)

    def _change_names(self, names: dict[str, _Inode]) -> None:
        self._names = names
        self._unsynced_names.append(dict(names))

    def _apply(self, inode: _Inode, offset: int, data: bytes) -> None:
        grown = max(0, offset + len(data) - len(inode.seen))
        used = sum(len(other.seen) for other in set(self._names.values()))
        if grown and used + grown > self._capacity_bytes:
            raise OSError(errno.ENOSPC, "simulated disk is full", str(self._root))
        inode.unsynced.append((offset, data))
        _put(inode.seen, offset, data)

    def _settle(self, inode: _Inode) -> None:
        """Keep each unsynced sector with a chance that is itself drawn, and call all durable."""
        sector = self._random.choice((512, 4096))
        chance = self._random.choice((0.0, 0.5, 0.95, 1.0))
        for offset, data in inode.unsynced:
            for start in range(0, max(1, len(data)), sector):
                if self._random.random() < chance:
                    _put(inode.durable, offset + start, data[start : start + sector])
        inode.unsynced.clear()
        inode.seen = bytearray(inode.durable)

    def _check_alignment(self, offset: int, buffers: Sequence[Buffer]) -> None:
        for view in buffers:
            if not len(view):
                continue
            address = address_of(np.frombuffer(view, dtype=np.uint8))
            if any(value % self.align_bytes for value in (offset, len(view), address)):
                raise OSError(errno.EINVAL, "unaligned transfer", str(self._root))


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    """Overwrite `data` at `offset`, with zeros in front if it is shorter."""
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(piece)] = piece


class FaultyFiles:
    """`inner` with faults. Any thread; with one thread, a seed replays exactly.

    Set `schedule` to None to heal it. `calls` counts the calls that a schedule was asked about.
    """

    name = "faulty"

    def __init__(
        self,
        inner: FileEngine,
        schedule: Schedule | None = None,
        *,
        seed: int = 0,
        delay_s: float = 0.01,
    ) -> None:
        self.align_bytes = inner.align_bytes
        self.schedule = schedule
        self.calls = 0
        #: How often each fault was injected.
        self.injected: dict[Fault, int] = dict.fromkeys(Fault, 0)
        self._inner = inner
        self._random = random.Random(seed)
        self._delay_s = delay_s
        # Reentrant, so that a schedule may use the engine: that is how tests make a race certain.
        self._lock = threading.RLock()

    @classmethod
    def probe(cls, root: Path) -> str | None:
        """None: it works where its inner engine does."""
        del root
        return None

    def crash(self) -> None:
        """Lose power. Only over `MemoryFiles`; TypeError for an engine that cannot."""
        if not isinstance(self._inner, MemoryFiles):
            raise TypeError(f"{self._inner.name} files cannot crash")
        self._inner.crash()

    def names(self) -> list[str]:
        """As the inner engine."""
        return self._inner.names()

    def open(self, name: str, *, create: bool = False) -> int:
        """As the inner engine, or a fault."""
        self._strike("open", name)
        return self._inner.open(name, create=create)

    def close(self, handle: int) -> None:
        """As the inner engine."""
        self._inner.close(handle)

    def size(self, handle: int) -> int:
        """As the inner engine."""
        return self._inner.size(handle)

    def allocated(self, handle: int) -> int:
        """As the inner engine."""
        return self._inner.allocated(handle)

    def preallocate(self, handle: int, size_bytes: int) -> None:
        """As the inner engine, or a fault."""
        self._strike("preallocate", "")
        self._inner.preallocate(handle, size_bytes)

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """As the inner engine, or a fault."""
        fault = self._strike("read", "")
        if fault is Fault.SHORT:
            self._inner.read(handle, offset, buffers[: len(buffers) // 2])
            raise OSError(errno.EIO, "injected short read")
        self._inner.read(handle, offset, buffers)
        if fault is Fault.FLIP:
            with self._lock:
                view = self._random.choice([view for view in buffers if len(view)])
                view[self._random.randrange(len(view))] ^= 1 << self._random.randrange(8)

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """As the inner engine, or a fault."""
        fault = self._strike("write", "")
        if fault is Fault.SHORT:
            self._inner.write(handle, offset, buffers[: len(buffers) // 2])
            raise OSError(errno.EIO, "injected short write")
        if fault is Fault.MISDIRECTED:
            offset = self._elsewhere(handle, offset, sum(map(len, buffers)))
        if fault is not Fault.LOST:
            self._inner.write(handle, offset, buffers)

    def sync(self, handle: int) -> None:
        """As the inner engine, or a fault, which over `MemoryFiles` drops what was unsynced."""
        try:
            self._strike("sync", "")
        except OSError:
            if isinstance(self._inner, MemoryFiles):
                self._inner.fail_sync(handle)
            raise
        self._inner.sync(handle)

    def rename(self, source: str, target: str) -> None:
        """As the inner engine, or a fault."""
        self._strike("rename", source)
        self._inner.rename(source, target)

    def unlink(self, name: str) -> None:
        """As the inner engine."""
        self._inner.unlink(name)

    def sync_root(self) -> None:
        """As the inner engine, or a fault."""
        self._strike("sync_root", "")
        self._inner.sync_root()

    def lock(self, name: str) -> int:
        """As the inner engine."""
        return self._inner.lock(name)

    def shutdown(self) -> None:
        """As the inner engine."""
        self._inner.shutdown()

    def _elsewhere(self, handle: int, offset: int, size_bytes: int) -> int:
        """Another place of the file where as much fits; the same where there is none."""
        step = max(1, self.align_bytes)
        last = (self._inner.size(handle) - size_bytes) // step
        with self._lock:
            return self._random.randint(0, last) * step if last > 0 else offset

    def _strike(self, operation: str, name: str) -> Fault | None:
        """Ask the schedule; raise or wait here, return what the caller must do itself."""
        with self._lock:
            fault = None if self.schedule is None else self.schedule(self.calls, operation)
            self.calls += 1
            if fault is not None:
                self.injected[fault] += 1
        code = None if fault is None else ERRNO.get(fault)
        if code is not None:
            raise OSError(code, f"injected into {operation}", name or None)
        if fault is Fault.DELAY:
            time.sleep(self._delay_s)
        return fault
