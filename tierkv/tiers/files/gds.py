"""GPUDirect Storage: direct files that NVIDIA's cuFile also moves to and from device memory.

Host buffers go as in `DirectFiles`, by O_DIRECT: cuFile has nothing to add there. `read_device` and
`write_device` name device memory instead. Where the nvidia-fs driver and the file system allow it,
the drive then writes straight into the GPU; elsewhere cuFile reads into host memory and copies
(its compatibility mode), and says so only in its own log: `cufile.log`, in the working directory
unless its cufile.json names another. A probe that succeeds does not tell which of the two it was.

Verification needs the bytes on the host, so tierkv's cold tier still reads into host memory, with
any engine. The device path is for whoever reads a page straight into device memory and checks it
there. O_DIRECT into pinned memory, plus one copy, is the path that always works. Hence `auto` never
takes this engine; name it: `cold.engine: gds`.

Offsets, sizes and device addresses are multiples of 4096, as the direct path asks. In a segment
every header, slot and page begins on such a multiple (`segment_format`: the segment header takes
4096 bytes, page headers and pages are padded to it), so a page can be read without what surrounds
it.

Invariants: a handle is registered with cuFile at most once, at its first use with device memory,
and deregistered before its descriptor is closed; the cuFile driver is opened at the first such use
and never closed, as the whole process shares it. Any thread, but a handle is closed only when none
of its transfers is under way.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Final, Literal

import numpy as np

from tierkv.tiers.files.base import address_of, aligned_array
from tierkv.tiers.files.direct import DirectFiles

_PROBE_BYTES: Final = 64 << 10


class GdsFiles(DirectFiles):
    """The engine for NVMe drives whose bytes a GPU may fetch. Any thread."""

    name = "gds"
    by_name_only = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._cufile: ModuleType | None = None
        self._registering = threading.Lock()
        self._registered: dict[int, int] = {}

    @classmethod
    def probe(cls, root: Path) -> str | None:
        """None if O_DIRECT and cuFile work beneath `root`, else the reason why not; never raises.

        Sends a scratch file's bytes from and to memory of the thread's current CUDA device, which
        gives this process a CUDA context if it has none.
        """
        try:
            return super().probe(root)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises is the reason
            return f"{root}: {cls.name} fails its probe: {error!r}"

    def read_device(self, handle: int, offset: int, address: int, size_bytes: int) -> None:
        """Fill device memory from the file, all of it before this returns.

        The device of `address` is the calling thread's current one. cuFile knows no streams: what
        was queued on that memory has been waited for. Raises ValueError if a number is not a
        multiple of 4096, OSError(EIO) at end of file and for everything cuFile refuses, ENOTSUP
        where it does not open; after an error the memory holds anything.
        """
        self._move_device("read", handle, offset, address, size_bytes)

    def write_device(self, handle: int, offset: int, address: int, size_bytes: int) -> None:
        """Write device memory into the file. As `read_device`; durable after `sync`."""
        self._move_device("write", handle, offset, address, size_bytes)

    def close(self, handle: int) -> None:
        """Give a handle back, to cuFile first."""
        with self._registering:
            try:
                self._deregister(handle)
            finally:
                super().close(handle)

    def shutdown(self) -> None:
        """Give every handle back, to cuFile first, and the root."""
        with self._registering, ExitStack() as undo:
            undo.callback(super().shutdown)
            for handle in self._registered:
                undo.callback(self._deregister, handle)

    def _move_device(
        self,
        verb: Literal["read", "write"],
        handle: int,
        offset: int,
        address: int,
        size_bytes: int,
    ) -> None:
        """Repeat cuFile's call of that name until every byte is done."""
        for what, number in (("offset", offset), ("address", address), ("size_bytes", size_bytes)):
            if number < 0 or number % self.align_bytes:
                raise ValueError(
                    f"{what} must be a multiple of {self.align_bytes} and not negative, because "
                    f"GPUDirect Storage moves whole sectors; got {number}"
                )
        with self._named(handle):
            cufile, registered = self._registration(handle)
            move = getattr(cufile, verb)
            done = 0
            while done < size_bytes:
                left = size_bytes - done
                with _as_os_error(cufile, f"{verb} {left} bytes at offset {offset + done}"):
                    moved = int(move(registered, address, left, offset + done, done))
                # After a short transfer only whole sectors count, as the next must be aligned.
                whole = moved - moved % self.align_bytes
                if not 0 < whole <= moved <= left:
                    raise OSError(
                        errno.EIO,
                        f"end of file or no progress at offset {offset + done}: "
                        f"cuFile answers {moved} for {left} bytes",
                    )
                done += whole

    def _registration(self, handle: int) -> tuple[ModuleType, int]:
        """The library and what it calls this handle, which it is told of if it was not before."""
        with self._registering:
            fd = self._fd(handle)
            if self._cufile is None:
                self._cufile = open_cufile()
            if handle not in self._registered:
                self._registered[handle] = _register(self._cufile, fd)
            return self._cufile, self._registered[handle]

    def _deregister(self, handle: int) -> None:
        registered = self._registered.pop(handle, None)
        if registered is not None and self._cufile is not None:
            with self._named(handle), _as_os_error(self._cufile, "deregister the file"):
                self._cufile.handle_deregister(registered)

    def _write_and_read_back(self, name: str) -> str | None:
        reason = super()._write_and_read_back(name)
        if reason is not None:
            return reason
        try:
            open_cufile()
        except OSError as error:
            return error.strerror
        return self._device_round_trip(name)

    def _device_round_trip(self, name: str) -> str | None:
        """Why device memory cannot be written to that file and read back, or None.

        The host looks at the file in between: two wrongs that cancel out are no round trip.
        """
        # No two sectors alike, so that bytes at a wrong offset are found.
        wrote = aligned_array(_PROBE_BYTES, self.align_bytes)
        wrote.view(np.uint64)[:] = np.arange(_PROBE_BYTES // 8)
        found = aligned_array(_PROBE_BYTES, self.align_bytes)
        handle = self.open(name)
        self.preallocate(handle, _PROBE_BYTES)
        with _device_memory(_PROBE_BYTES, self.align_bytes) as (address, copy):
            copy(address, address_of(wrote))
            self.write_device(handle, 0, address, _PROBE_BYTES)
            self.read(handle, 0, [found.data])
            if bytes(found) != bytes(wrote):
                return f"{self._root}: cuFile wrote other bytes than device memory held"
            found[:] = 0
            copy(address, address_of(found))
            self.read_device(handle, 0, address, _PROBE_BYTES)
            copy(address_of(found), address)
        if bytes(found) != bytes(wrote):
            return f"{self._root}: cuFile read back other bytes into device memory"
        return None


def library(name: str) -> ModuleType:
    """One module of NVIDIA's `cuda.bindings`: "cufile" or "runtime"."""
    return import_module(f"cuda.bindings.{name}")


def open_cufile() -> ModuleType:
    """`cuda.bindings.cufile` with its driver open. Raises OSError(ENOTSUP): reason and cure."""
    try:
        runtime, cufile = library("runtime"), library("cufile")
    except ImportError as error:
        reason = f"cuda.bindings is not installed: pip install 'tierkv-offload[gpu]' ({error})"
        raise OSError(errno.ENOTSUP, reason) from error
    # The driver may not open before a process has made its first CUDA call (rapidsai/cudf #15293).
    # To free nothing is one, and it fails without a device.
    (status,) = runtime.cudaFree(0)
    if int(status):
        reason = f"no CUDA device that works: {status!r}; nvidia-smi should list one"
        raise OSError(errno.ENOTSUP, reason)
    try:
        cufile.driver_open()
    except (cufile.cuFileError, RuntimeError, ValueError) as error:
        # Another user of cuFile in this process may have opened it, which is as good.
        if getattr(error, "status", None) != cufile.OpError.DRIVER_ALREADY_OPEN:
            reason = (
                f"cuFile driver does not open: {_words(error)} (cure: pip install nvidia-cufile if "
                "libcufile is missing; allow_compat_mode in cufile.json if nvidia-fs is)"
            )
            raise OSError(errno.ENOTSUP, reason) from error
    return cufile


def _register(cufile: ModuleType, fd: int) -> int:
    """What cuFile calls the open file."""
    description = cufile.Descr()
    description.type = cufile.FileHandleType.OPAQUE_FD
    description.handle.fd = fd
    description.fs_ops = 0
    with _as_os_error(cufile, "register the file"):
        return int(cufile.handle_register(description.ptr))


@contextmanager
def _as_os_error(cufile: ModuleType, what: str) -> Iterator[None]:
    """Makes the library's errors OSError(EIO).

    ValueError is among them: where a transfer fails with an errno, `cuda.bindings` looks for it
    among cuFile's own codes and raises "5 is not a valid OpError". RuntimeError: no libcufile.
    """
    try:
        yield
    except (cufile.cuFileError, RuntimeError, ValueError) as error:
        raise OSError(errno.EIO, f"cuFile cannot {what}: {_words(error)}") from error


def _words(error: Exception) -> str:
    """The message on one line."""
    return " ".join(str(error).split())


@contextmanager
def _device_memory(
    size_bytes: int, align_bytes: int
) -> Iterator[tuple[int, Callable[[int, int], None]]]:
    """The address of device memory, and a copy of `size_bytes` to a target from a source."""
    runtime = library("runtime")

    def checked(call: str, status: int, *values: int) -> int:
        if int(status):
            raise OSError(errno.EIO, f"{call}: {status!r}")
        return int(values[0]) if values else 0

    def copy(target: int, source: int) -> None:
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        checked("cudaMemcpy", *runtime.cudaMemcpy(target, source, size_bytes, kind))
        # From pageable memory the call may return before the bytes have arrived.
        checked("cudaDeviceSynchronize", *runtime.cudaDeviceSynchronize())

    base = checked("cudaMalloc", *runtime.cudaMalloc(size_bytes + align_bytes))
    try:
        yield base + -base % align_bytes, copy
    finally:
        runtime.cudaFree(base)
