"""The planner and its policies: leaf first, guards, every policy in every tier."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.test_planner import CHAINS, SECOND, World, spec_of
from tierkv.core.tier import TierId
from tierkv.plan import events as ev
from tierkv.plan.event_log import replay
from tierkv.plan.policies import POLICIES
from tierkv.plan.spec import PlanSpec


def keys_of(*tokens: int) -> list[bytes]:
    return list(CHAINS["default"].of_tokens(list(tokens)))


def in_host(world: World, *tokens: int) -> list[int]:
    """Which blocks of a chain host memory has, by their position."""
    ready = world.planner.tables[TierId.HOST].ready
    ids = world.planner.index.match(CHAINS["default"].of_tokens(list(tokens)))
    return [number for number, block in enumerate(ids) if ready[block] >= 0]


def guarded(spec: PlanSpec, **policies: str) -> PlanSpec:
    """The same tiers with other policies."""
    tiers = {
        tier: structs.replace(plan, policy=policies.get(tier.label, plan.policy))
        for tier, plan in spec.tiers.items()
    }
    return structs.replace(spec, tiers=tiers)


def test_a_chain_that_was_put_behind_a_hit_goes_leaf_first() -> None:
    """Its new blocks were younger than their parents, so the middle of the chain went first."""
    world = World(spec_of(host=5, cold=0, page_blocks=1))
    world.put([1, 2])
    world.get([1, 2])
    world.put([1, 2, 3, 4], first=2)
    world.put([9])
    for length, left in ((4, 3), (3, 2), (2, 1), (1, 0)):
        assert in_host(world, 1, 2, 3, 4) == list(range(length))
        world.put([20 + left])
        assert in_host(world, 1, 2, 3, 4) == list(range(left))


def test_a_chain_that_was_put_in_pieces_goes_leaf_first() -> None:
    world = World(spec_of(host=4, cold=0, page_blocks=1))
    for end in (1, 2, 3, 4):
        world.put([1, 2, 3, 4][:end], first=end - 1)
    world.put([9])

    assert in_host(world, 1, 2, 3, 4) == list(range(3))


def test_what_was_promoted_is_older_than_what_it_continues() -> None:
    world = World(spec_of(host=3, cold=8, page_blocks=1))
    world.put([1, 2, 3])
    world.land_all()
    world.put([8])
    world.land_all()
    assert in_host(world, 1, 2, 3) == list(range(2))
    world.get([1, 2, 3])
    world.land_all()
    world.put([9])

    assert in_host(world, 1, 2, 3) == list(range(2))


def test_a_chain_that_does_not_fit_keeps_its_head() -> None:
    world = World(spec_of(host=3, cold=0, page_blocks=1))
    world.put([1, 2])
    world.put([1, 2, 3, 4, 5], first=2)

    assert in_host(world, 1, 2, 3, 4, 5) == list(range(3))


def test_a_guard_answers_a_put_short_and_nothing_is_waited_for() -> None:
    world = World(guarded(spec_of(host=2, cold=0, page_blocks=1), host="ttl"))
    world.put([1, 2])
    out = world.handle(ev.Put(keys_of(8), 0, "default"))
    assert out == [ev.Short(0, [])]
    assert in_host(world, 1, 2) == list(range(2))
    world.now += 31 * SECOND
    world.put([8])

    assert in_host(world, 8) == list(range(1))


def test_a_guard_gives_way_to_a_read_but_not_to_a_prefetch() -> None:
    world = World(guarded(spec_of(host=2, cold=8, page_blocks=1), host="ttl"))
    world.put([1, 2])
    world.land_all()
    world.now += 31 * SECOND
    world.put([8, 9])
    world.land_all()
    world.handle(ev.Hint(ev.HintKind.PREFETCH, keys_of(1, 2)))
    assert not world.flights
    assert in_host(world, 8, 9) == list(range(2))

    assert world.get([1, 2]) == 2


def test_a_guard_of_the_disk_lets_what_is_new_go_unsaved() -> None:
    """The host page that must go for a read is not copied down, and the read goes on."""
    world = World(guarded(spec_of(host=1, cold=1, page_blocks=1), cold="ttl"))
    world.put([1])
    world.land_all()
    world.put([8])
    world.land_all()
    assert world.tier_of(CHAINS["default"].of_tokens([1])) is TierId.COLD

    assert world.get([1]) == 1


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "ttl"])
def test_every_policy_serves_all_tiers(policy: str) -> None:
    """A hundred prompts that share beginnings, through device, host and disk."""
    spec = guarded(spec_of(host=6, cold=20, device=5), device=policy, host=policy, cold=policy)
    world = World(spec)
    for number in range(100):
        tokens = [number % 7, number % 11, number % 5, number % 3]
        world.get(tokens)
        world.put(tokens)
        world.land_all()
        world.planner.check()
    for tier, table in world.planner.tables.items():
        assert len(world.planner.movement.policies[tier]) == len(table.pool.owner)
    assert replay(world.log).different == []
