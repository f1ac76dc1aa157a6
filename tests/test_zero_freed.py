"""`tiers.host.zero_freed`: no byte of one tenant stays in a page that another tenant owns.

Every 16 bytes of a block name its tenant, so any piece that is left anywhere is found.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.core.keys import KeyChain
from tierkv.core.tier import TierId
from tierkv.core.transfer import Move, Outcome, Transfer, Urgency
from tierkv.memory import Memory
from tierkv.plan import events as ev
from tierkv.plan.event_log import entry_line, head_line, replay
from tierkv.plan.planner import Planner
from tierkv.plan.pool import PagePool
from tierkv.plan.spec import NamespaceSpec, PlanSpec, TierPlan
from tierkv.store import Hint, HintKind, Lease, Store
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles, at_rates
from tierkv.testing.store import staging_on
from tierkv.testing.streams import RecordingStreams
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.host import HostTier
from tierkv.transfer.staging import Staging

Bytes = npt.NDArray[np.uint8]

#: Five blocks of 6 KiB in a warm page of 32 KiB, and 2 KiB of padding.
GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
PAGES = {"hot": "1KiB", "warm": "32KiB", "cold": "64KiB"}
KIB = 1024
TENANTS = ("ada", "bob")
RATES = {Fault.EIO: 0.05, Fault.SHORT: 0.05, Fault.FLIP: 0.05}
STEPS = 120


def mark_of(tenant: str) -> bytes:
    """What every 16 bytes of a tenant's blocks begin with."""
    return f"<<{tenant}>>".encode()


def config_of(
    *, zero_freed: bool, host: int = 6, cold: int = 8, device: int = 0, root: str = "/nowhere"
) -> Config:
    # A disk that fails is not left alone: for how long it would be is a matter of seconds.
    cold_tier = {"directory": root, "threads": 2, "segment_cold_pages": 2, "breaker_faults": 1000}
    return Config.model_validate(
        {
            "pages": PAGES,
            "tiers": {
                "host": {"capacity": host * 32 * KIB, "zero_freed": zero_freed, "hugepages": "off"},
                "cold": {"capacity": cold * 36 * KIB, **cold_tier},
                "device": {"capacity": device * 6 * KIB, "device": "cpu"},
            },
            "transfer": {"put_deadline_ms": 2000, "demand_deadline_ms": 2000},
            "namespaces": {tenant: {"salt": tenant} for tenant in TENANTS},
        }
    )


class World:
    """A store that two tenants use, and what lies in its memory and on its disk."""

    def __init__(
        self,
        config: Config,
        *,
        rates: dict[Fault, float] | None = None,
        seed: int = 0,
        streams: RecordingStreams | None = None,
        is_real: bool = False,
    ) -> None:
        self.disk = MemoryFiles(Path("disk"), seed=seed)
        self.faulty = FaultyFiles(self.disk)
        self.streams = streams
        self.store = Store.open(
            config,
            Layout(GEOMETRY, targets=config.pages.targets),
            files_for=None if is_real else (lambda _root: self.faulty),
            staging_for=self.staging if streams else None,
        )
        if rates:
            draw = at_rates(seed, rates)
            # A sync that fails loses writes: what lay in a slot before is there again.
            self.faulty.schedule = lambda n, name: None if name == "sync" else draw(n, name)
        self.planner = self.store._runtime.planner
        self.arena = self.store._parts.host.pages
        self.leases: list[Lease] = []

    def staging(self, host: HostTier, device: DeviceTier) -> Staging:
        assert self.streams is not None
        return staging_on(self.streams, host, device)

    # ---- what tenants do

    def tokens(self, prompt: list[int]) -> list[int]:
        return [token for number in prompt for token in [number] * 16]

    def bytes_of(self, tenant: str, prompt: list[int]) -> Bytes:
        plan, blocks = self.store.plan, []
        for number in range(len(prompt)):
            name = "".join(map(str, prompt[: number + 1]))
            words = (mark_of(tenant) + name.encode()).ljust(16, b".")[:16]
            block = np.frombuffer(words * (plan.block_layer_bytes // 16), np.uint8)
            blocks.append(np.broadcast_to(block, (plan.layers, plan.block_layer_bytes)))
        return np.stack(blocks, axis=1)

    def put(self, tenant: str, prompt: list[int]) -> int:
        data = self.bytes_of(tenant, prompt)
        return self.store.put(self.tokens(prompt), data, namespace=tenant)

    def get(self, tenant: str, prompt: list[int]) -> int:
        match = self.store.match(self.tokens(prompt), namespace=tenant)
        plan = self.store.plan
        out = np.zeros((plan.layers, match.blocks, plan.block_layer_bytes), np.uint8)
        count = self.store.get(match, out)
        right = self.bytes_of(tenant, prompt)[:, :count]
        assert np.array_equal(out[:, :count], right), f"wrong bytes for {tenant} {prompt}"
        return count

    def hint(self, kind: HintKind, tenant: str, prompt: list[int]) -> None:
        keys: list[bytes] = [*self.store.keys(self.tokens(prompt), namespace=tenant)]
        self.store.hint(Hint(kind, keys, tenant))

    def lease(self, tenant: str, prompt: list[int]) -> Lease:
        match = self.store.match(self.tokens(prompt), namespace=tenant)
        self.leases.append(self.store.lease(match))
        return self.leases[-1]

    def release(self) -> None:
        for lease in self.leases:
            lease.release()
        self.leases.clear()

    # ---- what is there

    def settle(self) -> None:
        """Until nothing moves any more."""
        ends = time.monotonic() + 20
        engine = self.store._runtime.engine
        while engine.busy or engine.has_results:
            assert time.monotonic() < ends, "a transfer does not end"
            time.sleep(0.001)
            self.store.step()
        self.store.check()

    def foreign(self) -> Counter[str]:
        """Pieces of one tenant in pages of another, by tier."""
        self.settle()
        found: Counter[str] = Counter()
        for tier, table in self.planner.tables.items():
            if tier is TierId.DEVICE:
                continue
            for page, owner in table.pool.owner.items():
                data = self.arena[page].tobytes() if tier is TierId.HOST else self.slot(page)
                for tenant in TENANTS:
                    if tenant != owner:
                        found[tier.label] += data.count(mark_of(tenant))
        return found

    def slot(self, page: int) -> bytes:
        """Header and payload of a cold page as they lie on the disk; empty without a segment."""
        assert self.store._cold is not None
        directory = self.store._cold._directory
        shape = directory.shape
        segment = directory.segments.get(shape.segment_of(page))
        if segment is None or page % shape.pages_per_segment >= segment.slots:
            return b""
        data = aligned_array(shape.header_bytes + shape.warm_page_bytes, 4096)
        files: FileEngine | None = self.store._parts.files
        if files is self.faulty:
            files = self.disk  # as it is, without another fault
        assert files is not None
        files.read(segment.handle, shape.offset_of(page), [data.data])
        return data.tobytes()

    def on_disk(self, tenant: str) -> int:
        """Pieces of a tenant in all slots."""
        pages = self.planner.tables[TierId.COLD].pool.pages
        return sum(self.slot(page).count(mark_of(tenant)) for page in range(pages))


@contextmanager
def world_of(config: Config, **more: object) -> Iterator[World]:
    world = World(config, **more)  # type: ignore[arg-type]
    try:
        yield world
        world.faulty.schedule = None
        world.release()
        world.settle()
    finally:
        world.release()
        world.store.close()


def use(world: World, seed: int, steps: int = STEPS) -> Iterator[str]:
    """Do anything, in an order by seed; says what was done, each time."""
    rng = random.Random(seed)
    for number in range(steps):
        tenant = rng.choice(TENANTS)
        prompt = [rng.randint(0, 1) for _ in range(rng.choice([1, 1, 2, 3, 4, 5, 6, 8, 11]))]
        names = ["put", "get", "hint", "lease", "release", "flush"]
        (name,) = rng.choices(names, [8, 6, 4, 2, 2, 1])
        if name == "put":
            world.put(tenant, prompt)
        elif name == "get":
            world.get(tenant, prompt)
        elif name == "hint":
            kinds = [HintKind.PREFETCH, HintKind.DEMOTE, HintKind.FORGET]
            world.hint(rng.choice(kinds), tenant, prompt)
        elif name == "lease" and not world.leases:
            world.lease(tenant, prompt)
        elif name == "flush":
            world.store.flush()
        else:
            world.release()
        yield f"seed {seed}, step {number}: {name} {tenant} {prompt}"


#: Cold pages, frames of the device, whether the ring is there, whether things fail.
WAYS = {
    "disk": (8, 0, False, False),
    "disk that fails": (8, 0, False, True),
    "disk and device": (8, 7, False, False),
    "disk and ring": (8, 7, True, False),
    "disk and ring that fail": (8, 7, True, True),
    "device": (0, 40, False, False),
    "ring": (0, 40, True, False),
    "ring that fails": (0, 40, True, True),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_tenant_stays_in_a_page_that_another_owns(way: str, seed: int) -> None:
    """And without the option there would have been something."""
    cold, device, is_staged, fails = WAYS[way]
    left: dict[bool, Counter[str]] = {}
    for zero_freed in (True, False):
        broken_after = 200 + 100 * seed if fails else None
        streams = RecordingStreams(pace=3, seed=seed, broken_after=broken_after)
        found: Counter[str] = Counter()
        with world_of(
            config_of(zero_freed=zero_freed, host=5, cold=cold, device=device),
            rates=RATES if fails else None,
            seed=seed,
            streams=streams if is_staged else None,
        ) as world:
            for said in use(world, seed):
                found += world.foreign()
                assert not (zero_freed and found.total()), f"{said}: {found}"
            happened = world.store.snapshot()
            assert happened["tierkv_evicted_pages_total"]["host"] > 5, "pages must change hands"
            assert fails or device <= 7 or "device,host,latency_ns" in happened["links"]
        left[zero_freed] = found
    assert left[False]["host"], "the test would find nothing"


def test_tenants_that_write_at_the_same_time_do_not_zero_each_other() -> None:
    """Threads of one tenant share its open page: who opened it may come to write last."""
    with world_of(config_of(zero_freed=True, host=5, cold=6, device=3)) as world:

        def run(number: int) -> int:
            rng, found = random.Random(number), 0
            tenant = TENANTS[number % 2]
            for _ in range(150):
                prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, 3))]
                if rng.random() < 0.5:
                    world.put(tenant, prompt)
                else:
                    found += world.get(tenant, prompt)
            return found

        with ThreadPoolExecutor(6) as pool:
            assert min(pool.map(run, range(6))) > 20
        assert not world.foreign().total()


def fills(world: World, tenant: str, prompt: list[int], first: int = 0) -> list[ev.Fill]:
    """What the planner wants written for a put, not written yet."""
    with world.store._runtime.lock:
        keys: list[bytes] = [*world.store.keys(world.tokens(prompt), namespace=tenant)]
        out = world.store._runtime.handle(ev.Put(keys, first, tenant))
    return [item for item in out if isinstance(item, ev.Fill)]


def end(world: World, fill: ev.Fill, *, ok: bool) -> None:
    with world.store._runtime.lock:
        world.store._runtime.handle(ev.Filled(fill.ticket, ok))


def test_a_page_is_zeroed_once_whoever_writes_into_it_first() -> None:
    with world_of(config_of(zero_freed=True, cold=0)) as world:
        memory: Memory = world.store._memory
        world.arena[:] = 0xAA
        (slow,) = fills(world, "ada", [1])
        (quick,) = fills(world, "ada", [2])
        assert slow.spans[0].page == quick.spans[0].page
        for prompt, fill in (([2], quick), ([1], slow)):
            memory.fill(fill, world.bytes_of("ada", prompt))
            end(world, fill, ok=True)

        assert world.get("ada", [1]) == world.get("ada", [2]) == 1
        assert not np.any(world.arena[slow.spans[0].page] == 0xAA)


def test_a_hole_that_a_failed_write_left_is_not_zeroed_by_a_late_one() -> None:
    """1. A slow put opens a page. 2. Another fills it up, and fails before it wrote anything.
    3. A third gets one of its holes, and writes. 4. The first comes to write.
    """
    with world_of(config_of(zero_freed=True, host=1, cold=0)) as world:
        memory: Memory = world.store._memory
        (slow,) = fills(world, "ada", [1])
        (failing,) = fills(world, "ada", [2, 2, 2, 2])
        end(world, failing, ok=False)
        (third,) = fills(world, "ada", [3])
        for prompt, fill in (([3], third), ([1], slow)):
            memory.fill(fill, world.bytes_of("ada", prompt))
            end(world, fill, ok=True)

        assert world.get("ada", [3]) == world.get("ada", [1]) == 1


@pytest.mark.parametrize("zero_freed", [True, False])
@pytest.mark.parametrize("is_begun", [True, False])
def test_a_page_whose_read_failed_or_never_began_holds_nothing_of_others(
    zero_freed: bool, is_begun: bool
) -> None:
    """A lease keeps such a page owned, so it is not freed, and later puts write beside it."""
    with world_of(config_of(zero_freed=zero_freed, host=3, cold=12)) as world:
        world.put("bob", [1] * 5)
        world.store.flush()
        for other in range(4):  # all of host memory is another's
            world.put("ada", [other] * 5)
            world.store.flush()
        match = world.store.match(world.tokens([1] * 5), namespace="bob")
        assert match.tokens_by_tier["cold"] == 80
        assert not world.foreign().total()
        world.faulty.schedule = lambda _, name: Fault.EIO if name == "read" else None
        if not is_begun:
            for _ in range(1000):
                number = world.store._runtime.engine.breaker.begin()
                assert number is not None
                world.store._runtime.engine.breaker.end(number, is_good=False, seconds=0)
        assert world.lease("bob", [1] * 5).blocks == 0

        assert bool(world.foreign()["host"]) is not zero_freed


@pytest.mark.parametrize("zero_freed", [True, False])
def test_what_is_forgotten_is_gone_from_the_disk(tmp_path: Path, zero_freed: bool) -> None:
    config = config_of(zero_freed=zero_freed, cold=12, root=str(tmp_path))
    with world_of(config, is_real=True) as world:
        for tenant in TENANTS:
            world.put(tenant, [1] * 12)
        assert world.store.flush()
        before = {tenant: world.on_disk(tenant) for tenant in TENANTS}
        assert before["bob"] == 12 * GEOMETRY.layers * 2048 // 16
        world.hint(HintKind.FORGET, "bob", [1] * 12)
        assert world.store.flush()

        assert world.on_disk("bob") == (0 if zero_freed else before["bob"])
        assert world.on_disk("ada") == before["ada"]
        world.hint(HintKind.FORGET, "ada", [0])  # unknown: nothing happens
        assert world.get("ada", [1] * 12) == 12
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (mark_of("bob") in text) is not zero_freed
    assert mark_of("ada") in text


@pytest.mark.parametrize("zero_freed", [True, False])
def test_an_older_copy_of_what_is_forgotten_does_not_come_back(zero_freed: bool) -> None:
    """1. A partly filled page is flushed. 2. It grows, and is written again as a whole, elsewhere.
    3. A sync frees the older copy. 4. The newer one is forgotten. 5. The store is opened again.
    """
    config = config_of(zero_freed=zero_freed, host=2, cold=12)
    with world_of(config) as world:
        world.put("bob", [0] * 5)
        world.put("bob", [1])
        world.store.flush()
        world.hint(HintKind.PIN, "bob", [0] * 5)  # so that what is put goes into the other page
        world.put("bob", [1, 1])
        world.store.flush()
        world.hint(HintKind.FORGET, "bob", [1, 1])
        world.settle()
        assert world.get("bob", [1, 1]) == 0
        assert world.get("bob", [0] * 5) == 5
        assert (world.on_disk("bob") == 5 * GEOMETRY.layers * 2048 // 16) is zero_freed
        disk = world.disk
    layout = Layout(GEOMETRY, targets=config.pages.targets)
    with Store.open(config, layout, files_for=lambda _root: disk) as store:
        assert store.match([1] * 32, namespace="bob").blocks == 0
        assert store.match([0] * 80, namespace="bob").blocks == 5
        store.check()


@pytest.mark.parametrize("zero_freed", [True, False])
@pytest.mark.parametrize("is_begun", [True, False])
def test_places_that_a_device_did_not_fill_are_zeroed(zero_freed: bool, is_begun: bool) -> None:
    streams = RecordingStreams(pace=1, broken_after=0)
    with world_of(config_of(zero_freed=zero_freed, cold=0, device=7), streams=streams) as world:
        world.arena[:] = 0xAA
        moves = [Move(frame, place) for frame, place in ((0, 2), (1, 5), (2, 6))]
        fresh = ((1, 1),) if zero_freed else ()
        engine = world.store._runtime.engine
        down = Transfer(9, TierId.DEVICE, TierId.HOST, moves, Urgency.DEMOTE, fresh)
        engine.submit(down, deadline_ns=None if is_begun else 0)
        assert engine.wait(20, until=lambda: False)
        (result,) = engine.poll()
        assert set(result.outcomes) == {Outcome.FAILED if is_begun else Outcome.SKIPPED}

        blocks = world.store._parts.host.blocks
        assert bool(np.any(blocks[0, :, 2] == 0xAA)) is not zero_freed
        assert bool(np.any(world.arena[1] == 0xAA)) is not zero_freed
        assert np.all(blocks[0, :, 1] == 0xAA), "others' places stay"
        world.arena[:] = 0


def test_an_opening_ends_with_its_page() -> None:
    pool = PagePool(3, 4, counts_openings=True)
    pool.take(5, "x")
    pool.take(3, "x")
    assert pool.openings == {1: 1}, "page 0 was taken whole"
    pool.release_full([0, 1])
    assert pool.openings == {}
    pool.take(2, "y")
    assert pool.openings == {0: 2}
    assert pool.give(0, (0, 1))
    pool.release(0)
    assert pool.openings == {}
    pool.check()


def events_of(spec: PlanSpec, chain: KeyChain) -> tuple[list[bytes], list[ev.AnyInstruction]]:
    """An event log with every kind of opening, and all that came out."""
    planner, log, said = Planner(spec), [head_line(spec)], list[ev.AnyInstruction]()
    rng = random.Random(5)
    waiting: list[ev.AnyEvent] = []
    for now in range(400):
        keys: list[bytes] = [
            *chain.of_tokens([rng.randint(0, 2) for _ in range(rng.randint(1, 7))])
        ]
        kinds = (HintKind.PREFETCH, HintKind.DEMOTE)
        event: ev.AnyEvent = ev.Put(keys, 0, "x")
        if waiting and rng.random() < 0.7:
            event = waiting.pop(0)
        elif rng.random() < 0.4:
            event = ev.Hint(rng.choice(kinds), keys, "x")
        out = planner.handle(event, now)
        log.append(entry_line(now, event, out))
        said += out
        for item in out:
            if isinstance(item, ev.Fill):
                waiting.append(ev.Filled(item.ticket, rng.random() < 0.9))
            elif isinstance(item, Transfer):
                outcomes = [Outcome(rng.choice([1, 1, 1, 2, 0])) for _ in item.moves]
                waiting.append(ev.TransferDone(item.id, outcomes))
    planner.check()
    return log, said


def spec_of(chain: KeyChain, *, zero_freed: bool) -> PlanSpec:
    tiers = {
        TierId.DEVICE: TierPlan(5, 1),
        TierId.HOST: TierPlan(4, 3),
        TierId.COLD: TierPlan(6, 3),
    }
    return PlanSpec(tiers, [NamespaceSpec("x", chain.root)], 1, 8, zero_freed=zero_freed)


def test_an_event_log_with_the_option_replays() -> None:
    chain = KeyChain(b"f" * 32, salt=b"x", block_tokens=1)
    log, said = events_of(spec_of(chain, zero_freed=True), chain)

    assert replay(log).different == []
    assert any(isinstance(item, ev.Fill) and item.fresh for item in said)
    assert any(isinstance(item, Transfer) and item.fresh for item in said)
    without = msgspec.json.decode(log[0])
    del without["zero_freed"]
    assert replay([msgspec.json.encode(without), *log[1:]]).different, "the option decides"


def test_without_the_option_instructions_and_logs_do_not_know_of_it() -> None:
    chain = KeyChain(b"f" * 32, salt=b"x", block_tokens=1)
    log, said = events_of(spec_of(chain, zero_freed=False), chain)

    assert b"zero_freed" not in log[0]
    assert b"fresh" not in msgspec.json.encode(said)
