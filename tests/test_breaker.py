"""The breaker: a disk that fails or hangs is left alone, and taken back when it is well."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.store import Store
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles
from tierkv.transfer.breaker import Breaker, State

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
BLOCKS = 10


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def breaker_at(clock: Clock) -> Breaker:
    return Breaker("cold", faults_max=3, slow_s=5, retry_s=1, retry_max_s=8, clock=clock)


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        assert breaker.begin()
        breaker.end(is_good=False, seconds=0)


def test_faults_in_a_row_open_it_and_one_between_them_does_not() -> None:
    breaker = breaker_at(Clock())
    fail(breaker, 2)
    assert breaker.begin()
    breaker.end(is_good=True, seconds=0)
    fail(breaker, 2)
    assert breaker.state is State.CLOSED
    fail(breaker)
    assert breaker.state is State.OPEN
    assert not breaker.begin()
    assert breaker.skipped == 1


def test_what_takes_too_long_is_a_fault() -> None:
    breaker = breaker_at(Clock())
    for _ in range(3):
        assert breaker.begin()
        breaker.end(is_good=True, seconds=5.1)
    assert breaker.state is State.OPEN


def test_one_operation_is_tried_when_the_time_is_over_and_decides() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    fail(breaker, 3)
    for pause in (1, 2, 4, 8, 8):
        clock.now += pause - 0.01
        assert not breaker.begin()
        clock.now += 0.02
        assert breaker.state is State.HALF_OPEN
        assert breaker.begin()
        assert not breaker.begin(), "one at a time"
        breaker.end(is_good=False, seconds=0)
        assert breaker.state is State.OPEN
    clock.now += 9
    assert breaker.begin()
    breaker.end(is_good=True, seconds=0)
    assert breaker.state is State.CLOSED
    fail(breaker, 2)
    assert breaker.state is State.CLOSED
    fail(breaker)
    clock.now += 1.01
    assert breaker.begin(), "the first pause again"


def test_what_began_before_it_opened_does_not_make_the_pause_longer() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    assert all(breaker.begin() for _ in range(8))
    for _ in range(8):
        breaker.end(is_good=False, seconds=0)
    clock.now = 1.01
    assert breaker.begin()


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=60))
def test_it_is_never_open_for_longer_than_the_longest_pause(
    events: list[tuple[bool, float]],
) -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    for is_good, pause in events:
        if breaker.begin():
            breaker.end(is_good=is_good, seconds=0)
        clock.now += pause
    clock.now += 8.01
    assert breaker.state in (State.CLOSED, State.HALF_OPEN)
    assert breaker.begin()


class World:
    """A store with a small host tier over a disk that can fail."""

    def __init__(self, **cold: object) -> None:
        self.files = FaultyFiles(MemoryFiles(Path("disk")), delay_s=0.3)
        config = Config.model_validate(
            {
                "pages": {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"},
                "tiers": {
                    "host": {"capacity": "128KiB"},
                    "cold": {"capacity": "4MiB", "directory": "/nowhere", "threads": 2, **cold},
                },
                "transfer": {"demand_deadline_ms": 2000, "put_deadline_ms": 2000},
            }
        )
        layout = Layout(GEOMETRY, targets=config.pages.targets, model="m")
        self.store = Store.open(config, layout, files_for=lambda _root: self.files)
        shape = (3, BLOCKS, self.store.plan.block_layer_bytes)
        self.shape = shape

    def data(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, self.shape, dtype=np.uint8)

    def tokens(self, seed: int) -> list[int]:
        return [int(n) for n in np.random.default_rng(seed).integers(0, 1000, BLOCKS * 16)]

    def put(self, seed: int) -> int:
        return self.store.put(self.tokens(seed), self.data(seed))

    def get(self, seed: int) -> int:
        match = self.store.match(self.tokens(seed))
        out = np.zeros((3, match.blocks, self.shape[2]), np.uint8)
        count = self.store.get(match, out)
        assert np.array_equal(out[:, :count], self.data(seed)[:, :count])
        return count

    @property
    def state(self) -> int:
        return self.store.snapshot()["tiers"]["cold,breaker_state"]


def test_a_dead_disk_costs_what_lay_on_it_and_gives_it_back_when_it_is_well() -> None:
    world = World()
    with world.store:
        for seed in range(4):
            assert world.put(seed) == BLOCKS
        assert world.store.flush()
        world.files.schedule = lambda _n, what: Fault.EIO if what in ("read", "write") else None
        for seed in range(4, 12):
            assert world.put(seed) == BLOCKS, "host memory goes on"
            assert world.get(seed) == BLOCKS
        assert world.state == State.OPEN
        calls = world.files.calls
        assert [world.get(seed) for seed in range(3)] == [0, 0, 0]
        assert world.files.calls == calls, "nobody asks a disk that is left alone"

        world.files.schedule = None
        ends = time.monotonic() + 10
        while world.state != State.CLOSED:
            assert time.monotonic() < ends
            world.get(0)
            time.sleep(0.05)
        assert world.get(1) == BLOCKS, "what lay there was not spoiled"
        assert world.put(20) == BLOCKS
        assert world.store.flush()


def test_a_slow_disk_is_waited_for_a_few_times_and_then_no_more() -> None:
    world = World(breaker_slow_ms=100, breaker_faults=2)
    with world.store:
        for seed in range(6):
            world.put(seed)
        assert world.store.flush()
        world.files.schedule = lambda _n, what: Fault.DELAY if what == "read" else None
        slow = 0
        for seed in (0, 1, 2, 3):
            begun = time.monotonic()
            world.get(seed)
            slow += time.monotonic() - begun > 0.25
        assert world.state == State.OPEN
        assert slow <= 2
        assert world.put(9) == BLOCKS
        begun = time.monotonic()
        assert world.get(9) == BLOCKS, "host hits do not know of it"
        assert time.monotonic() - begun < 0.25


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC])
def test_a_store_over_a_disk_that_never_worked_serves_from_memory(fault: Fault) -> None:
    world = World()
    with world.store:
        world.files.schedule = lambda _n, what: fault if what in ("write", "open") else None
        for seed in range(8):
            assert world.put(seed) == BLOCKS
            assert world.get(seed) == BLOCKS
        assert not world.store.flush()
        world.store.check()
        world.files.schedule = None
