"""The planner against a model of memory: what a lease locates is what was put there."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tierkv.core.keys import BlockKey, KeyChain
from tierkv.core.tier import TierId
from tierkv.core.transfer import Outcome, Urgency
from tierkv.plan import events as ev
from tierkv.plan.event_log import entry_line, head_line, replay
from tierkv.plan.leases import Located
from tierkv.plan.planner import Planner
from tierkv.plan.spec import NamespaceSpec, PlanSpec, TierPlan

CHAINS = {
    name: KeyChain(b"f" * 32, salt=name.encode(), block_tokens=1) for name in ("default", "b")
}
SECOND = 1_000_000_000


def spec_of(
    host: int = 4, cold: int = 6, device: int = 0, page_blocks: int = 2, quota: int | None = None
) -> PlanSpec:
    tiers = {TierId.HOST: TierPlan(host, page_blocks)}
    if device:
        tiers = {TierId.DEVICE: TierPlan(device, 1), **tiers}
    if cold:
        tiers[TierId.COLD] = TierPlan(cold, page_blocks)
    limits = {} if quota is None else {TierId.HOST: quota}
    spaces = [NamespaceSpec(name, chain.root, limits) for name, chain in CHAINS.items()]
    return PlanSpec(tiers, spaces, block_tokens=1, block_bytes=8)


class World:
    """A planner with a store's worth of pretend memory: place -> the key whose bytes are there."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        self.planner = Planner(spec)
        self.now = 0
        self.bytes: dict[TierId, dict[int, bytes]] = {tier: {} for tier in spec.tiers}
        self.flights: dict[int, ev.Transfer] = {}
        self.cancelled: set[int] = set()
        self.log = [head_line(spec)]

    def handle(self, event: ev.AnyEvent) -> list[ev.AnyInstruction]:
        self.now += 1
        out = self.planner.handle(event, self.now)
        self.log.append(entry_line(self.now, event, out))
        for item in out:
            if isinstance(item, ev.Transfer):
                self.flights[item.id] = item
            elif isinstance(item, ev.Cancel):
                self.cancelled.add(item.transfer)
        for item in out:
            if isinstance(item, ev.Erase):
                self.handle(ev.Erased(item.pages))
        return out

    def put(
        self, tokens: list[int], *, first: int = 0, namespace: str = "default", ok: bool = True
    ) -> int:
        keys = CHAINS[namespace].of_tokens(tokens)
        out = self.handle(ev.Put(list(keys), first, namespace))
        stored = len(keys) - first
        for item in out:
            if isinstance(item, ev.Short):
                stored = item.index
            if isinstance(item, ev.Fill):
                size = self.spec.tiers[item.tier].page_blocks
                for span in item.spans:
                    for n in range(span.count):
                        key = keys[first + item.indices[span.index + n]]
                        self.bytes[item.tier][span.page * size + span.offset + n] = key
        for item in out:
            if isinstance(item, ev.Fill):
                self.handle(ev.Filled(item.ticket, ok))
        return stored

    def land(self, number: int, ok: bool = True) -> None:
        transfer = self.flights.pop(number)
        source, target = self.bytes[transfer.source], self.bytes[transfer.target]
        if number in self.cancelled:
            self.handle(ev.TransferDone(number, [Outcome.SKIPPED] * len(transfer.moves)))
            return
        paged = TierId.COLD in (transfer.source, transfer.target)
        size = self.spec.tiers[TierId.HOST].page_blocks if paged else 1
        for move in transfer.moves:
            for n in range(size):
                target.pop(move.target * size + n, None)
                if move.source * size + n in source:
                    target[move.target * size + n] = source[move.source * size + n]
        outcome = Outcome.ARRIVED if ok else Outcome.FAILED
        self.handle(ev.TransferDone(number, [outcome] * len(transfer.moves)))

    def land_all(self) -> None:
        while self.flights:
            self.land(next(iter(self.flights)))

    def acquire(self, tokens: list[int], namespace: str = "default") -> ev.Grant:
        keys = CHAINS[namespace].of_tokens(tokens)
        out = self.handle(ev.Acquire(list(keys), 0, len(keys), namespace))
        (grant,) = [item for item in out if isinstance(item, ev.Grant)]
        return grant

    def read(self, grant: ev.Grant) -> list[bytes]:
        """The bytes a reader of this lease would see, as keys."""
        return self.read_parts(self.planner.located(grant.lease))

    def read_parts(self, parts: list[Located]) -> list[bytes]:
        """The bytes that lie there now, as keys."""
        seen: list[bytes] = []
        for part in parts:
            size = self.spec.tiers[part.tier].page_blocks
            for span in part.spans:
                assert span.index == len(seen)
                start = span.page * size + span.offset
                seen += [self.bytes[part.tier][start + n] for n in range(span.count)]
        return seen

    def tier_of(self, keys: list[BlockKey]) -> TierId | None:
        """Where the first block of a chain is read from."""
        ids = self.planner.index.match(keys)
        return self.planner.tier_of(ids[0]) if ids else None

    def get(self, tokens: list[int], namespace: str = "default") -> int:
        """Acquire, wait for everything, compare, release; gives the blocks read."""
        grant = self.acquire(tokens, namespace)
        for number in grant.waits:
            if number in self.flights:
                self.land(number)
        seen = self.read(grant)
        assert seen == CHAINS[namespace].of_tokens(tokens)[: len(seen)]
        self.handle(ev.Release(grant.lease))
        return len(seen)


def test_what_is_put_is_read_back_from_host() -> None:
    world = World(spec_of())

    assert world.put([1, 2, 3]) == 3
    assert world.get([1, 2, 3, 4]) == 3


def test_an_unfinished_fill_is_not_a_hit() -> None:
    world = World(spec_of())
    keys = CHAINS["default"].of_tokens([1, 2])
    world.handle(ev.Put(list(keys), 0, "default"))

    assert world.planner.match(keys) == []
    assert world.get([1, 2]) == 0


def test_a_full_page_is_written_back_and_found_after_it_left_the_host() -> None:
    world = World(spec_of(host=2, cold=6))
    world.put([1, 2])
    world.land_all()
    for tokens in ([3, 4], [5, 6], [7, 8]):
        world.put(tokens)
        world.land_all()

    keys = CHAINS["default"].of_tokens([1, 2])
    assert world.tier_of(keys) is TierId.COLD
    assert world.get([1, 2]) == 2
    world.planner.check()


def test_eviction_takes_leaves_before_their_parents() -> None:
    world = World(spec_of(host=4, cold=0))
    world.put([1, 2, 3, 4, 5, 6, 7, 8])
    world.put([9, 10])

    assert len(world.planner.match(CHAINS["default"].of_tokens([1, 2, 3, 4, 5, 6, 7, 8]))) == 6


def test_tails_of_two_prompts_share_a_page() -> None:
    world = World(spec_of(host=2, cold=0, page_blocks=4))
    world.put([1, 2, 3])
    world.put([4, 5, 6])
    world.put([7, 8])

    assert world.planner.match(CHAINS["default"].of_tokens([1, 2, 3]))
    assert world.get([7, 8]) == 2
    assert world.planner.tables[TierId.HOST].pool.free_pages == 0


def test_two_namespaces_never_share_a_page_or_a_hit() -> None:
    world = World(spec_of(host=4, cold=0, page_blocks=4))
    world.put([1], namespace="default")
    world.put([1], namespace="b")

    assert world.planner.tables[TierId.HOST].pool.free_pages == 2
    assert world.get([1], "b") == 1


def test_a_quota_evicts_the_tenants_own_pages() -> None:
    world = World(spec_of(host=4, cold=0, quota=1))
    world.put([1, 2], namespace="b")
    world.put([1, 2])
    world.put([3, 4])

    assert world.get([1, 2]) == 0
    assert world.get([3, 4]) == 2
    assert world.get([1, 2], "b") == 2


def test_a_page_that_is_read_is_not_evicted() -> None:
    world = World(spec_of(host=1, cold=0))
    world.put([1, 2])
    grant = world.acquire([1, 2])

    assert world.put([3, 4]) == 0
    assert world.read(grant) == CHAINS["default"].of_tokens([1, 2])
    world.handle(ev.Release(grant.lease))
    assert world.put([3, 4]) == 2


def test_corrupt_cold_pages_become_misses_and_their_place_is_quarantined() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    grant = world.acquire([1, 2])
    world.land(grant.waits[0], ok=False)

    assert world.read(grant) == []
    world.handle(ev.Release(grant.lease))
    assert world.planner.match(CHAINS["default"].of_tokens([1, 2])) == []
    assert len(world.planner.tables[TierId.COLD].pool.quarantined) == 1
    world.planner.check()


def test_a_demand_joins_a_prefetch_and_raises_it() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    keys = CHAINS["default"].of_tokens([1, 2])
    world.handle(ev.Hint(ev.HintKind.PREFETCH, list(keys)))
    (number,) = world.flights
    out = world.handle(ev.Acquire(list(keys), 0, 2, "default"))

    assert ev.Raise(number, Urgency.DEMAND) in out
    assert world.planner.stats.get("tierkv_prefetch_bytes_total", "late") == 16


def test_the_block_in_the_first_place_of_the_disk_is_prefetched_too() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    (key, _) = CHAINS["default"].of_tokens([1, 2])
    assert world.planner.tables[TierId.COLD].ready[world.planner.match([key])[0]] == 0
    world.handle(ev.Hint(ev.HintKind.PREFETCH, [key]))
    (transfer,) = world.flights.values()
    assert [move.source for move in transfer.moves] == [0]


def test_a_prompt_gets_room_that_its_own_later_blocks_hold() -> None:
    world = World(spec_of(host=1, cold=6))
    world.put([1])
    world.put([8])
    world.land_all()
    world.put([1, 2], first=1)
    world.put([9])
    world.land_all()

    assert world.tier_of(CHAINS["default"].of_tokens([1])) is TierId.COLD
    assert world.get([1, 2]) == 1
    world.planner.check()


def test_pins_that_fill_the_host_do_not_starve_a_read() -> None:
    world = World(spec_of(host=1, cold=6))
    world.put([1, 2])
    world.land_all()
    world.put([3, 4])
    world.land_all()
    world.handle(ev.Hint(ev.HintKind.PIN, list(CHAINS["default"].of_tokens([3, 4]))))

    assert world.put([5, 6]) == 0, "a put does not push out what is pinned"
    assert world.get([1, 2]) == 2
    assert world.get([3, 4]) == 2, "what was pushed out has its cold copy"
    world.planner.check()


def test_a_block_on_its_way_from_device_to_host_is_waited_for() -> None:
    world = World(spec_of(host=2, cold=0, device=5))
    for token in range(1, 7):
        world.put([token])
    (transfer,) = world.flights.values()
    assert transfer.source is TierId.DEVICE
    grants = [world.acquire([token]) for token in range(1, 7)]

    assert transfer.id in [number for grant in grants for number in grant.waits]
    world.land_all()
    assert all(len(world.read(grant)) == grant.count for grant in grants)


def test_a_prefetch_that_was_called_off_is_no_hit_and_not_called_off_again() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    keys = list(CHAINS["default"].of_tokens([1, 2]))
    world.handle(ev.Hint(ev.HintKind.PREFETCH, keys))
    held = world.acquire([5, 6])
    for _ in range(2):
        world.put([7, 8, 9, 10, 11, 12])

    assert len(world.cancelled) == 1
    assert world.acquire([1, 2]).count == 0, "it will not arrive"
    world.land_all()
    world.handle(ev.Release(held.lease))
    assert world.get([1, 2]) == 2
    world.planner.check()


def test_a_partly_filled_page_is_rewritten_whole_and_its_old_copy_freed() -> None:
    world = World(spec_of(host=2, cold=4, page_blocks=4))
    world.put([1, 2])
    world.handle(ev.Flush())
    world.land_all()
    world.put([1, 2, 3, 4, 5, 6], first=2)  # the rest of a page, then holes of the first
    world.put([9, 9, 9, 9], namespace="default")
    world.handle(ev.Flush())
    world.land_all()

    world.handle(ev.Syncing(1))
    world.handle(ev.Synced(1))
    cold = world.planner.tables[TierId.COLD]
    owned = [page for page in range(4) if page in cold.pool.owner]
    assert all(cold.blocks_in(page) for page in owned)
    world.planner.check()


def test_an_older_copy_is_kept_until_the_newer_one_is_durable() -> None:
    world = World(spec_of(host=1, cold=3, page_blocks=4))
    world.put([1, 2])
    world.handle(ev.Flush())
    world.land_all()
    world.put([1, 2, 3], first=2)
    world.handle(ev.Flush())
    world.land_all()

    pool = world.planner.tables[TierId.COLD].pool
    assert pool.free_pages == 1  # a crash now may leave only the older page
    world.handle(ev.Syncing(1))
    world.handle(ev.Synced(1))
    assert pool.free_pages == 2
    assert world.get([1, 2, 3]) == 3
    world.planner.check()


def test_recovery_keeps_reachable_blocks_and_the_newest_copy() -> None:
    world = World(spec_of())
    world.put([1, 2, 3])
    world.handle(ev.Flush())
    labels = {
        move.target: move.label for t in world.flights.values() for move in t.moves if move.label
    }
    pages = [ev.RecoveredPage(page, page + 1, label) for page, label in labels.items()]
    again = World(spec_of())
    again.bytes[TierId.COLD] = {
        page * 2 + block.position: block.key for page, x in labels.items() for block in x.blocks
    }
    again.bytes[TierId.COLD] |= {5 * 2 + b.position: b.key for b in pages[0].label.blocks}
    again.handle(ev.Recovered([*pages, ev.RecoveredPage(5, 99, pages[0].label)]))

    assert again.get([1, 2, 3]) == 3
    assert again.planner.tables[TierId.COLD].pool.owner.keys() == {5, pages[1].page}
    orphan = World(spec_of())
    orphan.handle(ev.Recovered(pages[1:]))
    assert orphan.get([1, 2, 3]) == 0
    orphan.planner.check()


def test_a_block_that_came_up_elsewhere_meanwhile_is_not_what_a_lease_holds() -> None:
    """Its copy there is not pinned: it may go while the reader copies."""
    world = World(spec_of(host=3, cold=8, device=2, page_blocks=1))
    world.put([1])
    world.land_all()
    for n in range(2, 8):  # out of both memory tiers
        world.put([n])
        world.land_all()
    grant = world.acquire([1])
    assert grant.count == 1
    assert grant.waits
    world.put([1])  # by another client, to the device

    (number,) = grant.waits
    world.land(number)
    (part,) = world.planner.located(grant.lease)
    assert part.tier is TierId.HOST
    assert world.read_parts([part]) == CHAINS["default"].of_tokens([1])


def test_a_block_that_did_not_arrive_is_not_the_one_that_got_its_id() -> None:
    world = World(spec_of(host=2, cold=8, page_blocks=1))
    for n in range(1, 5):
        world.put([n])
        world.land_all()
    keys = CHAINS["default"].of_tokens([1])
    (block,) = world.planner.index.match(keys)
    grant = world.acquire([1])
    (number,) = grant.waits
    world.land(number, ok=False)
    for n in range(9, 12):  # one takes the id, and the place that is pinned for the lease
        world.put([n])
        world.land_all()
    assert world.planner.index.is_known(block)

    assert world.planner.located(grant.lease) == []
    world.handle(ev.Release(grant.lease))


def test_a_flush_brings_down_what_only_the_device_has() -> None:
    """Host memory dropped it, as the disk refused it and room was wanted."""
    world = World(spec_of(host=1, cold=4, device=4, page_blocks=1))
    world.put([1])
    world.land(next(iter(world.flights)), ok=False)  # its write-back
    world.put([2])  # takes its place in host memory once another write has failed
    world.land(next(iter(world.flights)), ok=False)
    world.put([2])
    while world.flights:
        world.land(next(iter(world.flights)), ok=False)
    (block,) = world.planner.index.match(CHAINS["default"].of_tokens([1]))
    movement = world.planner.movement
    assert movement.stranded() == [block]
    assert block in movement.unsaved()
    left = movement.moves_to_save({block: movement.index.key(block)})
    assert left == 2

    for _ in range(4):
        world.handle(ev.Flush())
        world.land_all()
    assert movement.stranded() == []
    assert movement.unsaved() == {}


def test_ttl_and_forget_drop_blocks_and_pins_keep_them() -> None:
    world = World(spec_of(host=1, cold=0))
    keys = list(CHAINS["default"].of_tokens([1, 2]))
    world.put([1, 2])
    world.handle(ev.Hint(ev.HintKind.PIN, keys))
    assert world.put([3, 4]) == 0
    world.handle(ev.Hint(ev.HintKind.UNPIN, keys))
    world.handle(ev.Hint(ev.HintKind.TTL, keys, at_ns=SECOND))
    world.handle(ev.Tick())
    assert world.get([1, 2]) == 2
    world.now = SECOND
    world.handle(ev.Tick())
    assert world.get([1, 2]) == 0
    world.put([3, 4])
    world.handle(ev.Hint(ev.HintKind.FORGET, list(CHAINS["default"].of_tokens([3, 4]))))
    assert world.get([3, 4]) == 0
    world.planner.check()


def test_an_expected_return_is_prefetched_in_time() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    keys = list(CHAINS["default"].of_tokens([1, 2]))
    world.handle(ev.Hint(ev.HintKind.EXPECT, keys, at_ns=SECOND))
    world.handle(ev.Tick())
    assert not world.flights
    world.now = SECOND
    world.handle(ev.Tick())
    world.land_all()

    assert world.tier_of(keys) is TierId.HOST
    assert world.get([1, 2]) == 2
    assert world.planner.stats.get("tierkv_prefetch_bytes_total", "timely") == 16


@pytest.mark.parametrize("device", [0, 3])
def test_a_log_replays_to_the_same_instructions(device: int) -> None:
    world = World(spec_of(host=2, cold=4, device=device))
    for n in range(30):
        world.put([n % 5, n % 3, n % 2, n % 7])
        if n % 3 == 0:
            world.land_all()
        world.get([n % 5, n % 3])

    result = replay(world.log)
    assert result.different == []
    assert result.events == len(world.log) - 1
    line = world.log[1].replace(b"[1,", b"[999999999,", 1)
    assert replay([*world.log[:1], line, *world.log[2:]]).events == result.events


class PlannerMachine(RuleBasedStateMachine):
    """Random puts, reads, hints and landings, with every invariant after every step."""

    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=7)
    spaces = st.sampled_from(["default", "b"])

    @initialize(
        host=st.integers(1, 4),
        cold=st.sampled_from([0, 1, 3, 8]),
        device=st.sampled_from([0, 0, 2, 5]),
        page_blocks=st.integers(1, 4),
        quota=st.sampled_from([None, None, 1, 2]),
    )
    def begin(self, host: int, cold: int, device: int, page_blocks: int, quota: int | None) -> None:
        self.world = World(spec_of(host, cold, device, page_blocks, quota))
        self.grants: list[tuple[ev.Grant, list[int], str]] = []
        self.parts: dict[int, list[Located]] = {}  # what a reader was told, by lease

    @rule(tokens=tokens, namespace=spaces, first=st.integers(0, 3), ok=st.sampled_from([1, 1, 0]))
    def put(self, tokens: list[int], namespace: str, first: int, ok: int) -> None:
        self.world.put(tokens, first=min(first, len(tokens)), namespace=namespace, ok=bool(ok))

    @rule(tokens=tokens, namespace=spaces)
    def acquire(self, tokens: list[int], namespace: str) -> None:
        self.grants.append((self.world.acquire(tokens, namespace), tokens, namespace))

    @rule(admit=st.booleans(), number=st.integers(0, 9))
    def release(self, admit: bool, number: int) -> None:
        if not self.grants:
            return
        grant, tokens, namespace = self.grants.pop(number % len(self.grants))
        world, keys = self.world, CHAINS[namespace].of_tokens(tokens)
        if admit and all(number not in world.flights for number in grant.waits):
            for item in world.handle(ev.Admit(grant.lease)):
                if isinstance(item, ev.Fill):
                    for span, index in zip(item.spans, item.indices, strict=True):
                        world.bytes[item.tier][span.page] = keys[index]
                    world.handle(ev.Filled(item.ticket, True))
        world.handle(ev.Release(grant.lease))

    @rule(number=st.integers(0, 9), ok=st.sampled_from([True, True, True, False]))
    def land(self, number: int, ok: bool) -> None:
        flights = sorted(self.world.flights)
        if flights:
            self.world.land(flights[number % len(flights)], ok)

    @rule(tokens=tokens, namespace=spaces, kind=st.sampled_from(list(ev.HintKind)))
    def hint(self, tokens: list[int], namespace: str, kind: ev.HintKind) -> None:
        keys = list(CHAINS[namespace].of_tokens(tokens))
        self.world.handle(ev.Hint(kind, keys, namespace, at_ns=self.world.now + 5))

    @rule(event=st.sampled_from([ev.Flush(), ev.Tick()]))
    def other(self, event: ev.AnyEvent) -> None:
        self.world.handle(event)

    @rule(done=st.booleans())
    def sync(self, done: bool) -> None:
        if TierId.COLD in self.world.spec.tiers:
            self.syncs = getattr(self, "syncs", 0) + 1
            self.world.handle(ev.Syncing(self.syncs))
            if done:
                self.world.handle(ev.Synced(self.syncs))

    @rule(page=st.integers(0, 7))
    def distrust(self, page: int) -> None:
        plan = self.world.spec.tiers.get(TierId.COLD)
        if plan is not None and page < plan.pages:
            self.world.handle(ev.Distrust([page]))

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.planner.check()
        for grant, tokens, namespace in self.grants:
            seen = self.world.read(grant)
            keys = CHAINS[namespace].of_tokens(tokens)
            assert seen == keys[: len(seen)]
            if all(number not in self.world.flights for number in grant.waits):
                assert len(seen) <= grant.count
                told = self.parts.setdefault(grant.lease, self.world.planner.located(grant.lease))
                held = self.world.read_parts(told)
                assert held == keys[: len(held)], "what a reader was told is not there any more"

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for grant, _, _ in self.grants:
            self.world.handle(ev.Release(grant.lease))
        self.world.land_all()
        self.world.planner.check()
        for table in self.world.planner.tables.values():
            assert not any(table.pins), "a pin leaked"
        assert replay(self.world.log).different == []


TestPlannerMachine = PlannerMachine.TestCase
TestPlannerMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
