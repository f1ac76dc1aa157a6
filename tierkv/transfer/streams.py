"""Streams: what the staging ring asks of a device's runtime, and CUDA's answer.

An operation is queued on a stream and runs after what was queued there before; an event marks a
point of a stream, and another stream waits for it. Order between streams comes from events alone.
`tierkv.testing.streams` has another runtime, which records all of it and finds races.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.codecs.base import PageCodec
from tierkv.kernels.driver import Copies, Driver, Launch, SourceOrder
from tierkv.kernels.pages import CodedRows
from tierkv.kernels.relayout import (
    AT_COUNT,
    AT_SOURCE,
    AT_TARGET,
    PROGRAMS,
    THREADS,
    BlockShape,
    Pool,
    Side,
    has_kernel,
    kernel_function,
    launch_values,
    move_by_reference,
)

if TYPE_CHECKING:
    from torch import Tensor, device

Numbers = npt.NDArray[np.int64]

#: Index vectors are kept in steps of this many numbers, so that they are used again.
_INDEX_STEP: Final = 8192


class Queue(StrEnum):
    """The streams of a device, each for one kind of work."""

    TO_DEVICE = "to device"
    TO_HOST = "to host"
    RELAYOUT = "relayout"


class Event(Protocol):
    """A point of a stream."""

    def query(self) -> bool:
        """Whether everything before it is done; never waits."""
        ...

    def synchronize(self) -> None:
        """Wait for it."""
        ...


@dataclass(slots=True, eq=False)
class Index:
    """Where blocks begin on both sides of a move: int64 on the device, sources, then targets.

    `until` is set to the event of its last use, and gives its memory free.
    """

    numbers: Tensor
    count: int
    until: Event | None = None

    def part(self, blocks: slice) -> tuple[Tensor, Tensor]:
        """Sources and targets of some blocks."""
        start, stop = blocks.start, blocks.stop
        return self.numbers[start:stop], self.numbers[self.count + start : self.count + stop]


class Coded(NamedTuple):
    """Rows of a slab and memory of coded pages: see `CodedRows`, which it becomes with blocks."""

    codec: PageCodec
    rows: Tensor
    memory: Tensor
    layer_bytes: int

    def blocks(self, layers: range, numbers: Tensor, places: Tensor) -> CodedRows:
        """Layers of blocks."""
        return CodedRows(self.rows, numbers, self.memory, places, layers, self.layer_bytes)


class Streams(Protocol):
    """A device's queues. Calls return at once; any thread, one at a time."""

    def begin(self) -> None:
        """This thread is going to queue something."""
        ...

    def copy(self, queue: Queue, copies: Copies, *, pinned: bool = True) -> None:
        """Copy between host and device addresses; no two touch the same bytes.

        Not `pinned`: host memory that is not registered; such a call may wait.
        """
        ...

    def upload(self, queue: Queue, sources: Numbers, targets: Numbers) -> Index:
        """Offsets for moves to read: on the device after what is queued so far."""
        ...

    def move(
        self,
        queue: Queue,
        shape: BlockShape,
        source: Pool,
        target: Pool,
        index: Index,
        blocks: slice,
    ) -> None:
        """`move_blocks` for some blocks of an index. One pool may be mapped host memory."""
        ...

    def encode(
        self, queue: Queue, coded: Coded, layers: range, index: Index, blocks: slice
    ) -> None:
        """`encode_blocks`; sources of the index are rows, targets places in memory."""
        ...

    def decode(
        self, queue: Queue, coded: Coded, layers: range, index: Index, blocks: slice
    ) -> None:
        """`decode_blocks`; sources of the index are places in memory, targets rows."""
        ...

    def record(self, queue: Queue) -> Event:
        """Mark what is queued so far."""
        ...

    def wait(self, queue: Queue, event: Event) -> None:
        """What is queued from here on runs after the event."""
        ...


class DriverEvent:
    """An event of the driver's; used again for another when nobody holds it any more."""

    def __init__(self, driver: Driver, handle: int, free: list[int]) -> None:
        self._driver = driver
        self._free = free
        self.cuda_event = handle

    def query(self) -> bool:
        """See `Event`. Raises DriverError after an error of the device."""
        return self._driver.is_done(self.cuda_event)

    def synchronize(self) -> None:
        """See `Event`."""
        self._driver.wait(self.cuda_event)

    def __del__(self) -> None:
        self._free.append(self.cuda_event)


class CudaStreams:
    """CUDA streams of one device. Relayout has the higher priority: it is short, and waited for.

    `programs` bounds the processors that relayout kernels take from the engine's own; `kernel`
    gives the driver's handle of `csrc/move.cu`, which CuPy compiles when it is first needed.
    """

    def __init__(
        self,
        driver: Driver,
        device: device,
        *,
        programs: int = PROGRAMS,
        kernel: Callable[[], int] | None = None,
    ) -> None:
        self._driver = driver
        self._device = device
        self._programs = programs
        self._kernel = kernel or partial(kernel_function, device)
        self._number = device.index or 0
        driver.use(self._number)
        self._streams = {
            queue: driver.stream(priority=-1 if queue is Queue.RELAYOUT else 0) for queue in Queue
        }
        self._free_events: list[int] = []
        self._indices: list[tuple[Numbers, Index]] = []
        self._launches: dict[tuple[Pool, Pool], Launch | None] = {}

    def begin(self) -> None:
        """Make the device's context current."""
        self._driver.use(self._number)

    def copy(self, queue: Queue, copies: Copies, *, pinned: bool = True) -> None:
        """One call for all of them, by the copy engines."""
        if not pinned:
            self._driver.copy_one_by_one(copies, self._streams[queue])
            return
        # Pages that are read lie still in host memory until their transfer has ended, so the copy
        # may read at any time; what goes down was written by the kernel before it (vLLM #39306).
        order = SourceOrder.ANY if queue is Queue.TO_DEVICE else SourceOrder.STREAM
        self._driver.copy(copies, self._streams[queue], order)

    def upload(self, queue: Queue, sources: Numbers, targets: Numbers) -> Index:
        """Through pinned memory of our own, that is used again when its last reader is done."""
        import torch

        count = len(sources)
        for host, index in self._indices:
            if len(host) >= 2 * count and index.until is not None and index.until.query():
                break
        else:
            room = -(-2 * count // _INDEX_STEP) * _INDEX_STEP
            host = self._driver.pinned_numbers(room)
            index = Index(torch.empty(room, dtype=torch.int64, device=self._device), 0)
            self._indices.append((host, index))
        index.count, index.until = count, None
        host[:count], host[count : 2 * count] = sources, targets
        ends = (index.numbers.data_ptr(), host.ctypes.data, 2 * count * host.itemsize)
        self.copy(queue, Copies(*(np.array([end]) for end in ends)))
        return index

    def move(
        self,
        queue: Queue,
        shape: BlockShape,
        source: Pool,
        target: Pool,
        index: Index,
        blocks: slice,
    ) -> None:
        """The kernel, on this queue's stream."""
        launch = self._launches.get((source, target))
        if launch is None:
            launch = self._prepared(shape, source, target)
        if launch is None:
            read, written = index.part(blocks)
            with self._current(queue):
                move_by_reference(shape, Side(source, read), Side(target, written))
            return
        size = index.numbers.itemsize
        first = index.numbers.data_ptr() + blocks.start * size
        launch.values[AT_SOURCE] = first
        launch.values[AT_TARGET] = first + index.count * size
        launch.values[AT_COUNT] = blocks.stop - blocks.start
        self._driver.launch(launch, self._streams[queue])

    def _prepared(self, shape: BlockShape, source: Pool, target: Pool) -> Launch | None:
        """The launch between two pools, but for its blocks; None where the kernel cannot do it."""
        if not has_kernel(shape, source, target):
            return None
        values = launch_values(shape, source, target, self._device)
        launch = Launch(self._kernel(), self._programs, THREADS, values)
        self._launches[source, target] = launch
        return launch

    def encode(
        self, queue: Queue, coded: Coded, layers: range, index: Index, blocks: slice
    ) -> None:
        """The fused kernel, on this queue's stream."""
        numbers, places = index.part(blocks)
        with self._current(queue):
            coded.codec.encode_blocks(coded.blocks(layers, numbers, places))

    def decode(
        self, queue: Queue, coded: Coded, layers: range, index: Index, blocks: slice
    ) -> None:
        """The fused kernel, on this queue's stream."""
        places, numbers = index.part(blocks)
        with self._current(queue):
            coded.codec.decode_blocks(coded.blocks(layers, numbers, places))

    def _current(self, queue: Queue) -> AbstractContextManager[object]:
        """Have torch queue on one of ours."""
        import torch

        return torch.cuda.stream(torch.cuda.ExternalStream(self._streams[queue], self._device))

    def record(self, queue: Queue) -> Event:
        """An event without timing."""
        handle = self._free_events.pop() if self._free_events else self._driver.event()
        self._driver.record(handle, self._streams[queue])
        return DriverEvent(self._driver, handle, self._free_events)

    def wait(self, queue: Queue, event: Event) -> None:
        """By the device; the host goes on. Events of torch's are taken as well."""
        self.hold(self._streams[queue], event)

    def hold(self, stream: int, event: Event) -> None:
        """As `wait`, for any stream by its handle: an engine's, before it attends to a layer."""
        self._driver.order(stream, event.cuda_event)  # type: ignore[attr-defined]
