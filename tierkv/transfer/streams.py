"""Streams: what the staging ring asks of a device's runtime, and CUDA's answer through torch.

An operation is queued on a stream and runs after what was queued there before; an event marks a
point of a stream, and another stream waits for it. Order between streams comes from events alone.
`tierkv.testing.streams` has another runtime, which records all of it and finds races.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from tierkv.kernels.relayout import BlockShape, Side, move_blocks

if TYPE_CHECKING:
    from torch import Tensor, cuda, device


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


class Streams(Protocol):
    """A device's queues. Calls return at once; any thread, one at a time."""

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """Copy bytes of one memory to another: flat, contiguous, uint8, equally long."""
        ...

    def move(self, queue: Queue, shape: BlockShape, source: Side, target: Side) -> None:
        """`move_blocks` within the device."""
        ...

    def record(self, queue: Queue) -> Event:
        """Mark what is queued so far."""
        ...

    def wait(self, queue: Queue, event: Event) -> None:
        """What is queued from here on runs after the event."""
        ...


class CudaStreams:
    """CUDA streams of one device. Relayout has the higher priority: it is short, and waited for."""

    def __init__(self, device: device) -> None:
        import torch

        self._streams: dict[Queue, cuda.Stream] = {
            queue: torch.cuda.Stream(device, priority=-1 if queue is Queue.RELAYOUT else 0)
            for queue in Queue
        }

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """One copy by a copy engine; host memory must be pinned, or the call waits."""
        import torch

        with torch.cuda.stream(self._streams[queue]):
            target.copy_(source, non_blocking=True)

    def move(self, queue: Queue, shape: BlockShape, source: Side, target: Side) -> None:
        """The kernel, on this queue's stream."""
        import torch

        with torch.cuda.stream(self._streams[queue]):
            move_blocks(shape, source, target)

    def record(self, queue: Queue) -> Event:
        """An event without timing."""
        import torch

        event = torch.cuda.Event()
        event.record(self._streams[queue])
        return event

    def wait(self, queue: Queue, event: Event) -> None:
        """By the device; the host goes on."""
        import torch

        assert isinstance(event, torch.cuda.Event)
        self._streams[queue].wait_event(event)
