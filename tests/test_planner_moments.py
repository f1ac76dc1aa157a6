"""The planner, one moment at a time: times, hints, quotas, logs, what a log of events holds."""

from __future__ import annotations

import msgspec
import pytest

from tests.test_planner import CHAINS, SECOND, World, spec_of
from tierkv.core.errors import CorruptData
from tierkv.core.tier import BlockLabel, PageLabel, TierId
from tierkv.core.transfer import Outcome, Urgency
from tierkv.plan import events as ev
from tierkv.plan.event_log import replay
from tierkv.plan.spec import NamespaceSpec, PlanSpec


def keys_of(*tokens: int, namespace: str = "default") -> list[bytes]:
    return list(CHAINS[namespace].of_tokens(list(tokens)))


def with_ttl(spec: PlanSpec, **ttl_ns: int) -> PlanSpec:
    spaces = [
        NamespaceSpec(one.name, one.root, one.quota_pages, ttl_ns.get(one.name))
        for one in spec.namespaces
    ]
    return msgspec.structs.replace(spec, namespaces=spaces)


# ---- the log


def test_a_log_that_cannot_be_read_names_its_line() -> None:
    world = World(spec_of())
    world.put([1, 2])
    with pytest.raises(CorruptData, match="line 1: the log is empty"):
        replay([])
    with pytest.raises(CorruptData, match="line 1: "):
        replay([b"{}\n", *world.log[1:]])
    for bad in (b"[1, 2\n", b"\xff\xfe\n", b'[1, {"type": "Nothing"}, 0]\n'):
        with pytest.raises(CorruptData, match="line 3: "):
            replay([*world.log[:2], bad, *world.log[2:]])


def test_a_log_tells_where_instructions_differ() -> None:
    world = World(spec_of())
    world.put([1, 2])
    world.put([3])
    lines = list(world.log)
    now_ns, event, digest = msgspec.json.decode(lines[2])
    lines[2] = msgspec.json.encode((now_ns, event, digest ^ 1))
    result = replay(lines)
    assert result.different == [3]
    assert result.events == len(lines) - 1
    assert result.planner.match(keys_of(1, 2)) == world.planner.match(keys_of(1, 2))


# ---- times


def test_a_namespaces_blocks_live_as_long_as_it_says_and_others_for_ever() -> None:
    world = World(with_ttl(spec_of(cold=0), b=SECOND))
    world.put([1, 2], namespace="b")
    world.put([1, 2])
    world.now = SECOND
    world.handle(ev.Tick())
    assert world.get([1, 2], "b") == 2, "a moment is left"
    world.now = SECOND + 1
    world.handle(ev.Tick())
    assert world.get([1, 2], "b") == 0
    assert world.get([1, 2]) == 2
    world.planner.check()


def test_what_is_put_again_lives_anew() -> None:
    world = World(with_ttl(spec_of(cold=0), default=SECOND))
    world.put([1])
    world.now = SECOND // 2
    world.put([1, 2], first=1)
    world.now = SECOND + 10
    world.handle(ev.Tick())
    assert world.get([1]) == 0
    world.planner.check()


def test_a_block_that_is_read_when_its_time_is_over_goes_a_second_later() -> None:
    world = World(spec_of(host=2, cold=0))
    world.put([1, 2])
    world.handle(ev.Hint(ev.HintKind.TTL, keys_of(1, 2), at_ns=100))
    grant = world.acquire([1, 2])
    world.now = 100
    world.handle(ev.Tick())
    assert world.read(grant) == keys_of(1, 2)
    world.handle(ev.Release(grant.lease))
    over = world.now
    world.now = over + SECOND // 2
    world.handle(ev.Tick())
    assert world.get([1, 2]) == 2, "it is not asked for at every tick"
    world.now = over + SECOND + 1
    world.handle(ev.Tick())
    assert world.get([1, 2]) == 0
    world.planner.check()


def test_a_later_time_to_live_takes_the_place_of_an_earlier_one() -> None:
    world = World(spec_of(cold=0))
    world.put([1])
    world.handle(ev.Hint(ev.HintKind.TTL, keys_of(1), at_ns=100))
    world.handle(ev.Hint(ev.HintKind.TTL, keys_of(1), at_ns=200))
    world.now = 150
    world.handle(ev.Tick())
    assert world.get([1]) == 1
    world.now = 200
    world.handle(ev.Tick())
    assert world.get([1]) == 0
    assert world.planner.movement.deadlines == {}


def test_a_deadline_dies_with_its_block_and_not_with_the_next_that_has_its_id() -> None:
    world = World(spec_of(host=2, cold=0, page_blocks=1))
    world.put([1])
    world.handle(ev.Hint(ev.HintKind.TTL, keys_of(1), at_ns=100))
    world.handle(ev.Hint(ev.HintKind.FORGET, keys_of(1)))
    assert world.planner.movement.deadlines == {}
    world.put([2])
    world.now = 100
    world.handle(ev.Tick())
    assert world.get([2]) == 1


def test_what_is_due_at_one_time_comes_in_the_order_it_was_asked_for() -> None:
    world = World(spec_of(host=4, cold=8))
    for tokens in ([1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14]):
        world.put(tokens)
        world.land_all()
    for first in (3, 1):
        hint = ev.Hint(ev.HintKind.EXPECT, keys_of(first, first + 1), at_ns=SECOND)
        assert world.handle(hint) == []
    world.now = SECOND
    out = [item for item in world.handle(ev.Tick()) if isinstance(item, ev.Transfer)]
    sources = [world.bytes[TierId.COLD][item.moves[0].source * 2] for item in out]
    assert sources == [keys_of(3)[0], keys_of(1)[0]]
    assert [item.urgency for item in out] == [Urgency.PREFETCH] * 2


def test_what_is_expected_at_once_is_fetched_at_once() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    world.handle(ev.Hint(ev.HintKind.EXPECT, keys_of(1, 2), at_ns=world.now + 1))
    (transfer,) = world.flights.values()
    assert (transfer.source, transfer.target) == (TierId.COLD, TierId.HOST)


# ---- hints


def test_a_prefetch_that_nobody_used_is_counted_as_wasted() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    world.handle(ev.Hint(ev.HintKind.PREFETCH, keys_of(1, 2)))
    world.land_all()
    world.handle(ev.Hint(ev.HintKind.PREFETCH, keys_of(1, 2)))
    assert not world.flights, "it is there"
    for tokens in ([7, 8], [9, 10], [11, 12]):
        world.put(tokens)
        world.land_all()
    stats = world.planner.stats
    assert stats.get("tierkv_prefetch_bytes_total", "wasted") == 16
    assert stats.get("tierkv_hints_total", "prefetch") == 2
    assert stats.get("tierkv_prefetch_bytes_total", "timely") == 0


def test_a_prefetch_reaches_the_device_too() -> None:
    world = World(spec_of(host=4, cold=0, device=2))
    for token in range(1, 5):
        world.put([token])
        world.land_all()
    assert world.tier_of(keys_of(1)) is TierId.HOST
    world.handle(ev.Hint(ev.HintKind.PREFETCH, keys_of(1)))
    (transfer,) = world.flights.values()
    assert (transfer.source, transfer.target) == (TierId.HOST, TierId.DEVICE)
    world.land_all()
    assert world.tier_of(keys_of(1)) is TierId.DEVICE
    world.handle(ev.Hint(ev.HintKind.PREFETCH, keys_of(1)))
    assert not world.flights, "it is there"
    assert world.get([1]) == 1
    world.planner.check()


def test_a_prefix_that_pauses_keeps_its_cold_copy_only() -> None:
    world = World(spec_of(host=4, cold=6))
    world.put([1, 2, 3])
    world.land_all()
    world.handle(ev.Hint(ev.HintKind.DEMOTE, keys_of(1, 2, 3)))
    assert world.tier_of(keys_of(1)) is TierId.COLD
    assert len(world.flights) == 1, "the page that was not full is written now"
    world.land_all()
    world.handle(ev.Hint(ev.HintKind.DEMOTE, keys_of(1, 2, 3)))
    assert world.planner.tables[TierId.HOST].pool.free_pages == 4
    assert world.get([1, 2, 3]) == 3
    world.planner.check()


@pytest.mark.parametrize("reason", ["read", "held", "only copy"])
def test_a_pause_drops_nothing_that_is_read_or_held_or_nowhere_else(reason: str) -> None:
    world = World(spec_of(host=4, cold=0 if reason == "only copy" else 6))
    world.put([1, 2])
    world.land_all()
    grant = world.acquire([1, 2]) if reason == "read" else None
    if reason == "held":
        world.handle(ev.Hint(ev.HintKind.PIN, keys_of(1, 2)))
    world.handle(ev.Hint(ev.HintKind.DEMOTE, keys_of(1, 2)))
    assert world.tier_of(keys_of(1)) is TierId.HOST
    if grant is not None:
        assert world.read(grant) == keys_of(1, 2)
        world.handle(ev.Release(grant.lease))
    world.planner.check()


def test_what_is_forgotten_is_nowhere_and_its_cold_page_is_erased_and_used_again() -> None:
    world = World(spec_of(host=2, cold=2))
    world.put([1, 2])
    world.put([3, 4])
    world.land_all()
    assert world.planner.tables[TierId.COLD].pool.free_pages == 0
    world.handle(ev.Hint(ev.HintKind.PIN, keys_of(1, 2)))
    out = world.handle(ev.Hint(ev.HintKind.FORGET, keys_of(1, 2)))
    (erase,) = [item for item in out if isinstance(item, ev.Erase)]
    assert len(erase.pages) == 1
    assert world.get([1, 2]) == 0
    assert world.get([3, 4]) == 2
    assert world.planner.movement.held == set()
    assert world.planner.tables[TierId.COLD].pool.free_pages == 1
    world.planner.check()


def test_a_cold_page_of_which_a_part_is_forgotten_is_not_erased() -> None:
    world = World(spec_of(host=2, cold=2))
    world.put([1, 2])
    world.land_all()
    world.put([1, 3], first=1)
    blocks = world.planner.index.match(keys_of(1, 2))
    assert len(blocks) == 2
    (last,) = blocks[1:]
    world.handle(ev.Hint(ev.HintKind.TTL, keys_of(1, 2), at_ns=50))
    world.planner.movement.deadlines.pop(blocks[0])
    world.now = 50
    out = world.handle(ev.Tick())
    assert not [item for item in out if isinstance(item, ev.Erase)]
    assert world.get([1, 2]) == 1
    assert not world.planner.index.is_known(last)
    world.planner.check()


# ---- room


def test_a_quota_of_the_cold_tier_bounds_a_tenant_there() -> None:
    spec = spec_of(host=4, cold=6)
    spaces = [
        NamespaceSpec(one.name, one.root, {TierId.COLD: 1} if one.name == "b" else {})
        for one in spec.namespaces
    ]
    world = World(msgspec.structs.replace(spec, namespaces=spaces))
    for token in (1, 3, 5):
        world.put([token, token + 1], namespace="b")
        world.put([token, token + 1])
        world.land_all()
    owned = world.planner.tables[TierId.COLD].pool.owned
    assert owned == {"b": 1, "default": 3}
    world.planner.check()


def test_a_sync_that_began_before_a_rewrite_frees_nothing() -> None:
    world = World(spec_of(host=1, cold=3, page_blocks=4))
    world.put([1, 2])
    world.handle(ev.Flush())
    world.land_all()
    world.put([1, 2, 3], first=2)
    world.handle(ev.Syncing(1))
    world.handle(ev.Flush())
    world.land_all()  # the rewrite lands while sync 1 runs
    pool = world.planner.tables[TierId.COLD].pool
    world.handle(ev.Synced(1))
    assert pool.free_pages == 1, "the sync may have covered the older page only"
    world.handle(ev.Syncing(2))
    assert pool.free_pages == 1
    world.handle(ev.Synced(2))
    assert pool.free_pages == 2
    assert world.get([1, 2, 3]) == 3


def test_pages_are_evicted_a_few_at_a_time_in_a_large_tier() -> None:
    world = World(spec_of(host=256, cold=0, page_blocks=1))
    for token in range(256):
        world.put([token])
    world.put([999])
    stats = world.planner.stats
    assert stats.get("tierkv_evicted_pages_total", "host") == 4, "a 64th of it"
    assert [world.get([token]) for token in range(6)] == [0, 0, 0, 0, 1, 1]
    world.planner.check()


def test_hits_are_counted_in_tokens_by_the_tier_they_came_from() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    world.get([5, 6, 7])
    world.get([1, 2])
    hits = {
        tier: world.planner.stats.get("tierkv_hit_tokens_total", tier) for tier in ("host", "cold")
    }
    assert hits == {"host": 2, "cold": 2}


def test_transfers_that_did_not_arrive_are_counted_by_how_they_ended() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    for number, ok in ((1, False), (3, True)):
        world.handle(ev.Hint(ev.HintKind.PREFETCH, keys_of(number, number + 1)))
        (transfer,) = world.flights
        if ok:
            world.flights.pop(transfer)
            world.handle(ev.TransferDone(transfer, [Outcome.SKIPPED]))
        else:
            world.land(transfer, ok=False)
    name = "tierkv_transfers_unfinished_total"
    assert world.planner.stats.get(name, "host", "failed") == 1
    assert world.planner.stats.get(name, "host", "skipped") == 1
    assert world.get([1, 2]) == 0
    assert world.get([3, 4]) == 2
    world.planner.check()


def test_a_write_that_did_not_land_is_tried_again_at_the_next_flush() -> None:
    world = World(spec_of(host=2, cold=6))
    world.put([1, 2])
    world.land(next(iter(world.flights)), ok=False)
    movement = world.planner.movement
    assert len(movement.dirty) == 1
    assert sorted(movement.unsaved().values()) == sorted(keys_of(1, 2))
    assert movement.moves_to_save(movement.unsaved()) == 2
    world.handle(ev.Flush())
    assert movement.going_down() == list(world.flights)
    assert sorted(movement.unsaved().values()) == sorted(keys_of(1, 2)), "it is on its way only"
    world.land_all()
    assert movement.dirty == set()
    assert movement.unsaved() == {}
    assert world.tier_of(keys_of(1)) is TierId.HOST


def test_what_a_failed_sync_lost_is_dirty_again_where_memory_has_it() -> None:
    world = World(spec_of(host=2, cold=6))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    world.handle(ev.Distrust([0, 1, 2]))
    assert world.get([1, 2]) == 0
    assert len(world.planner.movement.unsaved()) == 4
    world.handle(ev.Flush())
    world.land_all()
    assert world.planner.movement.unsaved() == {}
    assert [world.get([3, 4]), world.get([5, 6])] == [2, 2]
    world.planner.check()


# ---- what there is nothing to do for


def test_without_a_device_or_a_cold_tier_nothing_is_admitted_or_flushed() -> None:
    world = World(spec_of(cold=0))
    world.put([1, 2])
    grant = world.acquire([1, 2])
    assert world.handle(ev.Admit(grant.lease)) == []
    assert world.handle(ev.Flush()) == []
    world.handle(ev.Release(grant.lease))
    world.planner.check()


def test_a_wish_for_no_blocks_is_granted_at_once() -> None:
    world = World(spec_of())
    world.put([1])
    (grant,) = world.handle(ev.Acquire(keys_of(1), 0, 0, "default"))
    assert isinstance(grant, ev.Grant)
    assert (grant.count, grant.waits) == (0, [])
    assert world.planner.located(grant.lease) == []
    world.handle(ev.Release(grant.lease))


def test_a_wish_behind_the_first_block_is_granted_by_its_own_length() -> None:
    world = World(spec_of())
    world.put([1, 2, 3, 4])
    (grant,) = world.handle(ev.Acquire(keys_of(1, 2, 3, 4), 1, 2, "default"))
    assert isinstance(grant, ev.Grant)
    assert world.read(grant) == keys_of(1, 2, 3)[1:]
    assert world.planner.stats.get("tierkv_hit_tokens_total", "host") == 2
    world.handle(ev.Release(grant.lease))


def test_what_is_found_under_another_tenants_root_is_let_go() -> None:
    (key,) = keys_of(1, namespace="b")
    root = CHAINS["b"].root
    for namespace, blocks in (("b", 1), ("default", 0)):
        world = World(spec_of())
        label = PageLabel(namespace, (BlockLabel(1, key, root),))
        world.handle(ev.Recovered([ev.RecoveredPage(3, 7, label)]))
        assert len(world.planner.match([key])) == blocks
        assert world.planner.tables[TierId.COLD].pool.free_pages == 6 - blocks
        world.planner.check()


def test_an_eviction_frees_no_more_than_is_needed_over_free_pages() -> None:
    world = World(spec_of(host=4, cold=0, page_blocks=1))
    for token in range(3):
        world.put([token])
    world.put([7, 8, 9])
    stats = world.planner.stats
    assert stats.get("tierkv_evicted_pages_total", "host") == 2
    assert [world.get([token]) for token in range(3)] == [0, 0, 1]


def test_a_tenant_below_its_quota_takes_the_oldest_page_whosever_it_is() -> None:
    world = World(spec_of(host=2, cold=6, quota=2))
    world.put([1, 2], namespace="b")
    world.land_all()
    world.put([3, 4])
    world.land_all()
    world.put([5, 6], namespace="b")  # takes the place of its own first, the oldest
    world.land_all()
    assert world.tier_of(keys_of(3)) is TierId.HOST
    world.handle(ev.Hint(ev.HintKind.PREFETCH, keys_of(1, 2, namespace="b"), "b"))
    world.land_all()
    assert world.tier_of(keys_of(5, namespace="b")) is TierId.HOST
    assert world.tier_of(keys_of(3)) is TierId.COLD
    world.planner.check()


def test_what_the_cold_tier_gives_up_is_dirty_where_memory_has_it() -> None:
    world = World(spec_of(host=4, cold=2))
    for tokens in ([1, 2], [3, 4], [5, 6]):
        world.put(tokens)
        world.land_all()
    assert sorted(world.planner.movement.unsaved().values()) == sorted(keys_of(1, 2))
    assert world.tier_of(keys_of(1)) is TierId.HOST
    world.planner.check()
