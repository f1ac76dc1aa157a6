"""`RecordingStreams`: a device's queues that run nothing until told, in an order drawn by a seed.

Every operation is kept with the bytes that it reads and writes. Two of them are ordered if one
reaches the other along its own queue, or by an event that was recorded and waited for. `races`
names every pair that touches the same bytes, at least one of them writing, without being ordered.
`run` carries everything out in one of the orders that a device could choose.

The happens-before relation is Lamport's (Time, Clocks, and the Ordering of Events, 1978).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tierkv.kernels.relayout import BlockShape, Side, move_by_reference
from tierkv.transfer.streams import Event, Queue


class Access(NamedTuple):
    """Bytes ``start .. stop`` of memory that one operation reads or writes."""

    start: int
    stop: int
    writes: bool


@dataclass(slots=True)
class Operation:
    """One thing queued; `before` are the numbers of those that must be done first."""

    name: str
    queue: str
    accesses: list[Access]
    before: set[int]
    run: Callable[[], object]


@dataclass(slots=True)
class Mark:
    """An event: the operations that were on its queue when it was recorded."""

    streams: RecordingStreams
    last: int | None
    number: int

    def query(self) -> bool:
        """Whether all of them have run."""
        return self.last is None or self.last in self.streams.done

    def synchronize(self) -> None:
        """Run what it stands for; what is queued from here on comes after that."""
        if self.last is not None:
            self.streams.run(only=self.streams.needed(self.last))
            self.streams.synchronized.add(self.last)


@dataclass(slots=True)
class RecordingStreams:
    """See the module. `skip` drops the waits of these numbers, to plant a race."""

    skip: frozenset[int] = frozenset()
    operations: list[Operation] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    synchronized: set[int] = field(default_factory=set)
    waits: int = 0
    _last: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, set[int]] = field(default_factory=dict)
    _marks: int = 0

    def copy(self, queue: Queue, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Streams.copy`."""
        assert target.is_contiguous(), "a copy engine takes flat memory"
        assert source.is_contiguous(), "a copy engine takes flat memory"
        assert target.shape == source.shape
        accesses = [_access(source, writes=False), _access(target, writes=True)]
        self.queue(f"copy of {source.numel()} bytes", queue, accesses, lambda: target.copy_(source))

    def move(self, queue: Queue, shape: BlockShape, source: Side, target: Side) -> None:
        """See `Streams.move`."""
        accesses = [*_side(shape, source, writes=False), *_side(shape, target, writes=True)]

        def run() -> None:
            move_by_reference(shape, source, target)

        self.queue(f"move of {len(source.offsets)} blocks", queue, accesses, run)

    def queue(
        self, name: str, queue: str, accesses: list[Access], run: Callable[[], object]
    ) -> None:
        """Queue any operation: what an engine computes, what a reader of host memory does."""
        number = len(self.operations)
        before = self._pending.pop(queue, set()) | self.synchronized
        if queue in self._last:
            before.add(self._last[queue])
        self.operations.append(Operation(name, queue, accesses, before, run))
        self._last[queue] = number

    def record(self, queue: str) -> Event:
        """See `Streams.record`. It also carries what the queue was told to wait for."""
        if self._pending.get(queue):
            self.queue("nothing", queue, [], lambda: None)
        self._marks += 1
        return Mark(self, self._last.get(queue), self._marks)

    def wait(self, queue: str, event: Event) -> None:
        """See `Streams.wait`."""
        assert isinstance(event, Mark)
        number, self.waits = self.waits, self.waits + 1
        if event.last is not None and number not in self.skip:
            self._pending.setdefault(queue, set()).add(event.last)

    def races(self) -> list[str]:
        """Pairs that touch the same bytes in no order, in words."""
        reach: list[set[int]] = []
        for operation in self.operations:
            reach.append(set(operation.before).union(*(reach[n] for n in operation.before)))
        found = []
        for late, second in enumerate(self.operations):
            for early in range(late):
                first = self.operations[early]
                if early not in reach[late] and _conflict(first.accesses, second.accesses):
                    found.append(
                        f"{first.name} on {first.queue} (#{early}) and"
                        f" {second.name} on {second.queue} (#{late})"
                    )
        return found

    def needed(self, last: int) -> set[int]:
        """An operation and all that must be done before it."""
        found, todo = set(), {last}
        while todo:
            number = todo.pop()
            found.add(number)
            todo |= self.operations[number].before - found
        return found

    def run(self, seed: int | None = None, *, only: set[int] | None = None) -> None:
        """Carry out what has not run: in queueing order, or in an order drawn by `seed`."""
        draw = random.Random(seed)
        wanted = range(len(self.operations)) if only is None else sorted(only)
        left = [n for n in wanted if n not in self.done]
        while left:
            ready = [n for n in left if self.operations[n].before <= self.done]
            chosen = ready[0] if seed is None else draw.choice(ready)
            self.operations[chosen].run()
            self.done.add(chosen)
            left.remove(chosen)


def access(memory: torch.Tensor, *, writes: bool) -> Access:
    """The bytes of contiguous memory, for `RecordingStreams.queue`."""
    return _access(memory, writes=writes)


def _access(memory: torch.Tensor, *, writes: bool) -> Access:
    start = memory.data_ptr()
    return Access(start, start + memory.numel() * memory.element_size(), writes)


def _side(shape: BlockShape, side: Side, *, writes: bool) -> Sequence[Access]:
    """One access a block and layer; for the arrangements that staging uses a block is a run."""
    size = shape.planes * shape.tokens * shape.heads * shape.head_bytes
    return [
        Access(layer.data_ptr() + offset, layer.data_ptr() + offset + size, writes)
        for layer in side.layers
        for offset in side.offsets.tolist()
    ]


def _conflict(left: list[Access], right: list[Access]) -> bool:
    return any(
        (a.writes or b.writes) and a.start < b.stop and b.start < a.stop
        for a in left
        for b in right
    )
