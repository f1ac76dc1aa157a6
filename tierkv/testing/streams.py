"""`RecordingStreams`: a device's queues that run nothing until told, in an order drawn by a seed.

Every operation is kept with the bytes that it reads and writes. Two of them are ordered if one
reaches the other along its own queue, or by an event that was recorded and waited for. `races`
names every pair that touches the same bytes, at least one of them writing, without being ordered.
`run` carries everything out in one of the orders that a device could choose. With `pace` they go on
by themselves, some operations for each time somebody asks whether an event is done, as a device
does that works while it is polled.

The happens-before relation is Lamport's (Time, Clocks, and the Ordering of Events, 1978).
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from tierkv.kernels.driver import Copies
from tierkv.kernels.pages import CodedRows
from tierkv.kernels.relayout import BlockShape, Pool, Side, move_by_reference
from tierkv.transfer.streams import Coded, Event, Index, Numbers, Queue


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
        """Whether all of them have run; if so, what is queued from here on comes after that."""
        self.streams.go_on()
        if self.last is not None and self.last in self.streams.done:
            self.streams.synchronized.add(self.last)
        return self.last is None or self.last in self.streams.done

    def synchronize(self) -> None:
        """Run what it stands for; what is queued from here on comes after that."""
        if self.last is not None:
            self.streams.run(only=self.streams.needed(self.last))
            self.streams.synchronized.add(self.last)


@dataclass(slots=True)
class RecordingStreams:
    """See the module. `skip` drops the waits of these numbers, to plant a race.

    `broken_after` makes that many operations the last that run: then every question raises, as
    after an error of the device.
    """

    skip: frozenset[int] = frozenset()
    pace: int = 0
    seed: int = 0
    broken_after: int | None = None
    operations: list[Operation] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    synchronized: set[int] = field(default_factory=set)
    waits: int = 0
    copies: list[tuple[Queue, int, int, bool]] = field(default_factory=list)
    _uploads: list[Index] = field(default_factory=list)
    _last: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, set[int]] = field(default_factory=dict)
    _left: list[int] = field(default_factory=list)
    _marks: int = 0
    _draw: random.Random | None = None

    def copy(self, queue: Queue, copies: Copies, *, pinned: bool = True) -> None:
        """See `Streams.copy`; what is not pinned is carried out as what is.

        Up, the source may be read at any time from the call on, whatever the queue waits for.
        """
        assert all(vector.dtype == np.int64 for vector in copies), "the driver takes int64"
        rows = list(zip(*(vector.tolist() for vector in copies), strict=True))
        assert all(size > 0 for *_, size in rows), "a driver refuses a copy of nothing"
        reads = [Access(source, source + size, writes=False) for _, source, size in rows]
        writes = [Access(target, target + size, writes=True) for target, _, size in rows]
        held: list[bytes] = []

        def read() -> None:
            held.extend(ctypes.string_at(source, size) for _, source, size in rows)

        def write() -> None:
            for (target, _, size), data in zip(rows, held, strict=True):
                ctypes.memmove(target, data, size)

        def both() -> None:
            read()
            write()

        total = int(copies.sizes.sum())
        self.copies.append((queue, len(rows), total, pinned))
        what = f"{len(rows)} copies of {total} bytes"
        if queue is Queue.TO_DEVICE:
            early = self._add(f"{what}, reading", "any time", reads, set(self.synchronized), read)
            self._pending.setdefault(queue, set()).add(early)
            self.queue(what, queue, writes, write)
        else:
            self.queue(what, queue, reads + writes, both)

    def begin(self) -> None:
        """See `Streams.begin`."""

    def upload(self, queue: Queue, sources: Numbers, targets: Numbers) -> Index:
        """See `Streams.upload`. The numbers are there at once; reading them too soon is a race."""
        index = Index(torch.from_numpy(np.concatenate((sources, targets))), len(sources))
        self._uploads.append(index)  # memory that is freed and used again would look like a race
        written = [_access(index.numbers, writes=True)]
        self.queue(f"upload of {index.count} offsets", queue, written, lambda: None)
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
        """See `Streams.move`."""
        offsets = index.part(blocks)
        read, written = Side(source, offsets[0]), Side(target, offsets[1])
        accesses = [*_side(shape, read, writes=False), *_side(shape, written, writes=True)]
        accesses += [_access(side.offsets, writes=False) for side in (read, written)]

        def run() -> None:
            move_by_reference(shape, read, written)

        self.queue(f"move of {len(offsets[0])} blocks", queue, accesses, run)

    def encode(
        self, queue: Queue, coded: Coded, layers: range, index: Index, blocks: slice
    ) -> None:
        """See `Streams.encode`."""
        numbers, places = index.part(blocks)
        rows = coded.blocks(layers, numbers, places)
        accesses = _coded(coded, rows, encodes=True)
        run = partial(coded.codec.encode_blocks, rows)
        self.queue(f"encoding of {len(numbers)} blocks", queue, accesses, run)

    def decode(
        self, queue: Queue, coded: Coded, layers: range, index: Index, blocks: slice
    ) -> None:
        """See `Streams.decode`."""
        places, numbers = index.part(blocks)
        rows = coded.blocks(layers, numbers, places)
        accesses = _coded(coded, rows, encodes=False)
        run = partial(coded.codec.decode_blocks, rows)
        self.queue(f"decoding of {len(numbers)} blocks", queue, accesses, run)

    def queue(
        self, name: str, queue: str, accesses: list[Access], run: Callable[[], object]
    ) -> None:
        """Queue any operation: what an engine computes, what a reader of host memory does."""
        before = self._pending.pop(queue, set()) | self.synchronized
        if queue in self._last:
            before.add(self._last[queue])
        self._last[queue] = self._add(name, queue, accesses, before, run)

    def _add(
        self,
        name: str,
        queue: str,
        accesses: list[Access],
        before: set[int],
        run: Callable[[], object],
    ) -> int:
        self.operations.append(Operation(name, queue, accesses, before, run))
        self._left.append(len(self.operations) - 1)
        return self._left[-1]

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

    def go_on(self) -> None:
        """Run `pace` operations that are ready, drawn by the seed."""
        if self.broken_after is not None and len(self.done) >= self.broken_after:
            raise RuntimeError("an error of the device, as planted")
        self._draw = self._draw or random.Random(self.seed)
        for _ in range(self.pace):
            self._left = [n for n in self._left if n not in self.done]
            ready = [n for n in self._left if self.operations[n].before <= self.done]
            if not ready:
                return
            chosen = self._draw.choice(ready)
            self.operations[chosen].run()
            self.done.add(chosen)

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
    """One access for each run of bytes of a block in a layer."""
    at, size = side.pool.arrangement, shape.head_bytes
    loops = [(shape.planes, at.plane), (shape.tokens, at.token), (shape.heads, at.head)]
    while loops and loops[-1][1] == size:
        size *= loops.pop()[0]
    starts = [0]
    for count, step in loops:
        starts = [start + n * step for start in starts for n in range(count)]
    return [
        Access(base + start, base + start + size, writes)
        for layer in side.pool.layers
        for base in (layer.data_ptr() + offset for offset in side.offsets.tolist() if offset >= 0)
        for start in starts
    ]


def _coded(coded: Coded, blocks: CodedRows, *, encodes: bool) -> list[Access]:
    """Both offsets, and the row and the codes of each layer of each block."""
    rows, memory = blocks.rows, blocks.memory
    size = rows.shape[1] * rows.element_size()
    width = coded.codec.encoded_bytes(rows.shape[1], rows.dtype)
    found = [_access(part, writes=False) for part in (blocks.numbers, blocks.places)]
    for layer in blocks.layers:
        for number, place in zip(blocks.numbers.tolist(), blocks.places.tolist(), strict=True):
            row = rows.data_ptr() + (number + layer) * size
            code = memory.data_ptr() + place + layer * blocks.layer_bytes
            found.append(Access(row, row + size, not encodes))
            found.append(Access(code, code + width, encodes))
    return found


def _conflict(left: list[Access], right: list[Access]) -> bool:
    return any(
        (a.writes or b.writes) and a.start < b.stop and b.start < a.stop
        for a in left
        for b in right
    )
