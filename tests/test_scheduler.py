"""Simulated threads: orders by seed, and what they must find."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType

import pytest

from tierkv.testing.scheduler import PowerLoss, Scheduler, SimulatedCondition, SimulatedLock, Stuck

SEEDS = range(40)


def run(seed: int, *works: Callable[[Scheduler], None]) -> Scheduler:
    """Let each of `works` be a thread, and wait for all."""
    scheduler = Scheduler(random.Random(seed))
    tasks = [
        scheduler.start(lambda work=work: work(scheduler), f"thread {number}")  # type: ignore[misc]
        for number, work in enumerate(works)
    ]
    for task in tasks:
        scheduler.join(task)
    return scheduler


def order_of(seed: int) -> list[str]:
    steps: list[str] = []

    def work(scheduler: Scheduler) -> None:
        for _ in range(5):
            scheduler.pause()
            steps.append(scheduler.current.name)

    run(seed, work, work, work)
    return steps


def test_a_seed_gives_one_order_and_seeds_give_many() -> None:
    assert [order_of(seed) for seed in SEEDS] == [order_of(seed) for seed in SEEDS]
    assert len({tuple(order_of(seed)) for seed in SEEDS}) > len(SEEDS) // 2


def test_an_unguarded_counter_loses_counts_and_a_guarded_one_does_not() -> None:
    def counted(seed: int, *, guarded: bool) -> int:
        count = 0

        def work(scheduler: Scheduler) -> None:
            nonlocal count
            for _ in range(4):
                if guarded:
                    lock.acquire()
                seen = count
                scheduler.pause()
                count = seen + 1
                if guarded:
                    lock.release()

        scheduler = Scheduler(random.Random(seed))
        lock = SimulatedLock(scheduler)
        tasks = [scheduler.start(lambda: work(scheduler), f"{n}") for n in range(3)]
        for task in tasks:
            scheduler.join(task)
        return count

    assert {counted(seed, guarded=True) for seed in SEEDS} == {12}
    assert min(counted(seed, guarded=False) for seed in SEEDS) < 12


def is_stuck(scheduler: Scheduler, works: Mapping[str, Callable[[], object]], words: str) -> bool:
    """Let these threads live; whether they got stuck, saying why."""
    tasks = [scheduler.start(work, name) for name, work in works.items()]
    stuck = ""
    try:
        for task in tasks:
            scheduler.join(task)
    except Stuck as error:
        stuck = str(error)
        scheduler.stop()
    assert not stuck or words in stuck
    return bool(stuck)


def test_two_locks_taken_in_two_orders_are_found_as_stuck() -> None:
    def meets(seed: int) -> bool:
        scheduler = Scheduler(random.Random(seed))
        first, second = SimulatedLock(scheduler), SimulatedLock(scheduler)

        def take(one: SimulatedLock, other: SimulatedLock) -> None:
            with one, other:
                pass

        works = {"ab": partial(take, first, second), "ba": partial(take, second, first)}
        return is_stuck(scheduler, works, "waits for a lock of")

    assert {meets(seed) for seed in SEEDS} == {True, False}


def test_a_notification_that_nobody_waits_for_yet_is_lost() -> None:
    """The bug: to look and then wait, with the lock given back in between."""

    def meets(seed: int) -> bool:
        scheduler = Scheduler(random.Random(seed))
        condition = SimulatedCondition(scheduler)
        is_ready = False

        def waits() -> None:
            with condition:
                seen = is_ready
            if not seen:
                with condition:
                    condition.wait()

        def notifies() -> None:
            nonlocal is_ready
            with condition:
                is_ready = True
                condition.notify_all()

        works = {"waits": waits, "notifies": notifies}
        return is_stuck(scheduler, works, "waits waits for a notification")

    assert {meets(seed) for seed in SEEDS} == {True, False}


def test_one_notification_wakes_one() -> None:
    scheduler = Scheduler(random.Random(1))
    condition = SimulatedCondition(scheduler)
    woken: list[bool] = []

    def waits() -> None:
        with condition:
            woken.append(condition.wait(timeout=5.0))

    tasks = [scheduler.start(waits, f"{n}") for n in range(3)]
    scheduler.sleep(1.0)
    with condition:
        condition.notify()
    for task in tasks:
        scheduler.join(task)
    assert sorted(woken) == [False, False, True]


def test_time_passes_only_when_everybody_waits_for_it() -> None:
    scheduler = run(3, lambda s: s.sleep(1000.0), lambda s: s.sleep(1.0))
    assert 1001.0 <= scheduler.monotonic() < 1002.0


def test_a_wait_with_a_timeout_ends_when_its_time_has_come() -> None:
    scheduler = Scheduler(random.Random(1))
    condition = SimulatedCondition(scheduler)
    with condition:
        before = scheduler.monotonic()
        assert not condition.wait_for(lambda: False, timeout=2.5)
    assert 2.5 <= scheduler.monotonic() - before < 2.6


def test_a_loss_of_power_ends_everybody_and_nobody_does_anything_more() -> None:
    scheduler = Scheduler(random.Random(5))
    lock = SimulatedLock(scheduler)
    after: list[str] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    scheduler.pause()
        finally:
            after.append("began to clean up")
            with lock:
                after.append("cleaned up")

    scheduler.loses_power_at = 50
    task = scheduler.start(work, "worker")
    with pytest.raises(PowerLoss):
        scheduler.join(task)
    scheduler.stop()
    assert after == ["began to clean up"]
    assert task.has_ended
    assert scheduler.errors == []


def test_a_thread_that_dies_is_reported() -> None:
    def work(_scheduler: Scheduler) -> None:
        raise KeyError("why")

    assert run(1, work).errors == ["thread 0 died: KeyError('why')"]


def test_what_never_ends_is_found_as_busy() -> None:
    def work(scheduler: Scheduler) -> None:
        while True:
            scheduler.pause()

    scheduler = Scheduler(random.Random(1), steps_max=500)
    task = scheduler.start(lambda: work(scheduler), "busy")
    with pytest.raises(Stuck, match="still busy after 500 steps"):
        scheduler.join(task)
    scheduler.stop()


def test_misuse_of_a_lock_is_an_error_as_with_real_ones() -> None:
    scheduler = Scheduler(random.Random(1))
    lock, condition = SimulatedLock(scheduler), SimulatedCondition(scheduler)
    with pytest.raises(RuntimeError, match="nobody holds"):
        lock.release()
    with pytest.raises(RuntimeError, match="does not hold"):
        condition.notify()
    with lock, pytest.raises(RuntimeError, match="a lock that it holds"):
        lock.acquire()
    assert not lock.locked()


def test_modules_get_their_own_threads_and_time_back() -> None:
    import threading
    import time

    module = ModuleType("ours")
    module.threading, module.time = threading, time  # type: ignore[attr-defined]
    scheduler = Scheduler(random.Random(1))
    with scheduler.replacing([module]):
        assert isinstance(module.threading.Lock(), SimulatedLock)
        assert module.time.monotonic() == scheduler.monotonic()
        done: list[int] = []
        thread = module.threading.Thread(target=lambda: done.append(1), name="t", daemon=True)
        thread.start()
        thread.join()
        assert done == [1]
    assert module.threading is threading
    assert module.time is time
