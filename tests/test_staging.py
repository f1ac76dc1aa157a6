"""Staging: the right bytes in any order a device may choose, and no race but a planted one."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tierkv.codecs.grouped import Int4, Int8  # noqa: E402
from tierkv.core.errors import GeometryMismatch  # noqa: E402
from tierkv.core.geometry import KVGeometry, PagePlan, PageTargets  # noqa: E402
from tierkv.kernels.relayout import (  # noqa: E402
    Arrangement,
    BlockShape,
    PagePool,
    Pool,
    Side,
    move_by_reference,
)
from tierkv.testing.streams import RecordingStreams, access  # noqa: E402
from tierkv.transfer.link_profile import PUBLISHED, SIZES, Direction, LinkProfile  # noqa: E402
from tierkv.transfer.page_batch import Numbers  # noqa: E402
from tierkv.transfer.spread import CodedSpread, PlainSpread  # noqa: E402
from tierkv.transfer.staging import Route, Staging  # noqa: E402
from tierkv.transfer.streams import Queue  # noqa: E402

PLAN = PagePlan.of(
    KVGeometry(layers=3, kv_heads=1, head_dim=16, dtype="float32"),
    block_tokens=2,
    targets=PageTargets(hot_bytes=128, warm_bytes=4096, cold_bytes=8192),
)
PAGES, FRAMES = 6, 40
SIZE = PLAN.warm_page_blocks
SLAB = BlockShape(1, 1, 1, PLAN.block_layer_bytes)


def profile(copy: float, kernel: float) -> LinkProfile:
    """A link on which copies of any size, and kernels, give these rates."""
    way = Direction((copy,) * len(SIZES), kernel)
    return LinkProfile(way, way, "made up")


#: Each makes another route the best for some of the pages that are drawn.
PROFILES = {
    "copies": profile(50e9, 1e9),
    "kernels": profile(1e9, 50e9),
    "small copies are slow": PUBLISHED,
    "only whole pages": LinkProfile(
        *(Direction(tuple(1e6 * 8**n for n in range(len(SIZES))), 1e3),) * 2, "made up"
    ),
}


class Moves(NamedTuple):
    """Blocks on their way: places in the arena, and frames, pairwise."""

    places: Numbers
    frames: Numbers

    @property
    def pairs(self) -> list[tuple[tuple[int, int], int]]:
        """(page, offset) and frame."""
        return [
            (divmod(place, SIZE), frame)
            for place, frame in zip(self.places.tolist(), self.frames.tolist(), strict=True)
        ]


class World:
    """An arena, a slab, and what both should hold; `compute` is the engine's own stream."""

    def __init__(
        self,
        seed: int,
        *,
        slots: int = 2,
        slot_pages: int = 1,
        skip: frozenset[int] = frozenset(),
        link: LinkProfile = PROFILES["copies"],
        pinned: int = PAGES,
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
        self.frames = PagePool(
            self.slab, SLAB, layers=3, page_blocks=1, page_bytes=PLAN.block_bytes
        )
        self.staging = Staging(
            self.streams,
            self.host,
            PlainSpread(self.streams, PLAN, self.frames),
            profile=link,
            regions=None if pinned == PAGES else lambda pages: np.where(pages < pinned, 0, -1),
            slots=slots,
            slot_bytes=size,
        )

    def host_block(self, page: int, offset: int) -> bytes:
        blocks = self.host[page, : PLAN.warm_payload_bytes].view(*PLAN.warm_page_shape)
        return bytes(blocks[:, offset].reshape(-1).numpy())

    def frame(self, number: int) -> bytes:
        return bytes(self.slab.view(FRAMES, -1)[number].numpy())


def moves_of(seed: int, pages: int) -> Moves:
    """Some blocks of different pages, or all of them, to or from frames of their own, shuffled."""
    draw = random.Random(seed)
    frames = draw.sample(range(FRAMES), FRAMES)
    pairs = []
    for page in draw.sample(range(PAGES), pages):
        count = draw.choice([1, 2, SIZE - 1, SIZE])
        offsets = draw.sample(range(SIZE), count)
        pairs += [(page * SIZE + offset, frames.pop()) for offset in offsets]
    draw.shuffle(pairs)
    places, chosen = np.array(pairs, np.int64).T
    return Moves(places, chosen)


#: What is moved, through how many slots of how many pages, an order of carrying it out, what the
#: link is like, and how many pages of the arena are pinned.
drawn = given(
    link=st.sampled_from(sorted(PROFILES)),
    pinned=st.integers(0, PAGES),
    seed=st.integers(0, 2**16),
    pages=st.integers(1, PAGES),
    ring=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    order=st.integers(0, 2**16),
)


@drawn
def test_blocks_come_up_whole_in_any_order(
    seed: int, pages: int, ring: tuple[int, int], order: int, link: str, pinned: int
) -> None:
    world = World(seed, slots=ring[0], slot_pages=ring[1], link=PROFILES[link], pinned=pinned)
    moves = moves_of(seed, pages)
    before = [world.frame(n) for n in range(FRAMES)]
    done = world.staging.load(*moves)

    assert world.streams.races() == []
    assert not done.query()
    world.streams.run(order)
    assert done.query()
    written = set()
    for block, frame in moves.pairs:
        assert world.frame(frame) == world.host_block(*block)
        written.add(frame)
    assert all(world.frame(n) == before[n] for n in set(range(FRAMES)) - written)


@drawn
def test_blocks_go_down_after_they_were_computed_and_leave_their_neighbours_alone(
    seed: int, pages: int, ring: tuple[int, int], order: int, link: str, pinned: int
) -> None:
    world = World(seed, slots=ring[0], slot_pages=ring[1], link=PROFILES[link], pinned=pinned)
    moves = moves_of(seed, pages)
    before = {(p, o): world.host_block(p, o) for p in range(PAGES) for o in range(SIZE)}
    fresh = torch.randint(0, 256, world.slab.shape, dtype=torch.uint8)
    world.streams.queue(
        "attention", "compute", [access(world.slab, writes=True)], lambda: world.slab.copy_(fresh)
    )
    world.staging.save(*moves, after=[world.streams.record("compute")])

    assert world.streams.races() == []
    world.streams.run(order)
    computed = fresh.view(FRAMES, -1)
    for block, frame in moves.pairs:
        assert world.host_block(*block) == bytes(computed[frame].numpy())
        del before[block]
    assert all(world.host_block(*block) == data for block, data in before.items())


@drawn
def test_a_layer_is_there_at_its_event_and_the_next_ones_need_not_be(
    seed: int, pages: int, ring: tuple[int, int], order: int, link: str, pinned: int
) -> None:
    world = World(seed, slots=ring[0], slot_pages=ring[1], link=PROFILES[link], pinned=pinned)
    moves = moves_of(seed, pages)
    before = [world.frame(n) for n in range(FRAMES)]
    events = world.staging.load_layers(*moves)

    assert len(events) == PLAN.layers
    assert world.streams.races() == []
    size = PLAN.block_layer_bytes
    for layer, event in enumerate(events):
        world.streams.run(order, only=world.streams.needed(event.last))
        assert event.query()
        part = slice(layer * size, (layer + 1) * size)
        for block, frame in moves.pairs:
            assert world.frame(frame)[part] == world.host_block(*block)[part]
        if layer + 1 < len(events):
            assert not events[-1].query()
    moved = set(moves.frames.tolist())
    assert all(world.frame(n) == before[n] for n in set(range(FRAMES)) - moved)


def busy_world(skip: frozenset[int] = frozenset()) -> World:
    """Down, up and down again through a ring of two slots, behind the engine's own work."""
    world = World(1, slots=2, skip=skip)
    slab = access(world.slab, writes=True)
    world.streams.queue("attention", "compute", [slab], lambda: world.slab.add_(1))
    world.staging.save(*moves_of(2, 4), after=[world.streams.record("compute")])
    world.streams.record("to host").synchronize()  # pages are read only when they were written
    read = [access(world.slab, writes=False)]
    world.streams.queue("attention", "compute", read, lambda: None)
    loaded = world.staging.load(*moves_of(3, 5), after=[world.streams.record("compute")])
    world.streams.wait("compute", loaded)
    world.streams.queue("attention", "compute", [slab], lambda: world.slab.add_(1))
    world.staging.save(*moves_of(4, 3), after=[world.streams.record("compute")])
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
    world.staging.save(*moves_of(6, 2))

    (race, *_) = world.streams.races()
    assert "attention on compute" in race
    assert "on relayout" in race


def test_a_load_of_what_is_still_on_its_way_down_is_found_whatever_the_queues_wait_for() -> None:
    """A copy may read host memory before all that was queued (vLLM #39306 is the like)."""
    world = World(5)
    saved = world.staging.save(*moves_of(6, 2))
    for queue in Queue:
        world.streams.wait(queue, saved)
    world.staging.load(*moves_of(6, 2))

    assert any("reading on any time" in race for race in world.streams.races())


def test_the_host_may_touch_pages_after_it_waited_and_not_before() -> None:
    def races(*, waits: bool) -> list[str]:
        world = World(7)
        saved = world.staging.save(*moves_of(8, 2))
        if waits:
            saved.synchronize()
            assert saved.query()
        world.streams.queue("reader", "host", [access(world.host, writes=False)], lambda: None)
        return world.streams.races()

    assert races(waits=True) == []
    assert "reader on host" in races(waits=False)[0]


@pytest.mark.parametrize("way", ["load", "save"])
def test_whole_neighbouring_pages_cross_the_link_as_one_copy_a_slot(way: str) -> None:
    world = World(9, slots=3, slot_pages=2)
    places = np.arange(4 * SIZE, dtype=np.int64)
    frames = np.random.default_rng(1).permutation(FRAMES)[: 4 * SIZE]
    getattr(world.staging, way)(places, frames)

    # Down without the padding between them, which is the host's own.
    expected = {
        "load": (Queue.TO_DEVICE, 1, 2 * PLAN.warm_page_bytes),
        "save": (Queue.TO_HOST, 2, 2 * PLAN.warm_payload_bytes),
    }
    assert [copy[:3] for copy in world.streams.copies] == [expected[way]] * 2


def test_the_cheapest_route_is_taken_for_each_page() -> None:
    wanted = np.array([0, *range(SIZE, 2 * SIZE)])  # one block of page 0, all of page 1
    frames = np.arange(len(wanted))
    taken = {}
    for name, link in PROFILES.items():
        for way in ("load", "save"):
            world = World(1, link=link)
            getattr(world.staging, way)(wanted, frames)
            taken[name, way] = {route for route, size in world.staging.moved_bytes.items() if size}

    assert taken == {
        # Pages of 4 KiB here: one copy of a page costs less than one for each layer of it.
        ("copies", "load"): {Route.PAGE},
        ("copies", "save"): {Route.RUNS},
        ("kernels", "load"): {Route.MAPPED},
        ("kernels", "save"): {Route.MAPPED},
        ("small copies are slow", "load"): {Route.MAPPED},
        ("small copies are slow", "save"): {Route.MAPPED},
        ("only whole pages", "load"): {Route.PAGE},
        ("only whole pages", "save"): {Route.RUNS},
    }


def test_a_part_of_a_large_page_crosses_as_its_runs() -> None:
    plan = PagePlan.of(
        KVGeometry(layers=2, kv_heads=4, head_dim=128),
        block_tokens=32,
        targets=PageTargets(hot_bytes=16384, warm_bytes=1 << 20, cold_bytes=1 << 20),
    )
    assert (plan.warm_page_blocks, plan.block_layer_bytes) == (8, 1 << 16)
    host = torch.randint(0, 256, (2, plan.warm_page_bytes), dtype=torch.uint8)
    slab = torch.zeros(16 * plan.block_bytes, dtype=torch.uint8)
    shape = BlockShape(1, 1, 1, plan.block_layer_bytes)
    frames = PagePool(slab, shape, layers=2, page_blocks=1, page_bytes=plan.block_bytes)
    streams = RecordingStreams()
    staging = Staging(streams, host, PlainSpread(streams, plan, frames))
    staging.load(np.array([9, 10, 11, 15]), np.array([0, 1, 2, 3])).synchronize()

    # Two runs in each of two layers, of 3 blocks and of 1.
    assert [copy[:3] for copy in streams.copies] == [(Queue.TO_DEVICE, 4, 8 << 16)]
    assert staging.moved_bytes[Route.RUNS] == 8 << 16
    blocks = host[1].view(2, 8, -1)[:, [1, 2, 3, 7]]
    assert torch.equal(slab.view(16, 2, -1)[:4], blocks.permute(1, 0, 2))


def test_no_kernel_and_no_batch_touches_memory_that_is_not_pinned() -> None:
    world = World(1, link=PROFILES["kernels"], pinned=2)
    places = np.arange(4 * SIZE, dtype=np.int64)
    world.staging.load(places, np.arange(len(places)))

    unpinned = world.host[2:4]
    start, stop = unpinned.data_ptr(), unpinned.data_ptr() + unpinned.numel()
    for operation in world.streams.operations:
        if any(part.start < stop and start < part.stop for part in operation.accesses):
            assert "copies" in operation.name
    staged = sum(size for *_, size, pinned in world.streams.copies if not pinned)
    assert staged == 2 * PLAN.warm_page_bytes


def test_a_copy_does_not_leave_its_region() -> None:
    world = World(1, slots=1, slot_pages=4)
    world.staging._regions = lambda pages: pages // 2
    places = np.arange(4 * SIZE, dtype=np.int64)
    world.staging.load(places, np.arange(len(places)))

    (copies,) = [count for queue, count, *_ in world.streams.copies if queue is Queue.TO_DEVICE]
    assert copies == 2


@drawn
def test_an_engines_own_paged_cache_is_filled_and_read_as_well(
    seed: int, pages: int, ring: tuple[int, int], order: int, link: str, pinned: int
) -> None:
    """K and V in tensors of their own, heads before tokens; against the reference."""
    shape = BlockShape(planes=1, tokens=2, heads=2, head_bytes=PLAN.block_layer_bytes // 8)
    at = Arrangement.paged(shape, blocks=FRAMES, heads_first=True)
    size = FRAMES * PLAN.block_layer_bytes // 2
    draw = torch.Generator().manual_seed(seed)
    layers = tuple(
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw)
        for _ in range(2 * PLAN.layers)
    )

    class Cache(NamedTuple):
        shape: BlockShape
        pool: Pool

        def offsets(self, blocks: Numbers) -> Numbers:
            return blocks * at.block

    cache = Cache(shape, Pool(layers, at))
    world = World(seed)
    staging = Staging(
        world.streams, world.host, PlainSpread(world.streams, PLAN, cache),
        profile=PROFILES[link], slots=ring[0], slot_bytes=ring[1] * PLAN.warm_page_bytes,
        regions=lambda pages: np.where(pages < pinned, 0, -1),
    )  # fmt: skip
    moves = moves_of(seed, pages)
    arena = PagePool(
        world.host.view(-1), shape, layers=3, page_blocks=SIZE,
        page_bytes=PLAN.warm_page_bytes, apart=True,
    )  # fmt: skip
    expected = tuple(layer.clone() for layer in layers)
    there = torch.from_numpy(cache.offsets(moves.frames))
    move_by_reference(shape, arena.side(moves.places), Side(Pool(expected, at), there))
    staging.load(*moves)
    world.streams.run(order)
    assert all(map(torch.equal, layers, expected))

    before = world.host.clone()
    back = replace(world.streams)  # keeps what was done
    assert back.races() == []
    for layer in layers:
        layer.add_(1)
    host = before.clone()
    to = PagePool(
        host.view(-1), shape, layers=3, page_blocks=SIZE,
        page_bytes=PLAN.warm_page_bytes, apart=True,
    )  # fmt: skip
    move_by_reference(shape, Side(Pool(layers, at), there), to.side(moves.places))
    staging.save(*moves)
    world.streams.run(order)
    assert torch.equal(world.host, host)


@drawn
@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=["int8", "int4"])
def test_codes_cross_the_link_and_values_come_back_as_the_codec_says(
    codec: Int8 | Int4,
    seed: int, pages: int, ring: tuple[int, int], order: int, link: str, pinned: int,
) -> None:  # fmt: skip
    """Down with encoding, and up again into other frames, whole and layer by layer."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(FRAMES * 3, 64, generator=draw)
    slab = values.clone().view(torch.uint8).view(-1)
    streams = RecordingStreams()
    spread = CodedSpread(streams, PLAN, slab, codec, torch.float32)
    plan = spread.plan
    assert plan.block_layer_bytes == codec.encoded_bytes(64, torch.float32)
    host = torch.zeros(pages, plan.warm_page_bytes, dtype=torch.uint8)
    staging = Staging(
        streams, host, spread, profile=PROFILES[link],
        regions=lambda numbers: np.where(numbers < pinned, 0, -1),
        slots=ring[0], slot_bytes=ring[1] * plan.warm_page_bytes,
    )  # fmt: skip
    shuffle = np.random.default_rng(seed)
    count = min(FRAMES // 2, pages * plan.warm_page_blocks)
    places = shuffle.permutation(pages * plan.warm_page_blocks)[:count]
    frames = shuffle.permutation(FRAMES)
    saved, loaded = frames[:count], frames[count : 2 * count]
    staging.save(places, saved).synchronize()  # the same pages are read again
    half = count // 2
    for part in (slice(0, half), slice(half, count)):
        if part.start == part.stop:
            continue
        if part.start:
            staging.load_layers(places[part], loaded[part])
        else:
            staging.load(places[part], loaded[part])
    assert streams.races() == []
    streams.run(order)

    found = slab.view(torch.float32).view(FRAMES, 3, 64)
    before = values.view(FRAMES, 3, 64)
    codes = codec.encode(values)
    kept = codec.decode(codes, 64, torch.float32).view(FRAMES, 3, 64)
    assert torch.equal(found[loaded], kept[saved])
    others = np.setdiff1d(np.arange(FRAMES), loaded)
    assert torch.equal(found[others], before[others])
    blocks = host[:, : plan.warm_payload_bytes].view(pages, *plan.warm_page_shape)
    down = blocks.permute(0, 2, 1, 3).reshape(pages * plan.warm_page_blocks, 3, -1)
    assert torch.equal(down[places], codes.view(FRAMES, 3, -1)[saved])


def test_places_and_frames_that_do_not_exist_are_refused_before_anything_starts() -> None:
    world = World(1)
    for places, frames in (
        ([-1], [0]),
        ([PAGES * SIZE], [0]),
        ([0], [FRAMES]),
        ([0], [-1]),
        ([0, 1], [0]),
        ([], []),
        ([3, 1, 3], [0, 1, 2]),
    ):
        for way in (world.staging.load, world.staging.save, world.staging.load_layers):
            with pytest.raises(GeometryMismatch):
                way(np.array(places, np.int64), np.array(frames, np.int64))
    assert world.streams.operations == []
