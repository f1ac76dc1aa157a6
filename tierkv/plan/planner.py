"""Planner: decides what lies where. Events in, instructions out.

It owns the radix index, the residency of every block in every tier, the policies and the hints;
it has no clock, no I/O, no thread and no torch. The live store and the simulator are two loops
around it. Single owner: the store calls it under its lock.

Life of a block: `Put` gives it places in the memory tiers (`Fill`); `Filled` publishes it and,
when its warm page is full, starts the write-back; `Acquire` pins it where it is readable, or
starts a promotion and says which transfers to wait for (`Grant`); `Release` lets it go.

A transfer that is not finished is not a hit: only READY blocks are granted.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tierkv.core.keys import BlockKey
from tierkv.core.stats import Stats
from tierkv.core.tier import Span, TierId
from tierkv.plan import events as ev
from tierkv.plan.movement import Movement, Out
from tierkv.plan.radix import ROOT, RadixIndex
from tierkv.plan.residency import NO_PLACE
from tierkv.plan.spec import PlanSpec

#: The fastest tier that can serve each block first.
_MEMORY = (TierId.DEVICE, TierId.HOST)


class Located(NamedTuple):
    """Consecutive blocks of a lease that lie in one tier; spans count from the lease's start."""

    tier: TierId
    spans: list[Span]


@dataclass(slots=True)
class Ticket:
    """A fill under way."""

    tier: TierId
    blocks: Sequence[int]
    pages: list[int]


@dataclass(slots=True)
class LeaseRecord:
    """Blocks handed to a reader, and every pin taken for it."""

    blocks: list[int]
    pins: list[tuple[TierId, int]]
    namespace: str
    ready: list[Located] | None = None


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


class Planner:
    """See the module. `stats` holds the counters of what was decided."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        self.stats = Stats()
        self.index = RadixIndex()
        self.movement = Movement(spec, self.index, self.stats)
        self.tables = self.movement.tables
        self.tickets: dict[int, Ticket] = {}
        self.leases: dict[int, LeaseRecord] = {}
        self._host = self.tables[TierId.HOST]
        self._has_ttl = any(space.ttl_ns is not None for space in spec.namespaces)
        self._namespaces = {n.name: n for n in spec.namespaces}
        self._next_number = 0
        self._expire = _Clock()
        self._expect = _Clock()
        self._deadline: dict[BlockKey, int] = {}
        handlers: Mapping[type, Callable[..., None]] = {
            ev.Put: self._put,
            ev.Filled: self._filled,
            ev.Acquire: self._acquire,
            ev.Release: self._release,
            ev.Admit: self._admit,
            ev.Touch: self._touch,
            ev.TransferDone: self._transfer_done,
            ev.Hint: self._hint,
            ev.Flush: self._flush,
            ev.Recovered: self._recovered,
            ev.Distrust: self._distrust,
            ev.Tick: self._tick,
        }
        self._handlers = handlers

    def handle(self, event: ev.AnyEvent, now_ns: int) -> Out:
        """Take one event in; gives what is to be done, in order."""
        out: Out = []
        self._handlers[type(event)](event, now_ns, out)
        if self.movement.loose:
            self.movement.prune()
        return out

    # ---- queries, without side effect

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """Ids of the longest prefix of which every block is readable in some tier."""
        ids = self.index.match(keys)
        return ids[: sum(self._counts(ids).values())]

    def match_counts(self, keys: Sequence[BlockKey]) -> dict[TierId, int]:
        """As `match`: how many of those blocks are read from each tier."""
        return self._counts(self.index.match(keys))

    def _counts(self, ids: list[int]) -> dict[TierId, int]:
        counts = dict.fromkeys(self.tables, 0)
        if TierId.DEVICE not in self.tables and ids:
            ready = self._host.ready
            if min(map(ready.__getitem__, ids)) >= 0:  # the usual case, one look-up a block
                counts[TierId.HOST] = len(ids)
                return counts
        for block in ids:
            tier = self.tier_of(block)
            if tier is None:
                break
            counts[tier] += 1
        return counts

    def tier_of(self, block: int) -> TierId | None:
        """The fastest tier from which a block may be read."""
        return next((t for t in self.tables if self.tables[t].ready[block] >= 0), None)

    def located(self, lease: int) -> list[Located]:
        """Where the leased blocks are, in order, up to the first that did not arrive."""
        record = self.leases[lease]
        if record.ready is not None:
            return record.ready
        found: list[Located] = []
        places: list[int] = []
        current: TierId | None = None
        start = 0
        for number, block in enumerate(record.blocks):
            tier = next((t for t in _MEMORY if self._ready(t, block) >= 0), None)
            if tier != current or tier is None:
                if current is not None:
                    found.append(self._locate(current, places, start))
                if tier is None:
                    return found
                current, places, start = tier, [], number
            places.append(self._ready(tier, block))
        if current is not None:
            found.append(self._locate(current, places, start))
        return found

    def _locate(self, tier: TierId, places: list[int], start: int) -> Located:
        spans = self.tables[tier].spans_of(places)
        return Located(tier, [s._replace(index=s.index + start) for s in spans] if start else spans)

    def _ready(self, tier: TierId, block: int) -> int:
        table = self.tables.get(tier)
        return NO_PLACE if table is None else table.ready[block]

    # ---- putting

    def _put(self, event: ev.Put, now_ns: int, out: Out) -> None:
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        ids = self.index.insert(keys)
        for table in self.tables.values():
            table.grow(self.index.ids_end)
        blocks = ids[event.first :]
        placed = self._fill(TierId.HOST, blocks, event.namespace, now_ns, out)
        if TierId.DEVICE in self.tables:
            self._fill(TierId.DEVICE, blocks, event.namespace, now_ns, out)
        if placed is not None:
            self.movement.cancel_prefetches(out)
            out.append(ev.Short(placed, list(self.movement.flights)))
        if placed is not None or not blocks:
            self.movement.loose.extend(ids)  # what was not placed is known for nothing

    def _fill(
        self, tier: TierId, blocks: Sequence[int], namespace: str, now_ns: int, out: Out
    ) -> int | None:
        """Place what the tier lacks; gives the index of the first block left out, if any."""
        table = self.tables[tier]
        places = list(map(table.place.__getitem__, blocks))
        if not places or max(places) < 0:
            indices = list(range(len(blocks)))
        elif min(places) >= 0:
            return None
        else:
            indices = [number for number, at in enumerate(places) if at < 0]
        if not indices:
            return None
        spans = self.movement.room(tier, len(indices), namespace, now_ns, out)
        taken = sum([span.count for span in spans])
        if taken:
            if taken == len(blocks):
                filled = blocks
            else:
                filled = [blocks[number] for number in indices[:taken]]
            table.fill(filled, spans)
            ticket = self._number()
            self.tickets[ticket] = Ticket(tier, filled, [span.page for span in spans])
            out.append(ev.Fill(ticket, tier, indices[:taken], spans))
        return indices[taken] if taken < len(indices) else None

    def _filled(self, event: ev.Filled, now_ns: int, out: Out) -> None:
        ticket = self.tickets.pop(event.ticket)
        tier, movement = ticket.tier, self.movement
        table = self.tables[tier]
        if not event.ok:
            movement.drop(tier, ticket.blocks)
            for page in ticket.pages:
                movement.unpin(tier, page)
            return
        table.publish(ticket.blocks)
        policy, pins = movement.policies[tier], table.pins
        for page in reversed(ticket.pages):
            policy.track(page, now_ns)
            pins[page] -= 1  # it holds blocks, so it is not freed by this
        if tier is TierId.HOST:
            if TierId.COLD in self.tables:
                movement.dirty.update(ticket.pages)
                full = [p for p in dict.fromkeys(ticket.pages) if not table.pool.is_open(p)]
                movement.write_back(full, ev.Urgency.DEMOTE, now_ns, out)
            if self._has_ttl:
                self._start_ttl(ticket, now_ns)

    def _start_ttl(self, ticket: Ticket, now_ns: int) -> None:
        namespace = self._host.pool.owner.get(ticket.pages[0], "")
        spec = self._namespaces.get(namespace)
        if spec is not None and spec.ttl_ns is not None:
            keys = [self.index.key(block) for block in ticket.blocks]
            self._set_deadline(keys, now_ns + spec.ttl_ns, namespace)

    # ---- reading

    def _acquire(self, event: ev.Acquire, now_ns: int, out: Out) -> None:
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        blocks = self.index.match(keys)
        if TierId.DEVICE not in self.tables and len(blocks) == len(keys):
            places = list(map(self._host.ready.__getitem__, blocks))
            if places and min(places) >= 0:
                self._grant_host(blocks, places, event.namespace, now_ns, out)
                return
        self._grant_mixed(blocks, event.namespace, now_ns, out)

    def _grant_host(
        self, blocks: list[int], places: list[int], namespace: str, now_ns: int, out: Out
    ) -> None:
        """The whole wish is in host memory: pin its pages, and there is nothing to wait for."""
        spans = self._host.spans_of(places)
        pins = self._host.pins
        for span in spans:
            pins[span.page] += 1
        record = LeaseRecord(blocks, [(TierId.HOST, span.page) for span in spans], namespace)
        record.ready = [Located(TierId.HOST, spans)]
        self._hits(TierId.HOST, len(blocks))
        self._settle(record, [], len(blocks), now_ns, out)

    def _hits(self, tier: TierId, blocks: int) -> None:
        amount = blocks * self.spec.block_tokens
        self.stats.add("tierkv_hit_tokens_total", amount, tier.label)

    def _grant_mixed(self, blocks: list[int], namespace: str, now_ns: int, out: Out) -> None:
        record = LeaseRecord([], [], namespace)
        tables, host, movement = self.tables, self._host, self.movement
        size = host.page_blocks
        wanted: dict[int, None] = {}
        waits: dict[int, None] = {}
        sources: list[TierId] = []
        for block in blocks:
            tier = self.tier_of(block)
            if tier is not None and tier in _MEMORY:
                page = tables[tier].ready[block] // tables[tier].page_blocks
                tables[tier].pin(page)
                record.pins.append((tier, page))
            elif host.place[block] >= 0:
                flight = self._arrival(host.place[block] // size)
                if flight is None:
                    break  # a put is still writing it: not a hit
                tier = TierId.COLD
                waits[flight] = None
                host.pin(host.place[block] // size)
                record.pins.append((TierId.HOST, host.place[block] // size))
            elif tier is TierId.COLD:
                wanted[tables[tier].ready[block] // size] = None
            else:
                break
            record.blocks.append(block)
            sources.append(tier)
        started: list[int] = []
        if wanted:
            number, started = movement.promote(wanted, ev.Urgency.DEMAND, now_ns, out)
            if number is not None:
                waits[number] = None
        if len(started) < len(wanted):
            movement.cancel_prefetches(out)
        count = 0
        for block in record.blocks:
            if self.tier_of(block) is TierId.COLD and host.place[block] == NO_PLACE:
                break  # no room for its page: the lease ends here
            if sources[count] is TierId.COLD and tables[TierId.COLD].place[block] // size in wanted:
                host.pin(host.place[block] // size)
                record.pins.append((TierId.HOST, host.place[block] // size))
            count += 1
        del record.blocks[count:]
        for tier, blocks_of in Counter(sources[:count]).items():
            self._hits(tier, blocks_of)
        for number in waits:
            if movement.flights[number].urgency is not ev.Urgency.DEMAND:
                movement.flights[number].urgency = ev.Urgency.DEMAND
                out.append(ev.Raise(number, ev.Urgency.DEMAND))
        self._settle(record, list(waits), count, now_ns, out)

    def _arrival(self, page: int) -> int | None:
        """The transfer that brings this host page, if one does."""
        for number, flight in self.movement.flights.items():
            if flight.transfer.target is TierId.HOST and any(
                move.target == page for move in flight.transfer.moves
            ):
                return number
        return None

    def _settle(
        self, record: LeaseRecord, waits: list[int], count: int, now_ns: int, out: Out
    ) -> None:
        lease = self._number()
        self.leases[lease] = record
        self._touch_blocks(record.blocks, now_ns)
        prefetched = self.movement.prefetched
        if prefetched:
            for tier, page in record.pins:
                if tier is TierId.HOST and page in prefetched:
                    self.movement.use_prefetch(page, late=bool(waits))
        out.append(ev.Grant(lease, count, waits))

    def _admit(self, event: ev.Admit, now_ns: int, out: Out) -> None:
        if TierId.DEVICE in self.tables:
            record = self.leases[event.lease]
            self._fill(TierId.DEVICE, record.blocks, record.namespace, now_ns, out)

    def _release(self, event: ev.Release, now_ns: int, out: Out) -> None:
        for tier, page in self.leases.pop(event.lease).pins:
            table = self.tables[tier]
            if table.pins[page] > 1 or table.pool.used[page]:
                table.pins[page] -= 1
            else:
                self.movement.unpin(tier, page)

    def _touch(self, event: ev.Touch, now_ns: int, out: Out) -> None:
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        self._touch_blocks(self.index.match(keys), now_ns)

    def _touch_blocks(self, blocks: Sequence[int], now_ns: int) -> None:
        """Use a chain in every tier, last page first: see `EvictionPolicy.touch`."""
        for tier, table in self.tables.items():
            size, place = table.page_blocks, table.place
            pages = dict.fromkeys([place[b] // size for b in reversed(blocks)])
            self.movement.policies[tier].touch(pages, now_ns)

    # ---- transfers

    def _transfer_done(self, event: ev.TransferDone, now_ns: int, out: Out) -> None:
        self.movement.finish(event.transfer, event.ok, now_ns, cancelled=event.cancelled)

    def _flush(self, event: ev.Flush, now_ns: int, out: Out) -> None:
        if TierId.COLD in self.tables:
            pages = sorted(self.movement.dirty)
            self.movement.write_back(pages, ev.Urgency.DEMOTE, now_ns, out)

    def _distrust(self, event: ev.Distrust, now_ns: int, out: Out) -> None:
        cold = self.tables[TierId.COLD]
        for page in event.pages:
            self.movement.drop(TierId.COLD, [b for b in cold.blocks_in(page) if cold.ready[b] >= 0])

    def _recovered(self, event: ev.Recovered, now_ns: int, out: Out) -> None:
        """Take over what the cold tier found; newest copy of a key wins, orphans are let go."""
        cold = self.tables[TierId.COLD]
        chosen: dict[bytes, tuple[int, int, bytes, str]] = {}
        for page in sorted(event.pages, key=lambda p: -p.generation):
            for label in page.label.blocks:
                found = (page.page, label.position, label.parent, page.label.namespace)
                chosen.setdefault(label.key, found)
        per_page: dict[int, tuple[str, list[int], list[int]]] = {}
        for key in self._reachable(chosen):
            number, offset, parent, namespace = chosen[key]
            above = self.index.find(parent)
            ids = self.index.insert([BlockKey(key)], parent=ROOT if above is None else above)
            _, offsets, blocks = per_page.setdefault(number, (namespace, [], []))
            offsets.append(offset)
            blocks.append(ids[0])
        for table in self.tables.values():
            table.grow(self.index.ids_end)
        cold.pool.adopt({page: (ns, offsets) for page, (ns, offsets, _) in per_page.items()})
        order = {p.page: p.generation for p in event.pages}
        for number in sorted(per_page, key=order.__getitem__):
            _, offsets, blocks = per_page[number]
            cold.fill(blocks, [Span(i, number, o, 1) for i, o in enumerate(offsets)])
            cold.publish(blocks)
            self.movement.policies[TierId.COLD].track(number, now_ns)

    def _reachable(self, chosen: Mapping[bytes, tuple[int, int, bytes, str]]) -> list[bytes]:
        """Keys whose whole history was found, parents before children."""
        roots = {spec.root: spec.name for spec in self.spec.namespaces}
        children: dict[bytes, list[bytes]] = {}
        ready: list[bytes] = []
        for key, (_, _, parent, namespace) in chosen.items():
            if parent in roots:
                if roots[parent] == namespace:
                    ready.append(key)
            else:
                children.setdefault(parent, []).append(key)
        for key in ready:  # grows while it is walked
            ready.extend(children.get(key, ()))
        return ready

    # ---- hints and time

    def _hint(self, event: ev.Hint, now_ns: int, out: Out) -> None:
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        self.stats.add("tierkv_hints_total", 1, event.kind)
        if event.kind is ev.HintKind.EXPECT and event.at_ns > now_ns:
            self._expect.add(event.at_ns, keys, event.namespace)
            return
        if event.kind is ev.HintKind.TTL:
            self._set_deadline(keys, event.at_ns, event.namespace)
            return
        blocks = self.index.match(keys)
        if event.kind is ev.HintKind.PIN:
            self.movement.held.update(blocks)
        elif event.kind is ev.HintKind.UNPIN:
            self.movement.held.difference_update(blocks)
        elif event.kind is ev.HintKind.FORGET:
            self._forget(blocks, out)
        elif event.kind is ev.HintKind.DEMOTE:
            self._demote(blocks, now_ns, out)
        else:
            self._prefetch(blocks, now_ns, out)

    def _prefetch(self, blocks: Sequence[int], now_ns: int, out: Out) -> None:
        cold, host = self.tables.get(TierId.COLD), self._host
        if cold is not None:
            size = cold.page_blocks
            pages = dict.fromkeys(
                cold.ready[b] // size
                for b in blocks
                if cold.ready[b] >= 0 and host.place[b] == NO_PLACE
            )
            number, _ = self.movement.promote(pages, ev.Urgency.PREFETCH, now_ns, out)
            if number is not None:
                flight = self.movement.flights[number]
                for move, arriving in zip(flight.transfer.moves, flight.arriving, strict=True):
                    self.movement.prefetched[move.target] = len(arriving)
        if TierId.DEVICE in self.tables:
            urgency = ev.Urgency.PREFETCH
            self.movement.copy(blocks, TierId.HOST, TierId.DEVICE, urgency, now_ns, out)

    def _demote(self, blocks: Sequence[int], now_ns: int, out: Out) -> None:
        """The prefix pauses: make it the first to go, after a cold copy of it exists."""
        host, size = self._host, self._host.page_blocks
        pages = {host.ready[b] // size for b in blocks if host.ready[b] >= 0}
        self.movement.write_back(
            sorted(pages & self.movement.dirty), ev.Urgency.DEMOTE, now_ns, out
        )
        for tier in _MEMORY:
            table = self.tables.get(tier)
            if table is None:
                continue
            idle = [b for b in blocks if table.ready[b] >= 0]
            idle = [b for b in idle if not table.pins[table.ready[b] // table.page_blocks]]
            below = [t for t in self.tables if t > tier]
            safe = [b for b in idle if any(self.tables[t].ready[b] >= 0 for t in below)]
            self.movement.drop(tier, [b for b in safe if b not in self.movement.held])

    def _forget(self, blocks: Sequence[int], out: Out) -> None:
        """Drop every copy that nobody uses; cold pages left empty are erased."""
        self.movement.held.difference_update(blocks)
        for tier in list(self.tables):
            table = self.tables[tier]
            idle = [b for b in blocks if table.ready[b] >= 0]
            idle = [b for b in idle if not table.pins[table.ready[b] // table.page_blocks]]
            pages = {table.ready[b] // table.page_blocks for b in idle}
            self.movement.drop(tier, idle)
            if tier is TierId.COLD:
                empty = sorted(page for page in pages if page not in table.pool.owner)
                if empty:
                    out.append(ev.Erase(empty))

    def _set_deadline(self, keys: Sequence[BlockKey], at_ns: int, namespace: str) -> None:
        for key in keys:
            self._deadline[key] = at_ns
        self._expire.add(at_ns, keys, namespace)

    def _tick(self, event: ev.Tick, now_ns: int, out: Out) -> None:
        for keys, _ in self._expire.due(now_ns):
            due = [key for key in keys if self._deadline.get(key, now_ns + 1) <= now_ns]
            found = [(key, self.index.find(key)) for key in due]
            for key in due:
                del self._deadline[key]
            self._forget([block for _, block in found if block is not None], out)
            left = [key for key, _ in found if self.tier_of_key(key) is not None]
            if left:  # somebody reads them now: ask again a second later
                self._set_deadline(left, now_ns + 1_000_000_000, "")
        for keys, _ in self._expect.due(now_ns):
            self._prefetch(self.index.match(keys), now_ns, out)

    def tier_of_key(self, key: bytes) -> TierId | None:
        """The fastest tier from which a key may be read."""
        block = self.index.find(key)
        return None if block is None else self.tier_of(block)

    def check(self) -> None:
        """Assert every invariant; O(everything), for tests and `tierkv check`."""
        self.index.check()
        for table in self.tables.values():
            table.check()
        for block in range(self.index.ids_end):
            resident = any(table.place[block] >= 0 for table in self.tables.values())
            if resident:
                assert self.index.is_known(block), f"block {block} is resident but not known"
            elif self.index.is_known(block):
                assert not self.index.is_leaf(block), f"block {block} is known for nothing"

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number
