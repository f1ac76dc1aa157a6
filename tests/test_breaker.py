"""The breaker: a disk that fails or hangs is left alone, and taken back when it is well."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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


def begun(breaker: Breaker) -> int:
    number = breaker.begin()
    assert number is not None
    return number


def operate(breaker: Breaker, *, is_good: bool, seconds: float = 0, times: int = 1) -> None:
    for _ in range(times):
        breaker.end(begun(breaker), is_good=is_good, seconds=seconds)


def fail(breaker: Breaker, times: int = 1) -> None:
    operate(breaker, is_good=False, times=times)


def test_faults_in_a_row_open_it_and_one_between_them_does_not() -> None:
    breaker = breaker_at(Clock())
    fail(breaker, 2)
    operate(breaker, is_good=True)
    fail(breaker, 2)
    assert breaker.state is State.CLOSED
    fail(breaker)
    assert breaker.state is State.OPEN
    assert breaker.begin() is None
    assert breaker.skipped == 1


def test_what_takes_too_long_is_a_fault() -> None:
    breaker = breaker_at(Clock())
    operate(breaker, is_good=True, seconds=5.1, times=3)
    assert breaker.state is State.OPEN


def test_one_operation_is_tried_when_the_time_is_over_and_decides() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    fail(breaker, 3)
    for pause in (1, 2, 4, 8, 8):
        clock.now += pause - 0.01
        assert breaker.begin() is None
        clock.now += 0.02
        assert breaker.state is State.HALF_OPEN
        trial = begun(breaker)
        assert breaker.begin() is None, "one at a time"
        breaker.end(trial, is_good=False, seconds=0)
        assert breaker.state is State.OPEN
    clock.now += 9
    operate(breaker, is_good=True)
    assert breaker.state is State.CLOSED
    fail(breaker, 2)
    assert breaker.state is State.CLOSED
    fail(breaker)
    clock.now += 1.01
    assert breaker.begin(), "the first pause again"


def test_what_began_before_it_opened_does_not_make_the_pause_longer() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    for number in [begun(breaker) for _ in range(8)]:
        breaker.end(number, is_good=False, seconds=0)
    clock.now = 1.01
    assert breaker.begin()


@pytest.mark.parametrize("is_good", [False, True])
def test_what_began_before_it_opened_does_not_end_the_trial(is_good: bool) -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    late = begun(breaker)
    fail(breaker, 3)
    clock.now = 1.01
    trial = begun(breaker)
    breaker.end(late, is_good=is_good, seconds=0)
    assert breaker.state is State.HALF_OPEN
    assert breaker.begin() is None, "the trial is still under way"
    breaker.end(trial, is_good=True, seconds=0)
    assert breaker.state is State.CLOSED


def test_what_began_before_it_opened_does_not_count_after_it_closed() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    late = [begun(breaker) for _ in range(3)]
    fail(breaker, 3)
    clock.now = 1.01
    operate(breaker, is_good=True)
    for number in late:
        breaker.end(number, is_good=False, seconds=0)
    assert breaker.state is State.CLOSED


def test_each_change_of_state_is_told_once_and_after_it_happened() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    told: list[State] = []
    breaker.on_change = lambda: told.append(breaker.state)
    fail(breaker, 3)
    clock.now = 1.01
    fail(breaker)
    clock.now = 4
    operate(breaker, is_good=True, times=2)
    closed, half, opened = State
    assert told == [opened, half, opened, half, closed]


def test_threads_that_end_in_any_order_never_leave_it_waiting_for_a_trial_that_is_over() -> None:
    breaker = Breaker("cold", faults_max=2, retry_s=0.001, retry_max_s=0.002)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            number = breaker.begin()
            time.sleep(0.001 * rng.random())
            if number is not None:
                breaker.end(number, is_good=rng.random() < 0.5, seconds=0)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = time.monotonic() + 10
    while breaker.state is not State.CLOSED:
        assert time.monotonic() < ends
        time.sleep(0.001)
        number = breaker.begin()
        if number is not None:
            breaker.end(number, is_good=True, seconds=0)


class Overlapping(RuleBasedStateMachine):
    """Operations that begin and end in any order, against a model in rounds."""

    FAULTS_MAX = 3
    PAUSES = (1.0, 8.0)

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = breaker_at(self.clock)
        self.current: list[int] = []  # that began while it was closed, as now
        self.stale: list[int] = []
        self.trial: int | None = None
        self.faults = 0
        self.pause = self.PAUSES[0]
        self.tried_at: float | None = None

    @property
    def expected(self) -> State:
        if self.tried_at is None:
            return State.CLOSED
        return State.HALF_OPEN if self.clock.now >= self.tried_at else State.OPEN

    def open(self) -> None:
        self.tried_at = self.clock.now + self.pause
        self.stale += self.current
        self.current, self.trial = [], None

    @rule()
    def begin(self) -> None:
        skipped = self.breaker.skipped
        number = self.breaker.begin()
        if self.tried_at is None:
            assert number is not None
            self.current.append(number)
        elif self.expected is State.HALF_OPEN and self.trial is None:
            assert number is not None, "a trial is due"
            self.trial = number
        else:
            assert number is None, "it is left alone, or a trial is under way"
            skipped += 1
        assert self.breaker.skipped == skipped

    @precondition(lambda self: self.current)
    @rule(data=st.data(), is_good=st.booleans(), seconds=st.sampled_from([0, 5, 5.01]))
    def end_current(self, data: st.DataObject, is_good: bool, seconds: float) -> None:
        number = self.current.pop(data.draw(st.integers(0, len(self.current) - 1)))
        self.breaker.end(number, is_good=is_good, seconds=seconds)
        self.faults = 0 if is_good and seconds <= 5 else self.faults + 1
        if self.faults == self.FAULTS_MAX:
            self.open()

    @precondition(lambda self: self.stale)
    @rule(data=st.data(), is_good=st.booleans())
    def end_stale(self, data: st.DataObject, is_good: bool) -> None:
        number = self.stale.pop(data.draw(st.integers(0, len(self.stale) - 1)))
        self.breaker.end(number, is_good=is_good, seconds=0)  # the model stays as it is

    @precondition(lambda self: self.trial is not None)
    @rule(is_good=st.booleans(), seconds=st.sampled_from([0, 5.01]))
    def end_trial(self, is_good: bool, seconds: float) -> None:
        assert self.trial is not None
        self.breaker.end(self.trial, is_good=is_good, seconds=seconds)
        if is_good and seconds <= 5:
            self.faults, self.pause = 0, self.PAUSES[0]
            self.trial, self.tried_at = None, None
        else:
            self.pause = min(self.PAUSES[1], 2 * self.pause)
            self.open()

    @rule(seconds=st.sampled_from([0.125, 0.875, 1, 3, 8]))  # sums are exact
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def try_now(self) -> None:
        self.breaker.try_now()
        if self.tried_at is not None:
            self.tried_at = min(self.tried_at, self.clock.now)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        assert self.breaker.state is self.expected
        if self.tried_at is not None:
            assert self.tried_at - self.clock.now <= self.PAUSES[1]


TestOverlapping = Overlapping.TestCase
TestOverlapping.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


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
