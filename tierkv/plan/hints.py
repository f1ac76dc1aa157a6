"""Hints: what is known of the future, and what happens at a time.

Hints come before any prediction. A prefix is named by its keys; what is not known (any more) is
ignored, as a hint is never an obligation. Single owner (the planner).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from tierkv.core.keys import BlockKey
from tierkv.core.stats import Stats
from tierkv.core.tier import TierId
from tierkv.core.transfer import Urgency
from tierkv.plan import events as ev
from tierkv.plan.movement import Movement
from tierkv.plan.radix import RadixIndex
from tierkv.plan.residency import NO_PLACE
from tierkv.plan.room import Out
from tierkv.plan.spec import PlanSpec

_RETRY_NS: Final = 1_000_000_000

T = TypeVar("T")


class Hints:
    """Carries hints out, now or when their time comes."""

    def __init__(self, spec: PlanSpec, index: RadixIndex, movement: Movement, stats: Stats) -> None:
        self._index = index
        self._movement = movement
        self._tables = movement.tables
        self._host = movement.tables[TierId.HOST]
        self._stats = stats
        self._ttl_ns = {n.name: n.ttl_ns for n in spec.namespaces if n.ttl_ns is not None}
        self._expire: _Clock[Sequence[int]] = _Clock()
        self._expect: _Clock[list[BlockKey]] = _Clock()

    def filled(self, blocks: Sequence[int], namespace: str, now_ns: int) -> None:
        """Blocks were put: the namespace's time to live begins."""
        ttl_ns = self._ttl_ns.get(namespace)
        if ttl_ns is not None:
            self._set_deadline(blocks, now_ns + ttl_ns)

    def take(self, event: ev.Hint, now_ns: int, out: Out) -> None:
        """An engine's word about a prefix."""
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        self._stats.add("tierkv_hints_total", 1, event.kind)
        if event.kind is ev.HintKind.EXPECT and event.at_ns > now_ns:
            self._expect.add(event.at_ns, keys)
            return
        blocks = self._index.match(keys)
        if event.kind is ev.HintKind.TTL:
            self._set_deadline(blocks, event.at_ns)
        elif event.kind is ev.HintKind.PIN:
            self._movement.held.update(blocks)
        elif event.kind is ev.HintKind.UNPIN:
            self._movement.held.difference_update(blocks)
        elif event.kind is ev.HintKind.FORGET:
            self._forget(blocks, out)
        elif event.kind is ev.HintKind.SAVE:
            self._save(blocks, now_ns, out)
        elif event.kind is ev.HintKind.DEMOTE:
            self._demote(blocks, now_ns, out)
        else:
            self._prefetch(blocks, now_ns, out)

    def clear(self, event: ev.Clear, now_ns: int, out: Out) -> None:
        """Forget everything that nobody uses."""
        self._forget([block for run in self._index.runs() for block in run], out)

    def _prefetch(self, blocks: Sequence[int], now_ns: int, out: Out) -> None:
        cold, host = self._tables.get(TierId.COLD), self._host
        if cold is not None:
            size = cold.page_blocks
            pages = dict.fromkeys(
                cold.ready[b] // size
                for b in blocks
                if cold.ready[b] >= 0 and host.place[b] == NO_PLACE
            )
            number, _ = self._movement.promote(pages, Urgency.PREFETCH, now_ns, out)
            if number is not None:
                flight = self._movement.flights[number]
                for move, arriving in zip(flight.transfer.moves, flight.arriving, strict=True):
                    self._movement.prefetches.began(move.target, len(arriving))
        if TierId.DEVICE in self._tables:
            urgency = Urgency.PREFETCH
            self._movement.copy(blocks, TierId.HOST, TierId.DEVICE, urgency, now_ns, out)

    def _save(self, blocks: Sequence[int], now_ns: int, out: Out) -> None:
        """Have a cold copy made of what has none."""
        host, size = self._host, self._host.page_blocks
        pages = {host.ready[b] // size for b in blocks if host.ready[b] >= 0}
        self._movement.write_back(sorted(pages & self._movement.dirty), Urgency.DEMOTE, now_ns, out)

    def _demote(self, blocks: Sequence[int], now_ns: int, out: Out) -> None:
        """The prefix pauses: make it the first to go, after a cold copy of it exists."""
        self._save(blocks, now_ns, out)
        for tier in (TierId.DEVICE, TierId.HOST):
            table = self._tables.get(tier)
            if table is None:
                continue
            idle = [b for b in blocks if table.ready[b] >= 0]
            idle = [b for b in idle if not table.pins[table.ready[b] // table.page_blocks]]
            below = [t for t in self._tables if t > tier]
            safe = [b for b in idle if any(self._tables[t].ready[b] >= 0 for t in below)]
            self._movement.drop(tier, [b for b in safe if b not in self._movement.held])

    def _forget(self, blocks: Sequence[int], out: Out) -> None:
        """Drop every copy that nobody uses; cold pages left empty are erased."""
        self._movement.held.difference_update(blocks)
        for tier in list(self._tables):
            table = self._tables[tier]
            idle = [b for b in blocks if table.ready[b] >= 0]
            idle = [b for b in idle if not table.pins[table.ready[b] // table.page_blocks]]
            pages = {table.ready[b] // table.page_blocks for b in idle}
            if tier is TierId.COLD:
                self._drop_cold(idle, sorted(pages), out)
            else:
                self._movement.drop(tier, idle)

    def _drop_cold(self, blocks: Sequence[int], pages: Sequence[int], out: Out) -> None:
        """Drop blocks on disk; pages left empty are erased."""
        cold = self._tables[TierId.COLD]
        for page in pages:
            cold.pin(page)
        self._movement.drop(TierId.COLD, blocks)
        self._movement.erase_empty(pages, out)

    def erased(self, event: ev.Erased, now_ns: int, out: Out) -> None:
        """Erased pages may be used again."""
        for page in event.pages:
            self._movement.unpin(TierId.COLD, page)

    def _set_deadline(self, blocks: Sequence[int], at_ns: int) -> None:
        self._movement.deadlines.update(dict.fromkeys(blocks, at_ns))
        self._expire.add(at_ns, blocks)

    def tick(self, event: ev.Tick, now_ns: int, out: Out) -> None:
        """Time has passed: drop what is over, fetch what is expected."""
        deadlines = self._movement.deadlines
        for blocks in self._expire.due(now_ns):
            # An id that was given to another block has that block's deadline, or none.
            over = [b for b in blocks if deadlines.get(b, now_ns + 1) <= now_ns]
            self._forget(over, out)
            left = [b for b in over if any(t.place[b] >= 0 for t in self._tables.values())]
            for block in over:
                del deadlines[block]
            if left:  # somebody reads them now: ask again later
                self._set_deadline(left, now_ns + _RETRY_NS)
        for keys in self._expect.due(now_ns):
            self._prefetch(self._index.match(keys), now_ns, out)


@dataclass(slots=True)
class _Clock(Generic[T]):
    """Things that happen at a time: a heap with a tie-breaker, so that order is total."""

    heap: list[tuple[int, int, T]] = field(default_factory=list)
    count: int = 0

    def add(self, at_ns: int, item: T) -> None:
        heapq.heappush(self.heap, (at_ns, self.count, item))
        self.count += 1

    def due(self, now_ns: int) -> Iterable[T]:
        while self.heap and self.heap[0][0] <= now_ns:
            yield heapq.heappop(self.heap)[2]
