"""Hints: what is known of the future, and what happens at a time.

Hints come before any prediction. A prefix is named by its keys; what is not known (any more) is
ignored, as a hint is never an obligation. Single owner (the planner).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tierkv.core.keys import BlockKey
from tierkv.core.stats import Stats
from tierkv.core.tier import TierId
from tierkv.plan import events as ev
from tierkv.plan.movement import Movement, Out
from tierkv.plan.radix import RadixIndex
from tierkv.plan.residency import NO_PLACE
from tierkv.plan.spec import PlanSpec

_RETRY_NS = 1_000_000_000


class Hints:
    """Carries hints out, now or when their time comes."""

    def __init__(self, spec: PlanSpec, index: RadixIndex, movement: Movement, stats: Stats) -> None:
        self._index = index
        self._movement = movement
        self._tables = movement.tables
        self._host = movement.tables[TierId.HOST]
        self._stats = stats
        self._ttl_ns = {n.name: n.ttl_ns for n in spec.namespaces if n.ttl_ns is not None}
        self._expire = _Clock()
        self._expect = _Clock()
        self._deadline: dict[BlockKey, int] = {}

    def filled(self, blocks: Sequence[int], namespace: str, now_ns: int) -> None:
        """Blocks were put: the namespace's time to live begins."""
        ttl_ns = self._ttl_ns.get(namespace) if self._ttl_ns else None
        if ttl_ns is not None:
            keys = [self._index.key(block) for block in blocks]
            self._set_deadline(keys, now_ns + ttl_ns, namespace)

    def take(self, event: ev.Hint, now_ns: int, out: Out) -> None:
        """An engine's word about a prefix."""
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        self._stats.add("tierkv_hints_total", 1, event.kind)
        if event.kind is ev.HintKind.EXPECT and event.at_ns > now_ns:
            self._expect.add(event.at_ns, keys, event.namespace)
            return
        if event.kind is ev.HintKind.TTL:
            self._set_deadline(keys, event.at_ns, event.namespace)
            return
        blocks = self._index.match(keys)
        if event.kind is ev.HintKind.PIN:
            self._movement.held.update(blocks)
        elif event.kind is ev.HintKind.UNPIN:
            self._movement.held.difference_update(blocks)
        elif event.kind is ev.HintKind.FORGET:
            self._forget(blocks, out)
        elif event.kind is ev.HintKind.DEMOTE:
            self._demote(blocks, now_ns, out)
        else:
            self._prefetch(blocks, now_ns, out)

    def _prefetch(self, blocks: Sequence[int], now_ns: int, out: Out) -> None:
        cold, host = self._tables.get(TierId.COLD), self._host
        if cold is not None:
            size = cold.page_blocks
            pages = dict.fromkeys(
                cold.ready[b] // size
                for b in blocks
                if cold.ready[b] >= 0 and host.place[b] == NO_PLACE
            )
            number, _ = self._movement.promote(pages, ev.Urgency.PREFETCH, now_ns, out)
            if number is not None:
                flight = self._movement.flights[number]
                for move, arriving in zip(flight.transfer.moves, flight.arriving, strict=True):
                    self._movement.prefetched[move.target] = len(arriving)
        if TierId.DEVICE in self._tables:
            urgency = ev.Urgency.PREFETCH
            self._movement.copy(blocks, TierId.HOST, TierId.DEVICE, urgency, now_ns, out)

    def _demote(self, blocks: Sequence[int], now_ns: int, out: Out) -> None:
        """The prefix pauses: make it the first to go, after a cold copy of it exists."""
        host, size = self._host, self._host.page_blocks
        pages = {host.ready[b] // size for b in blocks if host.ready[b] >= 0}
        self._movement.write_back(
            sorted(pages & self._movement.dirty), ev.Urgency.DEMOTE, now_ns, out
        )
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
            self._movement.drop(tier, idle)
            if tier is TierId.COLD:
                empty = sorted(page for page in pages if page not in table.pool.owner)
                if empty:
                    out.append(ev.Erase(empty))

    def _set_deadline(self, keys: Sequence[BlockKey], at_ns: int, namespace: str) -> None:
        for key in keys:
            self._deadline[key] = at_ns
        self._expire.add(at_ns, keys, namespace)

    def tick(self, event: ev.Tick, now_ns: int, out: Out) -> None:
        """Time has passed: drop what is over, fetch what is expected."""
        for keys, _ in self._expire.due(now_ns):
            due = [key for key in keys if self._deadline.get(key, now_ns + 1) <= now_ns]
            found = [(key, self._index.find(key)) for key in due]
            for key in due:
                del self._deadline[key]
            self._forget([block for _, block in found if block is not None], out)
            left = [key for key, _ in found if self._is_resident(key)]
            if left:  # somebody reads them now: ask again a second later
                self._set_deadline(left, now_ns + _RETRY_NS, "")
        for keys, _ in self._expect.due(now_ns):
            self._prefetch(self._index.match(keys), now_ns, out)

    def _is_resident(self, key: bytes) -> bool:
        block = self._index.find(key)
        return block is not None and any(t.place[block] >= 0 for t in self._tables.values())


@dataclass(slots=True)
class _Clock:
    """Things that happen at a time: a heap with a tie-breaker, so that order is total."""

    heap: list[tuple[int, int, Sequence[BlockKey], str]] = field(default_factory=list)
    count: int = 0

    def add(self, at_ns: int, keys: Sequence[BlockKey], namespace: str) -> None:
        heapq.heappush(self.heap, (at_ns, self.count, keys, namespace))
        self.count += 1

    def due(self, now_ns: int) -> Iterable[tuple[Sequence[BlockKey], str]]:
        while self.heap and self.heap[0][0] <= now_ns:
            _, _, keys, namespace = heapq.heappop(self.heap)
            yield keys, namespace
