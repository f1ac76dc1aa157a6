"""Staging: blocks of warm pages in host memory to places on the device and back, at link speed.

A link is fast for large copies and very slow for many small ones, while the device itself moves
small pieces at the speed of its memory. So a warm page crosses the link as few large copies, into
or out of a slot of a ring on the device, and a kernel spreads it over hot pages or gathers it from
them. Where only a little of a page is wanted, the kernel reads or writes mapped host memory itself.
Which way is the fastest for a page is reckoned from the measured `LinkProfile`:

- `Route.PAGE`: the whole page is copied, joined with its neighbours (only up);
- `Route.RUNS`: only the wanted blocks, a copy for each run of them in each layer;
- `Route.MAPPED`: the kernel alone, between host memory and the device.

A slot's life, going up, with four slots so that copies and kernels overlap:

1. TO_DEVICE waits until the slot's last reader, a kernel, is done, and copies pages into it.
2. RELAYOUT waits for the copies and spreads the blocks over their frames.

Going down, the kernel writes the slot and the copies read it, and both wait the other way round.

Invariants: a slot is written only after its last reader, and read only after its writer. Frames
are touched only after `after`, the events of who computed them or read them last. What is in host
memory may be touched by the host only after the event that a call gives. Single owner (the lane).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import MIB
from tierkv.kernels.driver import Copies
from tierkv.transfer.link_profile import PUBLISHED, LinkProfile
from tierkv.transfer.page_batch import Flags, Numbers, PageBatch
from tierkv.transfer.spread import Spread
from tierkv.transfer.streams import Event, Index, Queue, Streams

if TYPE_CHECKING:
    from torch import Tensor

SLOTS: Final = 4
SLOT_BYTES: Final = 16 * MIB


class Route(IntEnum):
    """How blocks of a page cross the link; see the module."""

    PAGE = 0
    RUNS = 1
    MAPPED = 2


class _Copies(NamedTuple):
    """All copies of a call; those of group n are ``edges[n]`` up to ``edges[n + 1]``."""

    all: Copies
    edges: list[int]
    pinned: Flags | None


class Staging:
    """A ring of device slots of a few warm pages, between an arena and blocks on the device.

    `host`: uint8 (pages, warm_page_bytes of the spread's plan). `spread`: the form of blocks in
    pages, where they lie on the device, and the kernels between the two. `regions` gives the
    number of the pinned region that a page of the arena lies in, -1 while it lies in none; a copy
    must not leave its region. Without it the arena is one pinned region.
    """

    def __init__(
        self,
        streams: Streams,
        host: Tensor,
        spread: Spread,
        *,
        profile: LinkProfile = PUBLISHED,
        regions: Callable[[Numbers], Numbers] | None = None,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        import torch

        plan = spread.plan
        self.profile = profile
        self._full_page_route = {
            queue: _full_page_route(profile, queue, plan.warm_payload_bytes)
            for queue in (Queue.TO_DEVICE, Queue.TO_HOST)
        }
        self.moved_bytes = dict.fromkeys(Route, 0)
        self._streams = streams
        self._plan = plan
        self._host = host
        self._spread = spread
        self._regions = regions
        self._slot_pages = max(1, slot_bytes // plan.warm_page_bytes)
        size = self._slot_pages * plan.warm_page_bytes
        memory = torch.empty((slots, size), dtype=torch.uint8, device=spread.device)
        self._slots = [spread.area(slot) for slot in memory]
        self._addresses = np.array([slot.data_ptr() for slot in memory])
        # For a layer at a time: the same slots, a page in them being one layer of a warm page.
        self._layer_bytes = plan.warm_page_blocks * plan.block_layer_bytes
        self._layer_slots = [spread.area(slot, is_layer=True) for slot in memory]
        self._arena = spread.area(host.view(-1))
        self._released: list[Event | None] = [None] * slots
        self._next = 0
        self._count = len(host) * plan.warm_page_blocks

    def load(self, places: Numbers, frames: Numbers, *, after: Sequence[Event] = ()) -> Event:
        """Bring blocks up; the event is when all of their frames hold them.

        `places`: where they are in the arena, ``page * warm_page_blocks + offset``; pairwise with
        `frames`, int64 (n,), none twice. They must hold their bytes already: a copy may read them
        before anything that was queued. `after`: who read or wrote those frames before. Raises
        GeometryMismatch for places or frames that do not exist; then nothing was started.
        """
        batch = self._batch(places, frames)
        self._wait_for(after)
        routes = self._routes(Queue.TO_DEVICE, batch)
        staged = routes != Route.MAPPED
        with _Indices(self._streams) as indices:
            if not staged.all():
                self._move_mapped(batch.only(~staged), indices, is_up=True)
            if staged.any():
                self._load_staged(batch.only(staged), routes[staged] == Route.PAGE, indices)
        return indices.end

    def save(self, places: Numbers, frames: Numbers, *, after: Sequence[Event] = ()) -> Event:
        """Bring blocks down; the event is when all of their places in host memory hold them.

        As `load`. `after`: what computed them. Without it they must have been complete before.
        """
        batch = self._batch(places, frames)
        self._wait_for(after)
        staged = self._routes(Queue.TO_HOST, batch) != Route.MAPPED
        with _Indices(self._streams) as indices:
            if not staged.all():
                self._move_mapped(batch.only(~staged), indices, is_up=False)
            if staged.any():
                return self._save_staged(batch.only(staged), indices)
        return indices.end

    def load_layers(
        self, places: Numbers, frames: Numbers, *, after: Sequence[Event] = ()
    ) -> list[Event]:
        """As `load`, layer after layer: event i is when all frames hold layer i.

        Attention of a layer can begin while the next ones cross the link. A layer of a warm page is
        one run; where it is smaller than the crossover `load` is better.
        """
        plan, step, streams = self._plan, self._layer_bytes, self._streams
        batch = self._batch(places, frames)
        self._wait_for(after)
        room = self._slot_pages * plan.layers
        group, rank = np.divmod(np.arange(len(batch.pages), dtype=np.int64), room)
        offsets = np.repeat(rank * step, batch.count) + batch.within * plan.block_layer_bytes
        host = self._host.data_ptr() + batch.pages * plan.warm_page_bytes
        size = np.full(len(rank), step, np.int64)
        groups = list(self._groups(batch, room))
        edges = [0, *(pages.stop for pages, _ in groups)]
        pinned = None if self._regions is None else self._regions(batch.pages) >= 0
        events = []
        with _Indices(streams) as indices:
            index = indices.put(Queue.TO_DEVICE, offsets, batch.frames)
            for layer in range(plan.layers):
                slots = self._slot_addresses(group) + rank * step
                copies = _Copies(Copies(slots, host + layer * step, size), edges, pinned)
                for number, (_, blocks) in enumerate(groups):
                    slot = self._take(Queue.TO_DEVICE)
                    self._copy(Queue.TO_DEVICE, copies, number)
                    streams.wait(Queue.RELAYOUT, streams.record(Queue.TO_DEVICE))
                    self._layer_slots[slot].up(index, blocks, layer)
                    self._released[slot] = streams.record(Queue.RELAYOUT)
                events.append(streams.record(Queue.RELAYOUT))
        self.moved_bytes[Route.PAGE] += len(batch.pages) * plan.warm_payload_bytes
        return events

    def drain(self) -> None:
        """Wait until nothing is under way."""
        self._streams.begin()
        for queue in Queue:
            self._streams.record(queue).synchronize()

    # ---- routes

    def _routes(self, queue: Queue, batch: PageBatch) -> Numbers:
        """The fastest route of each page, by the profile."""
        plan = self._plan
        routes = np.full(len(batch.pages), self._full_page_route[queue], np.int64)
        if len(batch.within) == len(routes) * plan.warm_page_blocks and self._regions is None:
            self.moved_bytes[self._full_page_route[queue]] += len(routes) * plan.warm_payload_bytes
            return routes
        count = batch.count
        partial = count != plan.warm_page_blocks
        if partial.any():
            routes[partial] = self._partial_routes(queue, batch.only(partial))
        if self._regions is not None:
            routes[(routes == Route.MAPPED) & (self._regions(batch.pages) < 0)] = Route.RUNS
        crossed = np.where(routes == Route.PAGE, plan.warm_page_blocks, count)
        blocks = np.bincount(routes, crossed, minlength=len(Route))
        for route in Route:
            self.moved_bytes[route] += int(blocks[route]) * plan.block_bytes
        return routes

    def _partial_routes(self, queue: Queue, batch: PageBatch) -> Numbers:
        plan, way = self._plan, self.profile.of(queue)
        wanted = batch.count * plan.block_bytes
        pieces = np.bincount(batch.runs()[0], minlength=len(wanted)) * plan.layers
        by_runs = way.copy_seconds(wanted // pieces, wanted)
        mapped = wanted / way.kernel
        routes = np.where(mapped < by_runs, Route.MAPPED, Route.RUNS)
        if queue is Queue.TO_DEVICE:
            page = np.array([plan.warm_payload_bytes])
            is_page = way.copy_seconds(page, page) <= np.minimum(mapped, by_runs)
            routes = np.where(is_page, Route.PAGE, routes)
        return routes

    def _move_mapped(self, batch: PageBatch, indices: _Indices, *, is_up: bool) -> None:
        """By the kernel alone, between the arena and the frames."""
        plan = self._plan
        page = np.repeat(batch.pages * plan.warm_page_bytes, batch.count)
        places = page + batch.within * plan.block_layer_bytes
        blocks = slice(0, len(places))
        if is_up:
            self._arena.up(indices.put(Queue.RELAYOUT, places, batch.frames), blocks)
        else:
            self._arena.down(indices.put(Queue.RELAYOUT, batch.frames, places), blocks)

    def _load_staged(self, batch: PageBatch, whole: Flags, indices: _Indices) -> None:
        streams = self._streams
        whole = whole | (batch.count == self._plan.warm_page_blocks)
        copies = self._copies(Queue.TO_DEVICE, batch, whole)
        index = indices.put(Queue.TO_DEVICE, self._slot_offsets(batch), batch.frames)
        for number, (_, blocks) in enumerate(self._groups(batch, self._slot_pages)):
            slot = self._take(Queue.TO_DEVICE)
            self._copy(Queue.TO_DEVICE, copies, number)
            streams.wait(Queue.RELAYOUT, streams.record(Queue.TO_DEVICE))
            self._slots[slot].up(index, blocks)
            self._released[slot] = streams.record(Queue.RELAYOUT)

    def _save_staged(self, batch: PageBatch, indices: _Indices) -> Event:
        streams = self._streams
        copies = self._copies(Queue.TO_HOST, batch, batch.count == self._plan.warm_page_blocks)
        index = indices.put(Queue.RELAYOUT, batch.frames, self._slot_offsets(batch))
        done: Event | None = None
        for number, (_, blocks) in enumerate(self._groups(batch, self._slot_pages)):
            slot = self._take(Queue.RELAYOUT)
            self._slots[slot].down(index, blocks)
            streams.wait(Queue.TO_HOST, streams.record(Queue.RELAYOUT))
            self._copy(Queue.TO_HOST, copies, number)
            done = self._released[slot] = streams.record(Queue.TO_HOST)
        # Mapped blocks came before the gathers on their stream, and the copies after them.
        assert done is not None
        return done

    # ---- copies

    def _copies(self, queue: Queue, batch: PageBatch, whole: Flags) -> _Copies:
        """Whole pages as one copy each, of others each run in each layer; neighbours joined.

        Up with their padding, so that neighbours are one copy; down it would spoil the page's own.
        """
        plan, up = self._plan, queue is Queue.TO_DEVICE
        page = np.flatnonzero(whole)
        within: Numbers = np.zeros(len(page), np.int64)
        size = np.full(len(page), plan.warm_page_bytes if up else plan.warm_payload_bytes, np.int64)
        if len(page) < len(whole):
            some, first, count = batch.only(~whole).runs()
            layers = np.arange(plan.layers, dtype=np.int64)[:, None] * self._layer_bytes
            starts = (layers + first * plan.block_layer_bytes).ravel()
            lengths = np.tile(count * plan.block_layer_bytes, plan.layers)
            page = np.concatenate((page, np.tile(np.flatnonzero(~whole)[some], plan.layers)))
            order = np.argsort(page, kind="stable")
            page = page[order]
            within = np.concatenate((within, starts))[order]
            size = np.concatenate((size, lengths))[order]
        group, rank = np.divmod(page, self._slot_pages)
        slot = self._slot_addresses(group) + rank * plan.warm_page_bytes + within
        host = self._host.data_ptr() + batch.pages[page] * plan.warm_page_bytes + within
        goes_on = (slot[1:] == slot[:-1] + size[:-1]) & (host[1:] == host[:-1] + size[:-1])
        goes_on &= group[1:] == group[:-1]
        pinned = None
        if self._regions is not None:
            regions = self._regions(batch.pages[page])
            goes_on &= regions[1:] == regions[:-1]
            pinned = regions >= 0
        if goes_on.any():
            begin = np.concatenate(([0], np.flatnonzero(~goes_on) + 1))
            size = np.add.reduceat(size, begin)
            slot, host, group = slot[begin], host[begin], group[begin]
            pinned = None if pinned is None else pinned[begin]
        edges = group.searchsorted(np.arange(int(group[-1]) + 2)).tolist()
        copies = Copies(slot, host, size) if up else Copies(host, slot, size)
        return _Copies(copies, edges, None if pinned is None or pinned.all() else pinned)

    def _copy(self, queue: Queue, copies: _Copies, number: int) -> None:
        """Those of one group; what is not pinned by itself."""
        start, stop = copies.edges[number : number + 2]
        part = copies.all.part(start, stop)
        if copies.pinned is None:
            self._streams.copy(queue, part)
            return
        pinned = copies.pinned[start:stop]
        for flag in (True, False):
            chosen = pinned == flag
            if chosen.any():
                only = Copies(*(vector[chosen] for vector in part))
                self._streams.copy(queue, only, pinned=flag)

    def _slot_addresses(self, group: Numbers) -> Numbers:
        """Of the slots that the groups of a call will take, one after the other."""
        slots: Numbers = self._addresses[(self._next + group) % len(self._addresses)]
        return slots

    # ---- batches and slots

    def _batch(self, places: Numbers, frames: Numbers) -> PageBatch:
        if len(places) != len(frames) or not len(places):
            raise GeometryMismatch(f"{len(places)} places for {len(frames)} frames")
        offsets = self._spread.offsets(frames)
        for what, numbers, last in (
            ("places", places, self._count - 1),
            ("offsets of frames", offsets, self._spread.device_end),
        ):
            if numbers.min() < 0 or numbers.max() > last:
                raise GeometryMismatch(
                    f"{what} {numbers.min()} to {numbers.max()} leave memory that ends at {last}"
                )
        return PageBatch.of(places, offsets, self._plan.warm_page_blocks)

    def _slot_offsets(self, batch: PageBatch) -> Numbers:
        """Where each block lies in the slot of its group."""
        plan = self._plan
        rank = np.arange(len(batch.pages), dtype=np.int64) % self._slot_pages
        page = np.repeat(rank * plan.warm_page_bytes, batch.count)
        slot: Numbers = page + batch.within * plan.block_layer_bytes
        return slot

    def _groups(self, batch: PageBatch, room: int) -> Iterator[tuple[slice, slice]]:
        """As many pages as a slot holds, and their blocks: a launch costs as much as a page."""
        count, first = len(batch.pages), batch.first
        for start in range(0, count, room):
            stop = min(start + room, count)
            yield slice(start, stop), slice(int(first[start]), int(first[stop]))

    def _take(self, queue: Queue) -> int:
        """The next slot, once its last user is done with it."""
        number = self._next
        self._next = (number + 1) % len(self._released)
        released = self._released[number]
        if released is not None:
            self._streams.wait(queue, released)
        return number

    def _wait_for(self, after: Sequence[Event]) -> None:
        """Begin, behind these events."""
        self._streams.begin()
        for event in after:
            self._streams.wait(Queue.RELAYOUT, event)


class _Indices:
    """Index vectors of one call; given back at the event of its last kernel."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._used: list[Index] = []

    def __enter__(self) -> Self:
        return self

    def put(self, queue: Queue, sources: Numbers, targets: Numbers) -> Index:
        """Offsets, in one upload; kernels may read them once `queue` got there."""
        index = self._streams.upload(queue, sources, targets)
        self._used.append(index)
        return index

    def __exit__(self, *_: object) -> None:
        self.end = self._streams.record(Queue.RELAYOUT)
        for index in self._used:
            index.until = self.end


def _full_page_route(profile: LinkProfile, queue: Queue, payload_bytes: int) -> Route:
    way, page = profile.of(queue), np.array([payload_bytes])
    if way.copy_seconds(page, page)[0] > payload_bytes / way.kernel:
        return Route.MAPPED
    return Route.PAGE if queue is Queue.TO_DEVICE else Route.RUNS
