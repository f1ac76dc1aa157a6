"""Staging: warm pages of host memory to hot pages on the device and back, at the speed of the link.

A link is fast for large copies and very slow for many small ones, while the device itself moves
small pieces at the speed of its memory. So a warm page crosses the link whole, into or out of a
slot of a ring on the device, and a kernel spreads it over hot pages or gathers it from them.

A slot's life, going up, with four slots so that copies and kernels overlap:

1. TO_DEVICE waits until the slot's last reader, a kernel, is done, and copies pages into it.
2. RELAYOUT waits for the copies and spreads the blocks over their frames.

Going down, the kernel writes the slot and the copies read it, and both wait the other way round;
only the blocks that were asked for are copied, to their own places.

Invariants: a slot is written only after its last reader, and read only after its writer. Frames
are touched only after `after`, the events of who computed them or read them last. What is in host
memory may be touched by the host only after the event that a call gives. Single owner (the lane).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tierkv.core.geometry import MIB, PagePlan
from tierkv.kernels.relayout import Arrangement, BlockShape, Side
from tierkv.transfer.streams import Event, Queue, Streams

if TYPE_CHECKING:
    from torch import Tensor

SLOTS: Final = 4
SLOT_BYTES: Final = 8 * MIB


@dataclass(frozen=True, slots=True)
class PageMove:
    """Blocks of one warm page and their frames; `offsets` and `frames` go pairwise."""

    page: int
    offsets: list[int]
    frames: list[int]


class Staging:
    """A ring of device slots of a few warm pages, between an arena and a slab of hot pages.

    `host`: uint8 (pages, warm_page_bytes), pinned. `slab`: uint8, hot pages of all frames.
    """

    def __init__(
        self,
        streams: Streams,
        plan: PagePlan,
        host: Tensor,
        slab: Tensor,
        *,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        import torch

        self._streams = streams
        self._plan = plan
        self._host = host
        self._slab = slab.view(-1)
        shape = (slots, max(1, slot_bytes // plan.warm_page_bytes), plan.warm_page_bytes)
        self._slots = torch.empty(shape, dtype=torch.uint8, device=slab.device)
        self._released: list[Event | None] = [None] * slots
        self._next = 0
        # All layers of one block are moved as rows of one layer's bytes.
        self._shape = BlockShape(1, 1, 1, plan.block_layer_bytes)
        self._lies = Arrangement.canonical(self._shape)

    def load(self, moves: Sequence[PageMove], *, after: Sequence[Event] = ()) -> Event:
        """Bring blocks up; the event is when all of their frames hold them.

        `after`: who read or wrote those frames before. Without it they must be done with them.
        """
        for event in after:
            self._streams.wait(Queue.RELAYOUT, event)
        for group in self._groups(moves):
            number, slot = self._take(Queue.TO_DEVICE)
            for index, move in enumerate(group):
                self._streams.copy(Queue.TO_DEVICE, slot[index], self._host[move.page])
            self._streams.wait(Queue.RELAYOUT, self._streams.record(Queue.TO_DEVICE))
            self._move(self._in_slot(slot, group), self._in_slab(group))
            self._released[number] = self._streams.record(Queue.RELAYOUT)
        return self._streams.record(Queue.RELAYOUT)

    def load_layers(self, moves: Sequence[PageMove], *, after: Sequence[Event] = ()) -> list[Event]:
        """As `load`, layer after layer: event i is when all frames hold layer i.

        Attention of a layer can begin while the next ones cross the link. A layer of a warm page is
        one run; where it is smaller than 64 KiB the link is used badly, and `load` is better.
        """
        plan = self._plan
        for event in after:
            self._streams.wait(Queue.RELAYOUT, event)
        step = plan.warm_page_blocks * plan.block_layer_bytes
        room = self._slots[0].numel() // step
        groups = [moves[at : at + room] for at in range(0, len(moves), room)]
        events = []
        for layer in range(plan.layers):
            part = slice(layer * step, (layer + 1) * step)
            for group in groups:
                number, slot = self._take(Queue.TO_DEVICE)
                runs = slot.view(-1)[: room * step].view(room, step)
                for index, move in enumerate(group):
                    self._streams.copy(Queue.TO_DEVICE, runs[index], self._host[move.page, part])
                self._streams.wait(Queue.RELAYOUT, self._streams.record(Queue.TO_DEVICE))
                places = [
                    index * step + offset * plan.block_layer_bytes
                    for index, move in enumerate(group)
                    for offset in move.offsets
                ]
                frames = self._in_slab(group)
                self._move(
                    self._side([slot.view(-1)], places),
                    frames._replace(layers=frames.layers[layer : layer + 1]),
                )
                self._released[number] = self._streams.record(Queue.RELAYOUT)
            events.append(self._streams.record(Queue.RELAYOUT))
        return events

    def save(self, moves: Sequence[PageMove], *, after: Sequence[Event] = ()) -> Event:
        """Bring blocks down; the event is when all of their places in host memory hold them.

        `after`: what computed them. Without it they must have been complete before the call.
        """
        for event in after:
            self._streams.wait(Queue.RELAYOUT, event)
        for group in self._groups(moves):
            number, slot = self._take(Queue.RELAYOUT)
            self._move(self._in_slab(group), self._in_slot(slot, group))
            self._streams.wait(Queue.TO_HOST, self._streams.record(Queue.RELAYOUT))
            for index, move in enumerate(group):
                for start, stop in self._runs(move.offsets):
                    self._streams.copy(
                        Queue.TO_HOST, self._host[move.page, start:stop], slot[index, start:stop]
                    )
            self._released[number] = self._streams.record(Queue.TO_HOST)
        return self._streams.record(Queue.TO_HOST)

    def _take(self, queue: Queue) -> tuple[int, Tensor]:
        """The next slot, once its last user is done with it."""
        number = self._next
        self._next = (number + 1) % len(self._released)
        released = self._released[number]
        if released is not None:
            self._streams.wait(queue, released)
        return number, self._slots[number]

    def _groups(self, moves: Sequence[PageMove]) -> Iterator[Sequence[PageMove]]:
        """As many pages as a slot holds: a launch costs as much as a page takes on the link."""
        size = self._slots.shape[1]
        return (moves[at : at + size] for at in range(0, len(moves), size))

    def _move(self, source: Side, target: Side) -> None:
        self._streams.move(Queue.RELAYOUT, self._shape, source, target)

    def _in_slot(self, slot: Tensor, moves: Sequence[PageMove]) -> Side:
        """Page after page, in each layer after layer, in each all blocks of the page."""
        plan, memory = self._plan, slot.view(-1)
        step = plan.warm_page_blocks * plan.block_layer_bytes
        layers = [memory[n * step :] for n in range(plan.layers)]
        places = [
            index * plan.warm_page_bytes + offset * plan.block_layer_bytes
            for index, move in enumerate(moves)
            for offset in move.offsets
        ]
        return self._side(layers, places)

    def _in_slab(self, moves: Sequence[PageMove]) -> Side:
        """Frame after frame, in each all layers of a block."""
        plan = self._plan
        layers = [self._slab[n * plan.block_layer_bytes :] for n in range(plan.layers)]
        return self._side(
            layers, [frame * plan.block_bytes for move in moves for frame in move.frames]
        )

    def _side(self, layers: Sequence[Tensor], offsets: list[int]) -> Side:
        import torch

        return Side(layers, torch.tensor(offsets, dtype=torch.int64), self._lies)

    def _runs(self, offsets: Sequence[int]) -> list[tuple[int, int]]:
        """Byte ranges of these blocks in a warm page, neighbours joined."""
        plan = self._plan
        places: npt.NDArray[np.int64] = np.sort(np.asarray(offsets, np.int64))
        layers = np.arange(plan.layers)[:, None] * plan.warm_page_blocks
        numbers = (layers + places).ravel()
        starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        stops = np.append(starts[1:], len(numbers))
        size = plan.block_layer_bytes
        return [
            (int(numbers[a]) * size, (int(numbers[b - 1]) + 1) * size)
            for a, b in zip(starts, stops, strict=True)
        ]


def page_moves(
    places: Iterable[tuple[int, int]], page_blocks: int, *, host_first: bool
) -> list[PageMove]:
    """Pairs of a host place and a frame, either first, as one move a warm page, in their order."""
    pages: dict[int, PageMove] = {}
    for first, second in places:
        place, frame = (first, second) if host_first else (second, first)
        page, offset = divmod(place, page_blocks)
        move = pages.setdefault(page, PageMove(page, [], []))
        move.offsets.append(offset)
        move.frames.append(frame)
    return list(pages.values())
