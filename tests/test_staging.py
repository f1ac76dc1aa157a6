"""Staging: the right bytes in any order a device may choose, and no race but a planted one."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tierkv.core.geometry import KVGeometry, PagePlan, PageTargets  # noqa: E402
from tierkv.testing.streams import RecordingStreams, access  # noqa: E402
from tierkv.transfer.staging import PageMove, Staging, page_moves  # noqa: E402

PLAN = PagePlan.of(
    KVGeometry(layers=3, kv_heads=1, head_dim=16, dtype="float32"),
    block_tokens=2,
    targets=PageTargets(hot_bytes=128, warm_bytes=4096, cold_bytes=8192),
)
PAGES, FRAMES = 6, 40
Block = tuple[int, int]


class World:
    """An arena, a slab, and what both should hold; `compute` is the engine's own stream."""

    def __init__(
        self,
        seed: int,
        *,
        slots: int = 2,
        slot_pages: int = 1,
        skip: frozenset[int] = frozenset(),
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.host = torch.randint(
            0, 256, (PAGES, PLAN.warm_page_bytes), dtype=torch.uint8, generator=draw
        )
        self.slab = torch.randint(
            0, 256, (FRAMES * PLAN.block_bytes,), dtype=torch.uint8, generator=draw
        )
        self.streams = RecordingStreams(skip=skip)
        size = slot_pages * PLAN.warm_page_bytes
        self.staging = Staging(
            self.streams, PLAN, self.host, self.slab, slots=slots, slot_bytes=size
        )

    def host_block(self, page: int, offset: int) -> bytes:
        blocks = self.host[page, : PLAN.warm_payload_bytes].view(*PLAN.warm_page_shape)
        return bytes(blocks[:, offset].reshape(-1).numpy())

    def frame(self, number: int) -> bytes:
        return bytes(self.slab.view(FRAMES, -1)[number].numpy())


def moves_of(seed: int, pages: int) -> list[PageMove]:
    """Some blocks of different pages, to or from frames of their own."""
    draw = random.Random(seed)
    frames = draw.sample(range(FRAMES), FRAMES)
    moves = []
    for page in draw.sample(range(PAGES), pages):
        size = PLAN.warm_page_blocks
        offsets = draw.sample(range(size), draw.randint(1, min(size, FRAMES // PAGES)))
        moves.append(PageMove(page, offsets, [frames.pop() for _ in offsets]))
    return moves


#: What is moved, through how many slots of how many pages, and an order of carrying it out.
drawn = given(
    seed=st.integers(0, 2**16),
    pages=st.integers(1, PAGES),
    ring=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    order=st.integers(0, 2**16),
)


@drawn
def test_blocks_come_up_whole_in_any_order(
    seed: int, pages: int, ring: tuple[int, int], order: int
) -> None:
    world = World(seed, slots=ring[0], slot_pages=ring[1])
    moves = moves_of(seed, pages)
    before = [world.frame(n) for n in range(FRAMES)]
    done = world.staging.load(moves)

    assert world.streams.races() == []
    assert not done.query()
    world.streams.run(order)
    assert done.query()
    written = set()
    for move in moves:
        for offset, frame in zip(move.offsets, move.frames, strict=True):
            assert world.frame(frame) == world.host_block(move.page, offset)
            written.add(frame)
    assert all(world.frame(n) == before[n] for n in set(range(FRAMES)) - written)


@drawn
def test_blocks_go_down_after_they_were_computed_and_leave_their_neighbours_alone(
    seed: int, pages: int, ring: tuple[int, int], order: int
) -> None:
    world = World(seed, slots=ring[0], slot_pages=ring[1])
    moves = moves_of(seed, pages)
    size = PLAN.warm_page_blocks
    before = {(p, o): world.host_block(p, o) for p in range(PAGES) for o in range(size)}
    fresh = torch.randint(0, 256, world.slab.shape, dtype=torch.uint8)
    world.streams.queue(
        "attention", "compute", [access(world.slab, writes=True)], lambda: world.slab.copy_(fresh)
    )
    world.staging.save(moves, after=[world.streams.record("compute")])

    assert world.streams.races() == []
    world.streams.run(order)
    computed = fresh.view(FRAMES, -1)
    for move in moves:
        for offset, frame in zip(move.offsets, move.frames, strict=True):
            assert world.host_block(move.page, offset) == bytes(computed[frame].numpy())
            del before[move.page, offset]
    assert all(world.host_block(*block) == data for block, data in before.items())


@drawn
def test_a_layer_is_there_at_its_event_and_the_next_ones_need_not_be(
    seed: int, pages: int, ring: tuple[int, int], order: int
) -> None:
    world = World(seed, slots=ring[0], slot_pages=ring[1])
    moves = moves_of(seed, pages)
    before = [world.frame(n) for n in range(FRAMES)]
    events = world.staging.load_layers(moves)

    assert len(events) == PLAN.layers
    assert world.streams.races() == []
    size = PLAN.block_layer_bytes
    for layer, event in enumerate(events):
        world.streams.run(order, only=world.streams.needed(event.last))
        assert event.query()
        part = slice(layer * size, (layer + 1) * size)
        for move in moves:
            for offset, frame in zip(move.offsets, move.frames, strict=True):
                assert world.frame(frame)[part] == world.host_block(move.page, offset)[part]
        if layer + 1 < len(events):
            assert not events[-1].query()
    moved = {frame for move in moves for frame in move.frames}
    assert all(world.frame(n) == before[n] for n in set(range(FRAMES)) - moved)


def busy_world(skip: frozenset[int] = frozenset()) -> World:
    """Down, up and down again through a ring of two slots, behind the engine's own work."""
    world = World(1, slots=2, skip=skip)
    slab = access(world.slab, writes=True)
    world.streams.queue("attention", "compute", [slab], lambda: world.slab.add_(1))
    world.staging.save(moves_of(2, 4), after=[world.streams.record("compute")])
    saved = world.streams.record("to host")
    world.streams.wait("to device", saved)  # pages are read only when they were written
    read = [access(world.slab, writes=False)]
    world.streams.queue("attention", "compute", read, lambda: None)
    loaded = world.staging.load(moves_of(3, 5), after=[world.streams.record("compute")])
    world.streams.wait("compute", loaded)
    world.streams.queue("attention", "compute", [slab], lambda: world.slab.add_(1))
    world.staging.save(moves_of(4, 3), after=[world.streams.record("compute")])
    return world


def test_a_ring_that_is_used_both_ways_has_no_race() -> None:
    assert busy_world().streams.races() == []


def test_a_wait_that_is_left_out_is_a_race_that_is_found() -> None:
    """Every wait of the ring is needed, except where another one implies it."""
    waits = busy_world().streams.waits
    found = {n: busy_world(frozenset({n})).streams.races() for n in range(waits)}
    needed = {n for n, races in found.items() if races}

    assert len(needed) > waits // 2, found
    wrong = 0
    expected = busy_world()
    expected.streams.run()
    for number in needed:
        for order in range(30):
            world = busy_world(frozenset({number}))
            world.streams.run(order)
            wrong += not torch.equal(world.host, expected.host)
    assert wrong, "no order showed what a missing wait does"


def test_no_order_of_a_ring_without_races_changes_a_byte() -> None:
    expected = busy_world()
    expected.streams.run()
    for order in range(40):
        world = busy_world()
        world.streams.run(order)
        assert torch.equal(world.host, expected.host)
        assert torch.equal(world.slab, expected.slab)


def test_write_back_that_does_not_wait_for_the_engine_is_found() -> None:
    world = World(5)
    slab = access(world.slab, writes=True)
    world.streams.queue("attention", "compute", [slab], lambda: world.slab.add_(1))
    world.staging.save(moves_of(6, 2))

    (race, *_) = world.streams.races()
    assert "attention on compute" in race
    assert "on relayout" in race


def test_the_host_may_touch_pages_after_it_waited_and_not_before() -> None:
    def races(*, waits: bool) -> list[str]:
        world = World(7)
        saved = world.staging.save(moves_of(8, 2))
        if waits:
            saved.synchronize()
            assert saved.query()
        world.streams.queue("reader", "host", [access(world.host, writes=False)], lambda: None)
        return world.streams.races()

    assert races(waits=True) == []
    assert "reader on host" in races(waits=False)[0]


def test_moves_of_single_blocks_become_one_move_a_page() -> None:
    up = page_moves([(9, 100), (3, 7), (8, 101), (10, 5)], 4, host_first=True)

    assert up == [PageMove(2, [1, 0, 2], [100, 101, 5]), PageMove(0, [3], [7])]
    assert page_moves([(100, 9)], 4, host_first=False) == [PageMove(2, [1], [100])]
