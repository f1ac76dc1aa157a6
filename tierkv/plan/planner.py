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

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tierkv.core.keys import BlockKey
from tierkv.core.stats import Stats
from tierkv.core.tier import TierId
from tierkv.core.transfer import Urgency
from tierkv.plan import events as ev
from tierkv.plan.hints import Hints
from tierkv.plan.leases import LeaseRecord, Located, located
from tierkv.plan.movement import Movement
from tierkv.plan.radix import RadixIndex
from tierkv.plan.recovery import take_over
from tierkv.plan.residency import NO_PLACE
from tierkv.plan.room import Out
from tierkv.plan.spec import PlanSpec
from tierkv.plan.watch import Watch


@dataclass(slots=True)
class Ticket:
    """A fill under way."""

    tier: TierId
    blocks: Sequence[int]
    pages: list[int]


@dataclass(slots=True)
class _Wish:
    """What it takes to grant a lease: transfers to wait for, cold pages to read, sources."""

    record: LeaseRecord
    sources: list[TierId] = field(default_factory=list)
    cold_pages: dict[int, None] = field(default_factory=dict)
    waits: dict[int, None] = field(default_factory=dict)


class Planner:
    """See the module. `stats` holds the counters of what was decided."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        self.stats = Stats()
        self.index = RadixIndex()
        self.movement = Movement(spec, self.index, self.stats)
        self.tables = self.movement.tables
        self.watch = Watch(self.index, self.tables)
        self.tickets: dict[int, Ticket] = {}
        self.leases: dict[int, LeaseRecord] = {}
        self._host = self.tables[TierId.HOST]
        self._next_number = 0
        self.hints = Hints(spec, self.index, self.movement, self.stats)
        handlers: Mapping[type, Callable[..., None]] = {
            ev.Put: self._put,
            ev.Filled: self._filled,
            ev.Acquire: self._acquire,
            ev.Release: self._release,
            ev.Admit: self._admit,
            ev.Touch: self._touch,
            ev.TransferDone: self._transfer_done,
            ev.Hint: self.hints.take,
            ev.Clear: self.hints.clear,
            ev.Flush: self._flush,
            ev.Recovered: self._recovered,
            ev.Syncing: self._syncing,
            ev.Synced: self._synced,
            ev.Distrust: self._distrust,
            ev.Erased: self.hints.erased,
            ev.Tick: self.hints.tick,
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
        tables = list(self.tables.items())
        for block in ids:
            for tier, table in tables:
                if table.ready[block] >= 0:
                    counts[tier] += 1
                    break
            else:
                break
        return counts

    def tier_of(self, block: int) -> TierId | None:
        """The fastest tier from which a block may be read."""
        for tier, table in self.tables.items():
            if table.ready[block] >= 0:
                return tier
        return None

    def located(self, lease: int) -> list[Located]:
        """Where the leased blocks are, in order, up to the first that did not arrive.

        Only what the lease has pinned counts: a copy that came up elsewhere meanwhile may go again.
        And a block that did not arrive may be forgotten by now, its id given to another.
        """
        record = self.leases[lease]
        return located(record, self.index, self.tables) if record.ready is None else record.ready

    # ---- putting

    def _put(self, event: ev.Put, now_ns: int, out: Out) -> None:
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        ids = self.index.insert(keys)
        for table in self.tables.values():
            table.grow(self.index.ids_end)
        blocks = ids[event.first :]
        # Nothing of a chain goes for its own end, unless it goes to a lower tier.
        spare = ids if TierId.COLD not in self.tables else ()
        placed = self._fill(TierId.HOST, blocks, spare, event.namespace, now_ns, out)
        if TierId.DEVICE in self.tables:
            self._fill(TierId.DEVICE, blocks, (), event.namespace, now_ns, out)
        if placed is not None:
            self.movement.cancel_prefetches(out)
            out.append(ev.Short(placed, list(self.movement.flights)))
        if placed is not None or not blocks:
            self.movement.loose.extend(ids)  # what was not placed is known for nothing

    def _fill(
        self,
        tier: TierId,
        blocks: Sequence[int],
        spare: Sequence[int],
        namespace: str,
        now_ns: int,
        out: Out,
    ) -> int | None:
        """Place what the tier lacks; gives the index of the first block left out, if any."""
        table = self.tables[tier]
        places = list(map(table.place.__getitem__, blocks))
        if not places or max(places) < 0:
            indices = list(range(len(blocks)))
            spare = spare[: len(spare) - len(blocks)]  # the others are nowhere yet
        elif min(places) >= 0:
            return None
        else:
            indices = [number for number, at in enumerate(places) if at < 0]
        if not indices:
            return None
        self.movement.expect(tier, map(blocks.__getitem__, indices))
        spans = self.movement.room(tier, len(indices), namespace, now_ns, out, spare=spare)
        taken = sum([span.count for span in spans])
        if taken:
            if taken == len(blocks):
                filled = blocks
            else:
                filled = [blocks[number] for number in indices[:taken]]
            table.fill(filled, spans)
            ticket = self._number()
            self.tickets[ticket] = Ticket(tier, filled, [span.page for span in spans])
            fresh = self.movement.fresh(tier, spans)
            out.append(ev.Fill(ticket, tier, indices[:taken], spans, fresh))
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
        pins = table.pins
        movement.track(tier, reversed(ticket.pages), now_ns)
        for page in ticket.pages:
            pins[page] -= 1  # it holds blocks, so it is not freed by this
        movement.grew(tier, ticket.blocks[-1], len(ticket.blocks), now_ns)
        if tier is TierId.HOST:
            if TierId.COLD in self.tables:
                movement.dirty.update(ticket.pages)
                full = [p for p in dict.fromkeys(ticket.pages) if not table.pool.is_open(p)]
                movement.write_back(full, Urgency.DEMOTE, now_ns, out)
            self.hints.filled(ticket.blocks, table.pool.owner[ticket.pages[0]], now_ns)

    # ---- reading

    def _acquire(self, event: ev.Acquire, now_ns: int, out: Out) -> None:
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        blocks = self.index.match(keys, event.first, event.first + event.count)
        if TierId.DEVICE not in self.tables and len(blocks) == event.count:
            places = list(map(self._host.ready.__getitem__, blocks))
            if places and min(places) >= 0:
                self._grant_host(blocks, places, event.namespace, now_ns, out)
                return
        self._grant_mixed(blocks, keys[event.first :], event.namespace, now_ns, out)

    def _grant_host(
        self, blocks: list[int], places: list[int], namespace: str, now_ns: int, out: Out
    ) -> None:
        """The whole wish is in host memory: pin its pages, and there is nothing to wait for."""
        spans = self._host.spans_of(places)
        pins = self._host.pins
        for span in spans:
            pins[span.page] += 1
        record = LeaseRecord(blocks, (), [(TierId.HOST, span.page) for span in spans], namespace)
        record.ready = [Located(TierId.HOST, spans)]
        self._hits(TierId.HOST, len(blocks))
        self._settle(record, [], len(blocks), now_ns, out)

    def _hits(self, tier: TierId, blocks: int) -> None:
        amount = blocks * self.spec.block_tokens
        self.stats.add("tierkv_hit_tokens_total", amount, tier.label)

    def _grant_mixed(
        self, blocks: list[int], keys: Sequence[BlockKey], namespace: str, now_ns: int, out: Out
    ) -> None:
        """Some of the wish must be brought to memory: start that, and grant what will be there."""
        wish = self._wish(blocks, keys, namespace)
        movement, waits = self.movement, wish.waits
        for number in waits:  # before anything below calls off what nobody waits for
            if movement.flights[number].urgency is not Urgency.DEMAND:
                movement.flights[number].urgency = Urgency.DEMAND
                out.append(ev.Raise(number, Urgency.DEMAND))
        if wish.cold_pages:
            flight, started = movement.promote(wish.cold_pages, Urgency.DEMAND, now_ns, out)
            if flight is not None:
                waits[flight] = None
            if len(started) < len(wish.cold_pages):
                movement.cancel_prefetches(out)
        count = self._pin_arriving(wish)
        if not count and len(wish.sources) > 1 and not movement.flights:
            # What lies behind the first block holds the memory that it needs: ask for less. While
            # a transfer is under way it may make room instead, and the reader asks again.
            for tier, page in wish.record.pins:
                movement.unpin(tier, page)
            self._grant_mixed(blocks[: len(wish.sources) // 2], keys, namespace, now_ns, out)
            return
        for tier, blocks_of in Counter(wish.sources[:count]).items():
            self._hits(tier, blocks_of)
        self._settle(wish.record, list(waits), count, now_ns, out)

    def _wish(self, blocks: list[int], keys: Sequence[BlockKey], namespace: str) -> _Wish:
        """Pin what is in memory or on its way there, and list the cold pages that are not."""
        wish = _Wish(LeaseRecord([], keys, [], namespace))
        host, size = self._host, self._host.page_blocks
        tables, sources = list(self.tables.items()), wish.sources
        pins = wish.record.pins
        for block in blocks:
            at, tier = NO_PLACE, None
            for fastest, table in tables:
                at = table.ready[block]
                if at >= 0:
                    tier = fastest
                    break
            if tier is not None and tier is not TierId.COLD:
                page = at // table.page_blocks
                table.pins[page] += 1
                pins.append((tier, page))
            elif host.place[block] >= 0:
                flight = self._arrival(host.place[block] // size)
                if flight is None:
                    break  # a put is still writing it, or its prefetch was called off: not a hit
                tier = TierId.COLD
                wish.waits[flight] = None
                self._pin(wish.record, TierId.HOST, host.place[block] // size)
            elif tier is TierId.COLD:
                wish.cold_pages[at // size] = None
            else:
                break
            sources.append(tier)
        wish.record.blocks += blocks[: len(sources)]
        return wish

    def _pin_arriving(self, wish: _Wish) -> int:
        """Pin the host pages of promotions; gives how many blocks will be there, and cuts off."""
        host, cold, size = self._host, self.tables.get(TierId.COLD), self._host.page_blocks
        blocks, count = wish.record.blocks, 0
        for block, source in zip(blocks, wish.sources, strict=True):
            if source is TierId.COLD and cold is not None:
                if host.place[block] == NO_PLACE:
                    break  # no room for its page: the lease ends here
                if cold.place[block] // size in wish.cold_pages:
                    self._pin(wish.record, TierId.HOST, host.place[block] // size)
            count += 1
        del blocks[count:]
        return count

    def _pin(self, record: LeaseRecord, tier: TierId, page: int) -> None:
        self.tables[tier].pin(page)
        record.pins.append((tier, page))

    def _arrival(self, page: int) -> int | None:
        """The transfer that brings this host page, if one does and was not called off."""
        size = self._host.page_blocks
        for number, flight in self.movement.flights.items():
            transfer = flight.transfer
            if transfer.target is TierId.HOST and not flight.cancelled:
                places = 1 if transfer.source is TierId.COLD else size  # pages or single blocks
                if any(move.target // places == page for move in transfer.moves):
                    return number
        return None

    def _settle(
        self, record: LeaseRecord, waits: list[int], count: int, now_ns: int, out: Out
    ) -> None:
        lease = self._number()
        self.leases[lease] = record
        self.movement.touch(record.blocks, now_ns)
        prefetches = self.movement.prefetches
        if prefetches:
            for tier, page in record.pins:
                if tier is TierId.HOST:
                    prefetches.used(page, late=bool(waits))
        out.append(ev.Grant(lease, count, waits))

    def _admit(self, event: ev.Admit, now_ns: int, out: Out) -> None:
        if TierId.DEVICE in self.tables:
            record = self.leases[event.lease]
            self._fill(TierId.DEVICE, record.blocks, (), record.namespace, now_ns, out)

    def _release(self, event: ev.Release, now_ns: int, out: Out) -> None:
        for tier, page in self.leases.pop(event.lease).pins:
            table = self.tables[tier]
            if table.pins[page] > 1 or table.pool.used[page]:
                table.pins[page] -= 1
            else:
                self.movement.unpin(tier, page)

    def _touch(self, event: ev.Touch, now_ns: int, out: Out) -> None:
        keys: list[BlockKey] = event.keys  # type: ignore[assignment]
        self.movement.touch(self.index.match(keys), now_ns)

    # ---- transfers

    def _transfer_done(self, event: ev.TransferDone, now_ns: int, out: Out) -> None:
        self.movement.finish(event.transfer, event.outcomes, now_ns)

    def _flush(self, event: ev.Flush, now_ns: int, out: Out) -> None:
        if TierId.COLD in self.tables:
            pages = sorted(self.movement.dirty)
            self.movement.write_back(pages, Urgency.DEMOTE, now_ns, out)
            self.movement.rescue(now_ns, out)

    def _syncing(self, event: ev.Syncing, now_ns: int, out: Out) -> None:
        self.tables[TierId.COLD].sync_begun = event.number

    def _synced(self, event: ev.Synced, now_ns: int, out: Out) -> None:
        self.movement.synced(event.number, out)

    def _distrust(self, event: ev.Distrust, now_ns: int, out: Out) -> None:
        cold = self.tables[TierId.COLD]
        for page in event.pages:
            self.movement.drop(TierId.COLD, [b for b in cold.blocks_in(page) if cold.ready[b] >= 0])

    def _recovered(self, event: ev.Recovered, now_ns: int, out: Out) -> None:
        take_over(event.pages, self.spec, self.index, self.movement, now_ns)
        self.tables[TierId.COLD].pool.withhold(event.withheld)

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
