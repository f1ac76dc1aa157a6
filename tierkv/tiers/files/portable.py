"""Portable files: aiofiles on one event loop, for file systems that refuse O_DIRECT.

Model. One loop thread and a bounded pool of workers serve the whole engine; a caller posts one
coroutine and waits for it. aiofiles has no positioned read, a handle is a position, so each file
has a pool of aiofiles handles and a transfer owns one from its seek to its last byte. Handles are
raw (`buffering=0`): `readinto` fills the caller's buffer, and no byte waits in Python for a flush.

Invariants: a pooled handle is the same inode as the descriptor that `open` gave (checked when it is
made); at most `_HANDLES_PER_FILE` of them; the pools belong to the loop thread alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import aiofiles

from tierkv.tiers.files.base import Buffer
from tierkv.tiers.files.root import RootedFiles

if TYPE_CHECKING:
    from pathlib import Path

    from aiofiles.threadpool.binary import AsyncFileIO

_WORKERS = 8
#: Few, because a large tier has many files and a process has a limit on descriptors.
_HANDLES_PER_FILE = 4
_T = TypeVar("_T")


class PortableFiles(RootedFiles):
    """The engine for any file system. Any thread may call it; calls block until done."""

    name = "portable"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._pools: defaultdict[int, _Pool] = defaultdict(_Pool)
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tierkv-files")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="tierkv-files-loop", daemon=True
        )
        self._thread.start()

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers, in order, from `offset`. Raises OSError(EIO) at end of file."""
        with self._named(handle):
            self._run(self._transfer(handle, offset, buffers, _fill))

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order, at `offset`."""
        with self._named(handle):
            self._run(self._transfer(handle, offset, buffers, _drain))

    def close(self, handle: int) -> None:
        """Give a handle back, with the pool behind it."""
        try:
            self._run(self._close_pool(handle))
        finally:
            super().close(handle)

    def shutdown(self) -> None:
        """Close every handle and join the loop and its workers."""
        if not self._loop.is_closed():
            for handle in list(self._pools):
                self._run(self._close_pool(handle))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._workers.shutdown()
            self._loop.close()
        super().shutdown()

    def _run(self, work: Coroutine[None, None, _T]) -> _T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except RuntimeError as error:
            work.close()
            raise OSError(errno.EBADF, f"engine is shut down: {error}", str(self._root)) from error

    async def _transfer(
        self,
        handle: int,
        offset: int,
        buffers: Sequence[Buffer],
        move: Callable[[AsyncFileIO, Buffer], Coroutine[None, None, None]],
    ) -> None:
        self._file(handle)
        pool = self._pools[handle]
        async with pool.free:
            file = pool.idle.pop() if pool.idle else await self._open_another(handle)
            try:
                await file.seek(offset)
                for view in buffers:
                    await move(file, view)
            finally:
                pool.idle.append(file)

    async def _open_another(self, handle: int) -> AsyncFileIO:
        """One more aiofiles handle on the file that `handle` is, whatever it is called now."""
        fd, name = self._file(handle)

        def opener(path: str, _flags: int) -> int:
            other = self._open_beneath(path, self.open_flags)
            if not os.path.samestat(os.fstat(fd), os.fstat(other)):
                os.close(other)
                raise OSError(errno.ESTALE, "another file took this name", str(self._root / path))
            return other

        return await aiofiles.open(
            name, "r+b", buffering=0, opener=opener, loop=self._loop, executor=self._workers
        )

    async def _close_pool(self, handle: int) -> None:
        pool = self._pools.pop(handle, None)
        while pool is not None and pool.idle:
            await pool.idle.pop().close()


class _Pool:
    """Idle aiofiles handles of one file, and a semaphore over how many may exist."""

    __slots__ = ("free", "idle")

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(_HANDLES_PER_FILE)
        self.idle: list[AsyncFileIO] = []


async def _fill(file: AsyncFileIO, view: Buffer) -> None:
    while len(view):
        moved = await file.readinto(view)
        if not moved:
            raise OSError(errno.EIO, "end of file")
        view = view[moved:]


async def _drain(file: AsyncFileIO, view: Buffer) -> None:
    while len(view):
        moved = await file.write(view)
        if not moved:
            raise OSError(errno.EIO, "wrote nothing")
        view = view[moved:]
