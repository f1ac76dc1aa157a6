"""The CUDA driver, by ctypes: what neither torch nor CuPy offers, and what must not import them.

`Driver.load()` gives it where libcuda is there and starts; None otherwise. Addresses and streams
are plain ints, vectors are int64. Every call raises `DriverError` with the driver's own name for
what went wrong. Any thread; calls that need a context (copies, registration) use that of the
device that `use` chose on this thread, which is torch's as well.

A call through `ctypes.CDLL` lets other threads have the interpreter, and may have to wait several
milliseconds until it gets it back. So what never waits is called through `ctypes.PyDLL`, and keeps
it: copies and launches are queued within microseconds of one another, however busy others are.

ABI: `cuda.h` of CUDA 12.8 and 13.0. A test compiles a driver of our own against that header.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]

#: cuMemHostRegister: usable in every context, and mapped where kernels may read it.
_REGISTER_FLAGS: Final = 1 | 2
#: CUresult: what was asked for has not come yet.
_NOT_READY: Final = 600
_DISABLE_TIMING: Final = 2
_NON_BLOCKING: Final = 1


class DriverError(RuntimeError):
    """A call of the driver failed; `code` is its CUresult."""

    def __init__(self, call: str, code: int, reason: str) -> None:
        super().__init__(f"{call}: {reason} ({code})")
        self.code = code


class Attribute(IntEnum):
    """The device attributes that are asked for; the numbers are cuda.h's."""

    MULTIPROCESSORS = 16
    PCI_BUS = 33
    PCI_DEVICE = 34
    COPY_ENGINES = 40
    PCI_DOMAIN = 50
    PAGEABLE_MEMORY_ACCESS = 88
    CONCURRENT_MANAGED_ACCESS = 89
    USES_HOST_PAGE_TABLES = 100
    DIRECT_MANAGED_ACCESS_FROM_HOST = 101
    NUMA_CONFIG = 130
    NUMA_ID = 131
    HOST_NUMA_ID = 134


class SourceOrder(IntEnum):
    """When the source of a copy is read: in stream order, or at any time from the call on."""

    STREAM = 1
    ANY = 3


class Copies(NamedTuple):
    """Copies between plain addresses: int64 (n,) each, contiguous, sizes in bytes."""

    targets: Vector
    sources: Vector
    sizes: Vector

    def part(self, start: int, stop: int) -> Copies:
        """Some of them."""
        return Copies(self.targets[start:stop], self.sources[start:stop], self.sizes[start:stop])


class Launch:
    """A launch of a kernel whose parameters all take 8 bytes: pointers and int64.

    `values` may be changed between launches; the driver copies them.
    """

    def __init__(self, function: int, programs: int, threads: int, values: Sequence[int]) -> None:
        count = len(values)
        self.values = (ctypes.c_int64 * count)(*values)
        start = ctypes.addressof(self.values)
        self._places = (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
        self.head = (function, programs, 1, 1, threads, 1, 1, 0)
        self.places = ctypes.addressof(self._places)


_pointer, _size, _uint = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
#: Of calls that are made often: then ctypes takes plain ints.
_ARGUMENTS: Final[dict[str, tuple[type, ...]]] = {
    "cuCtxSetCurrent": (_pointer,),
    "cuEventRecord": (_pointer, _pointer),
    "cuEventQuery": (_pointer,),
    "cuEventSynchronize": (_pointer,),
    "cuStreamWaitEvent": (_pointer, _pointer, _uint),
    "cuMemcpyAsync": (_pointer, _pointer, _size, _pointer),
    "cuMemHostRegister_v2": (_pointer, _size, _uint),
    "cuMemHostUnregister": (_pointer,),
    "cuLaunchKernel": (_pointer, *(_uint,) * 7, _pointer, _pointer, _pointer),
}


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class Driver:
    """One libcuda by its file name; see the module."""

    def __init__(self, name: str) -> None:
        self._waiting = ctypes.CDLL(name)
        self._library = ctypes.PyDLL(name)
        self._call("cuInit", 0)
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._first = (ctypes.c_size_t * 1)(0)
        self._orders = {
            order: (_CopyAttributes * 1)(_CopyAttributes(source_order=order))
            for order in SourceOrder
        }
        # CUDA 13's has no place for the index of what failed; before 12.8 there is neither.
        self._batch = getattr(self._library, "cuMemcpyBatchAsync_v2", None)
        self._failed: tuple[object, ...] = ()
        if self._batch is None:
            self._batch = getattr(self._library, "cuMemcpyBatchAsync", None)
            self._failed = (ctypes.pointer(ctypes.c_size_t(0)),)
        for name, types in _ARGUMENTS.items():
            for found in (self._library, self._waiting):
                if hasattr(found, name):  # a driver that lacks one may still answer questions
                    getattr(found, name).argtypes = types
        if self._batch is not None:
            vectors = (_pointer, _pointer, _pointer, _size, _pointer, _pointer, _size)
            self._batch.argtypes = (*vectors, *(_pointer for _ in self._failed), _pointer)

    @classmethod
    def load(cls) -> Driver | None:
        """The machine's driver; None where there is none, or none that starts."""
        return _loaded()

    # ---- devices

    @property
    def version(self) -> int:
        """CUDA version that the driver serves: 13000 is 13.0."""
        return self._int("cuDriverGetVersion")

    def device_count(self) -> int:
        """Devices that this process may use."""
        return self._int("cuDeviceGetCount")

    def attribute(self, attribute: Attribute, device: int) -> int | None:
        """An attribute; None where this driver does not know it."""
        try:
            return self._int("cuDeviceGetAttribute", int(attribute), device)
        except DriverError:
            return None

    def name(self, device: int) -> str:
        """The model, such as ``NVIDIA H100 80GB HBM3``."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, 256, device)
        return text.value.decode(errors="replace")

    def uuid(self, device: int) -> str:
        """What tells this very card from all others, as hexadecimal digits."""
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", raw, device)
        return bytes(raw).hex()

    def memory_bytes(self, device: int) -> int:
        """All of its memory."""
        size = ctypes.c_size_t(0)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
        return size.value

    def pci_address(self, device: int) -> str:
        """Its address as sysfs writes it, such as ``0000:17:00.0``."""
        parts = (Attribute.PCI_DOMAIN, Attribute.PCI_BUS, Attribute.PCI_DEVICE)
        domain, bus, slot = (self.attribute(part, device) or 0 for part in parts)
        return f"{domain:04x}:{bus:02x}:{slot:02x}.0"

    def use(self, device: int) -> None:
        """Make the device's primary context current on this thread."""
        if device not in self._contexts:
            context = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[device] = context
        self._call("cuCtxSetCurrent", self._contexts[device])

    # ---- memory

    def registrar(self, device: int) -> Registrar:
        """Pins memory for a device, from any thread."""
        return Registrar(self, device)

    def host_register(self, address: int, size_bytes: int) -> None:
        """Pin host memory and map it for kernels. At most 1 GiB: a huge call can fail."""
        self._wait_for("cuMemHostRegister_v2", address, size_bytes, _REGISTER_FLAGS)

    def host_unregister(self, address: int) -> None:
        """Undo `host_register` of the same address."""
        self._wait_for("cuMemHostUnregister", address)

    def pinned_numbers(self, count: int) -> Vector:
        """Pinned memory for int64 (count,), that is never given back: small, and used again."""
        address = ctypes.c_void_p()
        self._wait_for("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(8 * count), 1)
        memory = (ctypes.c_int64 * count).from_address(address.value or 0)
        return np.ctypeslib.as_array(memory)

    def copy(self, copies: Copies, stream: int, order: SourceOrder = SourceOrder.STREAM) -> None:
        """Queue all of them on a stream, in one call where the driver has it (12.8 and later).

        They may run in any order among themselves, so no two may touch the same bytes. Memory that
        is not pinned is for `copy_one_by_one`. The vectors may be freed when the call returns.
        """
        count = len(copies.sizes)
        if not count:
            return
        if self._batch is None:
            self.copy_one_by_one(copies, stream)
            return
        targets, sources, sizes = copies
        code = self._batch(
            targets.__array_interface__["data"][0],
            sources.__array_interface__["data"][0],
            sizes.__array_interface__["data"][0],
            count,
            self._orders[order],
            self._first,
            1,
            *self._failed,
            stream,
        )
        if code:
            raise self._error("cuMemcpyBatchAsync", code)

    def copy_one_by_one(self, copies: Copies, stream: int) -> None:
        """As `copy`, a call each; for pageable memory, which the driver stages itself."""
        for target, source, size in zip(*(vector.tolist() for vector in copies), strict=True):
            self._wait_for("cuMemcpyAsync", target, source, size, stream)

    # ---- order, and kernels

    def stream(self, *, priority: int = 0) -> int:
        """A new stream that does not wait for the default one; lower numbers go first."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING, priority)
        return stream.value or 0

    def event(self) -> int:
        """A new event without timing."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), _DISABLE_TIMING)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """The event is when what is queued on the stream by now is done."""
        if code := self._library.cuEventRecord(event, stream):
            raise self._error("cuEventRecord", code)

    def order(self, stream: int, event: int) -> None:
        """What is queued on the stream from here on runs after the event."""
        if code := self._library.cuStreamWaitEvent(stream, event, 0):
            raise self._error("cuStreamWaitEvent", code)

    def is_done(self, event: int) -> bool:
        """Whether the event has come; never waits."""
        code = self._library.cuEventQuery(event)
        if code not in (0, _NOT_READY):
            raise self._error("cuEventQuery", code)
        return bool(code == 0)

    def wait(self, event: int) -> None:
        """Until the event has come."""
        self._wait_for("cuEventSynchronize", event)

    def launch(self, launch: Launch, stream: int) -> None:
        """Queue a kernel on a stream."""
        code = self._library.cuLaunchKernel(*launch.head, stream, launch.places, None)
        if code:
            raise self._error("cuLaunchKernel", code)

    # ---- calls

    def _int(self, name: str, *arguments: int) -> int:
        value = ctypes.c_int(0)
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise self._error(name, code)

    def _wait_for(self, name: str, *arguments: object) -> None:
        """A call that may take long: other threads go on."""
        code = getattr(self._waiting, name)(*arguments)
        if code:
            raise self._error(name, code)

    def _error(self, call: str, code: int) -> DriverError:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return DriverError(call, code, (text.value or b"unknown error").decode())


class Registrar:
    """A driver bound to a device; see `Driver.registrar`."""

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        self._device = device

    def host_register(self, address: int, size_bytes: int) -> None:
        """See `Driver.host_register`."""
        self._driver.use(self._device)
        self._driver.host_register(address, size_bytes)

    def host_unregister(self, address: int) -> None:
        """See `Driver.host_unregister`."""
        self._driver.use(self._device)
        self._driver.host_unregister(address)


@cache
def _loaded() -> Driver | None:
    try:
        return Driver("libcuda.so.1")
    except (OSError, AttributeError, DriverError):
        return None
