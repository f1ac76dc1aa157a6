"""Movement: moving pages between tiers, as decisions; making room for them is in `room`.

Three moves exist. **Write-back** copies a host page to a fresh cold page (`drop` also empties the
host page once it is safe). **Promotion** reads a cold page into a whole host page. **Copying**
moves single blocks between device and host. Each pins both ends, so neither is evicted or reused
under it; each ends with `finish`, which publishes what arrived and forgets what did not.

A page that was written back partly filled and then filled further is written again as a whole;
its earlier cold page is kept until a sync has made the new one durable.

A host page is *dirty* while it has a block that the cold tier lacks. Pages are written back when
they are full, on `Flush`, and when they must go. Single owner (the planner).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from tierkv.core.keys import BlockKey
from tierkv.core.stats import Stats
from tierkv.core.tier import BlockLabel, PageLabel, Span, TierId
from tierkv.core.transfer import Move, Outcome, Transfer, Urgency
from tierkv.plan.events import Cancel, Erase
from tierkv.plan.radix import ROOT, RadixIndex
from tierkv.plan.residency import NO_PLACE, TierTable
from tierkv.plan.room import Out, Room
from tierkv.plan.spec import PlanSpec


@dataclass(slots=True)
class Flight:
    """A transfer under way: per move, the blocks that appear at the target when it lands."""

    transfer: Transfer
    urgency: Urgency
    drop: bool
    arriving: list[list[int]]
    relocating: list[list[int]] = field(default_factory=list)
    cancelled: bool = False


class Movement(Room):
    """The flights under way and the moves that start and end them."""

    def __init__(self, spec: PlanSpec, index: RadixIndex, stats: Stats) -> None:
        super().__init__(spec, index, stats)
        self.flights: dict[int, Flight] = {}
        self._roots = {n.name: n.root for n in spec.namespaces}
        self._next_transfer = 0

    def _save(self, tier: TierId, page: int, now_ns: int, out: Out) -> bool:
        """Copy a page down before it goes, if it holds the only copy of something."""
        blocks = self.tables[tier].blocks_in(page)
        below = [table.ready for t, table in self.tables.items() if t > tier]
        if not below or all(max([ready[b] for ready in below]) >= 0 for b in blocks):
            return False
        if tier is TierId.HOST:
            return self.write_back([page], Urgency.DEMOTE, now_ns, out, drop=True)
        return self.copy(blocks, tier, TierId.HOST, Urgency.DEMOTE, now_ns, out, drop=True)

    def write_back(
        self, pages: Iterable[int], urgency: Urgency, now_ns: int, out: Out, *, drop: bool = False
    ) -> bool:
        """Start copying host pages to cold pages; False if none could be started."""
        host, cold = self.tables[TierId.HOST], self.tables.get(TierId.COLD)
        if cold is None:
            return False
        moves: list[Move] = []
        arriving: list[list[int]] = []
        relocating: list[list[int]] = []
        for page in pages:
            blocks = host.blocks_in(page)
            if host.pool.is_sealed(page) or any(host.ready[b] < 0 for b in blocks):
                continue  # somebody writes into it; its `Filled` will ask again
            namespace = host.pool.owner[page]
            host.pool.seal(page)
            host.pin(page)
            self.expect(TierId.COLD, blocks)
            target = next(iter(self.whole_pages(TierId.COLD, 1, namespace, now_ns, out)), None)
            if target is None:
                host.pool.unseal(page)
                self.unpin(TierId.HOST, page)
                break
            fresh = [b for b in blocks if cold.place[b] == NO_PLACE]
            known = [b for b in blocks if cold.ready[b] >= 0]
            size = host.page_blocks
            offsets = {b: host.place[b] % size for b in fresh + known}
            cold.fill(fresh, _single_spans(target, [offsets[b] for b in fresh]))
            taken = set(offsets.values())
            unused = tuple(o for o in range(size) if o not in taken)
            cold.pool.give(target, unused)
            if drop:
                host.drain(blocks)
            moves.append(Move(page, target, self._label(namespace, offsets), unused))
            arriving.append(fresh)
            relocating.append(known)
            self.dirty.discard(page)
        if moves:
            self._start(TierId.HOST, TierId.COLD, moves, urgency, out, arriving, relocating, drop)
        return bool(moves)

    def promote(
        self, pages: Iterable[int], urgency: Urgency, now_ns: int, out: Out
    ) -> tuple[int | None, list[int]]:
        """Start reading cold pages into host pages; gives the transfer and the pages started."""
        host, cold = self.tables[TierId.HOST], self.tables[TierId.COLD]
        wanted, size = list(pages), cold.page_blocks
        for page in wanted:
            cold.pin(page)  # all of them, before making room below may evict one
        if self.policies[TierId.HOST].wants_names:
            self.expect(TierId.HOST, self._missing(wanted))
        moves: list[Move] = []
        arriving: list[list[int]] = []
        filled: list[int] = []
        spans: list[Span] = []
        for page, target in self._targets(wanted, urgency, now_ns, out):
            host.pool.seal(target)
            blocks = self._missing([page])
            if len(blocks) == size:
                spans.append(Span(len(filled), target, 0, size))
            else:
                offsets = [cold.place[b] % size for b in blocks]
                spans += _single_spans(target, offsets, len(filled))
                taken = set(offsets)
                host.pool.give(target, [o for o in range(size) if o not in taken])
            filled += blocks
            moves.append(Move(page, target))
            arriving.append(blocks)
        host.fill(filled, spans)
        for page in wanted[len(moves) :]:
            self.unpin(TierId.COLD, page)
        if not moves:
            return None, []
        started = self._start(TierId.COLD, TierId.HOST, moves, urgency, out, arriving)
        return started, wanted[: len(moves)]

    def _missing(self, pages: Iterable[int]) -> list[int]:
        """The blocks of these cold pages that host memory lacks."""
        place, ready = self.tables[TierId.HOST].place, self.tables[TierId.COLD].ready
        blocks = [b for page in pages for b in self.tables[TierId.COLD].blocks_in(page)]
        return [b for b in blocks if ready[b] >= 0 and place[b] == NO_PLACE]

    def _targets(
        self, pages: list[int], urgency: Urgency, now_ns: int, out: Out
    ) -> Iterator[tuple[int, int]]:
        """Pairs cold pages with host pages taken for them, until there is no more room."""
        owner, must = self.tables[TierId.COLD].pool.owner, urgency is Urgency.DEMAND
        for namespace, run in groupby(pages, owner.__getitem__):
            group = list(run)
            taken = self.whole_pages(TierId.HOST, len(group), namespace, now_ns, out, must=must)
            # Only a read, and only if no transfer is going to make room, overrides a hint.
            if not taken and must and self.held and not self.flights:
                taken = self.whole_pages(
                    TierId.HOST, 1, namespace, now_ns, out, must=True, over_hints=True
                )
            yield from zip(group, taken, strict=False)
            if len(taken) < len(group):
                return

    def copy(
        self,
        blocks: Sequence[int],
        source: TierId,
        target: TierId,
        urgency: Urgency,
        now_ns: int,
        out: Out,
        *,
        drop: bool = False,
    ) -> bool:
        """Start copying single blocks between device and host; False if there was no room."""
        above, below = self.tables[source], self.tables[target]
        todo = [b for b in blocks if above.ready[b] >= 0 and below.place[b] == NO_PLACE]
        if not todo:
            return False
        namespace = above.pool.owner[above.place[todo[0]] // above.page_blocks]
        for block in todo:
            above.pin(above.place[block] // above.page_blocks)
        self.expect(target, todo)
        spans = self.room(target, len(todo), namespace, now_ns, out)
        for span in spans:
            for _ in range(span.count - 1):  # `room` pinned once a span; moves pin once a block
                below.pin(span.page)
        started = todo[: sum(span.count for span in spans)]
        for block in todo[len(started) :]:
            self.unpin(source, above.place[block] // above.page_blocks)
        if not started:
            return False
        below.fill(started, spans)
        moves = [Move(above.place[b], below.place[b]) for b in started]
        if drop:
            above.drain(started)
        fresh, arriving = self.fresh(target, spans), [[b] for b in started]
        self._start(source, target, moves, urgency, out, arriving, drop=drop, fresh=fresh)
        return True

    def finish(self, transfer: int, outcomes: Sequence[Outcome], now_ns: int) -> None:
        """A transfer ended: publish what arrived, forget what did not, let both ends go."""
        flight = self.flights.pop(transfer)
        source, target = flight.transfer.source, flight.transfer.target
        finish = self._finish_pages if TierId.COLD in (source, target) else self._finish_block
        for number in reversed(range(len(outcomes))):  # last first: see `EvictionPolicy.touch`
            finish(flight, number, outcomes[number], now_ns)
        for blocks, how in zip(flight.arriving, outcomes, strict=True):
            if blocks and how is Outcome.ARRIVED and self.index.is_known(blocks[-1]):
                self.grew(target, blocks[-1], len(blocks), now_ns)

    def _finish_pages(self, flight: Flight, number: int, outcome: Outcome, now_ns: int) -> None:
        move, transfer = flight.transfer.moves[number], flight.transfer
        source, target = self.tables[transfer.source], self.tables[transfer.target]
        blocks = flight.arriving[number]
        relocating = flight.relocating[number] if flight.relocating else []
        if outcome is Outcome.ARRIVED:
            target.publish(blocks)
            self._relocate(relocating, move, target)
            self.track(transfer.target, (move.target,), now_ns)
        else:
            self._count_failure(transfer, outcome)
            offsets = [source.place[b] % source.page_blocks for b in relocating]
            target.pool.give(move.target, offsets)
            self.drop(transfer.target, blocks)
        if transfer.target is TierId.HOST:
            target.pool.unseal(move.target)
        else:
            source.pool.unseal(move.source)
        self.unpin(transfer.target, move.target)
        lost = outcome is Outcome.FAILED and transfer.source is TierId.COLD
        if lost:
            source.pool.quarantine(move.source)
        self.unpin(transfer.source, move.source)
        if lost:
            self.drop(TierId.COLD, source.blocks_in(move.source))
        elif flight.drop:
            self.drop(transfer.source, source.blocks_in(move.source))
        elif outcome is not Outcome.ARRIVED and transfer.source is TierId.HOST:
            self.dirty.add(move.source)

    def synced(self, sync: int, out: Out) -> None:
        """What was written before a sync began is durable: older copies of it may go.

        Pages left empty are erased: an older copy of what is forgotten later would be found again.
        """
        cold = self.tables[TierId.COLD]
        older = list(cold.retired)
        for page in older:
            cold.pin(page)
        cold.settle(sync)  # frees none of them, as they are pinned
        self.erase_empty(older, out)

    def erase_empty(self, pages: Sequence[int], out: Out) -> None:
        """Have pinned cold pages erased that are empty, and unpin the others.

        Those stay pinned, so unused, until they are erased.
        """
        used = self.tables[TierId.COLD].pool.used
        empty = [page for page in pages if not used[page]]
        for page in pages:
            if used[page]:
                self.unpin(TierId.COLD, page)
        if empty:
            out.append(Erase(empty))

    def _relocate(self, blocks: Sequence[int], move: Move, cold: TierTable) -> None:
        """Blocks that were in an older cold page are now in the page that just landed."""
        host = self.tables[TierId.HOST]
        for block in blocks:
            offset = host.place[block] % host.page_blocks
            if cold.place[block] != NO_PLACE:
                cold.retire(block)
            cold.fill([block], [Span(0, move.target, offset, 1)])
            cold.publish([block])

    def _finish_block(self, flight: Flight, number: int, outcome: Outcome, now_ns: int) -> None:
        move, transfer = flight.transfer.moves[number], flight.transfer
        source, target = self.tables[transfer.source], self.tables[transfer.target]
        blocks = flight.arriving[number]
        page, goal = move.source // source.page_blocks, move.target // target.page_blocks
        if outcome is Outcome.ARRIVED:
            target.publish(blocks)
            self.track(transfer.target, (goal,), now_ns)
            if transfer.target is TierId.HOST:
                self.dirty.add(goal)
        else:
            self._count_failure(transfer, outcome)
            self.drop(transfer.target, blocks)
        self.unpin(transfer.target, goal)
        self.unpin(transfer.source, page)
        if flight.drop:
            self.drop(transfer.source, blocks)

    # ---- small parts

    def _count_failure(self, transfer: Transfer, outcome: Outcome) -> None:
        name = "tierkv_transfers_unfinished_total"
        self.stats.add(name, 1, transfer.target.label, outcome.name.lower())

    def cancel_prefetches(self, out: Out) -> None:
        """Room is wanted by somebody who waits: call off what nobody waits for."""
        for number, flight in self.flights.items():
            if flight.urgency is Urgency.PREFETCH and not flight.cancelled:
                flight.cancelled = True
                out.append(Cancel(number))

    def unsaved(self) -> dict[int, BlockKey]:
        """Blocks that were put and that the cold tier lacks, with their keys."""
        host, cold = self.tables[TierId.HOST], self.tables[TierId.COLD]
        blocks = [b for page in self.dirty for b in host.blocks_in(page)]
        blocks = [b for b in blocks if host.ready[b] >= 0 > cold.ready[b]] + self.stranded()
        for number in self.going_down():
            blocks += [b for arriving in self.flights[number].arriving for b in arriving]
        return {b: self.index.key(b) for b in blocks}

    def moves_to_save(self, blocks: Mapping[int, BlockKey]) -> int:
        """How many moves of a block are left until all of `blocks` are in the cold tier."""
        host, cold = self.tables[TierId.HOST].place, self.tables[TierId.COLD].ready
        names = self.index.names
        lacking = [b for b, key in blocks.items() if not (names(b, key) and cold[b] >= 0)]
        return sum(1 if host[b] >= 0 else 2 for b in lacking)

    def stranded(self) -> list[int]:
        """Blocks that only the device has: host memory dropped them, as the disk refused them."""
        device = self.tables.get(TierId.DEVICE)
        if device is None:
            return []
        ready, host, cold = device.ready, self.tables[TierId.HOST], self.tables[TierId.COLD]
        blocks = [b for b in device.block_at if b >= 0 and ready[b] >= 0]
        return [b for b in blocks if host.place[b] < 0 and cold.place[b] < 0]

    def rescue(self, now_ns: int, out: Out) -> None:
        """Start copying what is stranded to host memory, as far as there is room."""
        stranded = self.stranded()
        if stranded:
            device = self.tables[TierId.DEVICE]
            owner_of = [device.pool.owner[device.place[b] // device.page_blocks] for b in stranded]
            for owner in dict.fromkeys(owner_of):
                blocks = [b for b, name in zip(stranded, owner_of, strict=True) if name == owner]
                self.copy(blocks, TierId.DEVICE, TierId.HOST, Urgency.DEMOTE, now_ns, out)

    def going_down(self) -> list[int]:
        """Transfers to a lower tier that have not ended."""
        transfers = ((number, flight.transfer) for number, flight in self.flights.items())
        return [number for number, transfer in transfers if transfer.target > transfer.source]

    def _label(self, namespace: str, offsets: Mapping[int, int]) -> PageLabel:
        index, root = self.index, self._roots[namespace]
        labels = []
        for block in sorted(offsets, key=offsets.__getitem__):
            above = index.parent(block)
            parent = root if above == ROOT else index.key(above)
            labels.append(BlockLabel(offsets[block], index.key(block), parent))
        return PageLabel(namespace, tuple(labels))

    def _start(
        self,
        source: TierId,
        target: TierId,
        moves: list[Move],
        urgency: Urgency,
        out: Out,
        arriving: list[list[int]],
        relocating: list[list[int]] | None = None,
        drop: bool = False,
        fresh: tuple[tuple[int, int], ...] = (),
    ) -> int:
        number = self._next_transfer
        self._next_transfer += 1
        transfer = Transfer(number, source, target, moves, urgency, fresh)
        self.flights[number] = Flight(transfer, urgency, drop, arriving, relocating or [])
        out.append(transfer)
        return number


def _single_spans(page: int, offsets: Sequence[int], first: int = 0) -> list[Span]:
    return [Span(index, page, offset, 1) for index, offset in enumerate(offsets, first)]
