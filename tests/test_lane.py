"""Lane: every job once, the urgent ones first, never more bytes under way than allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.core.transfer import Urgency
from tierkv.transfer.lane import Job, Lane, PolledLane, Started

DEADLINE_S = 10.0
DEMAND = Urgency.DEMAND


class Watched:
    """Jobs that note when they run, and what was under way then."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.in_flight: dict[int, int] = {}
        self.most: list[tuple[int, int]] = []  # (jobs with bytes, bytes) that each job saw
        self.ran: list[int] = []
        self.after: list[int] = []

    def job(self, number: int, size_bytes: int, *, has_more: bool = False) -> Job:
        def run() -> Callable[[], object] | None:
            with self.lock:
                self.in_flight[number] = size_bytes
                sizes = [size for size in self.in_flight.values() if size]
                self.most.append((len(sizes), sum(sizes)))
                self.ran.append(number)
            time.sleep(0.0002)
            with self.lock:
                del self.in_flight[number]
            return (lambda: self.after.append(number)) if has_more else None

        return Job(number, size_bytes, run)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=24),
    threads=st.integers(1, 4),
    bytes_max=st.integers(0, 16),
    urgencies=st.lists(st.sampled_from(Urgency), min_size=24, max_size=24),
    split=st.integers(0, 24),
)
def test_every_job_runs_once_within_the_bound(
    sizes: list[int], threads: int, bytes_max: int, urgencies: list[Urgency], split: int
) -> None:
    watched = Watched()
    lane = Lane("test", threads=threads, inflight_bytes_max=bytes_max)
    for number, size in enumerate(sizes):
        lane.submit([watched.job(number, size, has_more=number % 2 == 0)], urgencies[number])
        if number == split:
            lane.promote(number // 2, Urgency.DEMAND)
    ends = time.monotonic() + DEADLINE_S
    while len(watched.ran) < len(sizes):
        assert time.monotonic() < ends, f"{len(watched.ran)} of {len(sizes)} ran"
        time.sleep(0.0002)
    lane.close()

    assert sorted(watched.ran) == list(range(len(sizes)))
    assert sorted(watched.after) == list(range(0, len(sizes), 2))
    assert all(size <= bytes_max for jobs, size in watched.most if jobs > 1)


def test_a_lane_behind_a_busy_one_has_one_job_under_way_and_then_as_many_as_fit() -> None:
    gate, before, watched = threading.Event(), threading.Event(), Watched()
    first = Lane("first", threads=1, inflight_bytes_max=1)
    lane = Lane("second", threads=4, inflight_bytes_max=100, behind=first)
    assert not first.is_busy
    first.submit([Job(0, 1, lambda: before.set() or (gate.wait(DEADLINE_S) and None))], DEMAND)
    assert before.wait(DEADLINE_S)
    lane.submit([watched.job(n, 10) for n in range(20)], Urgency.DEMOTE)
    wait_for(lambda: len(watched.ran) == 20)
    assert first.is_busy
    assert max(jobs for jobs, _ in watched.most) == 1

    gate.set()
    wait_for(lambda: not first.is_busy)
    together = threading.Barrier(4)  # breaks unless four are under way at the same time
    lane.submit([Job(n, 10, lambda: together.wait(DEADLINE_S) and None) for n in range(4)], DEMAND)
    first.close()
    lane.close()
    assert not together.broken


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_demand_overtakes_what_is_queued() -> None:
    watched = Watched()
    gate = threading.Event()
    lane = Lane("test", threads=1, inflight_bytes_max=100)
    lane.submit([Job(99, 1, lambda: gate.wait(DEADLINE_S) and None)], Urgency.DEMAND)
    lane.submit([watched.job(n, 1) for n in (1, 2, 3)], Urgency.DEMOTE)
    lane.submit([watched.job(4, 1)], Urgency.PREFETCH)
    lane.submit([watched.job(5, 1)], Urgency.DEMAND)
    lane.promote(3, Urgency.DEMAND)
    gate.set()
    lane.close()

    assert watched.ran == [5, 3, 4, 1, 2]


def test_closing_ends_jobs_that_did_not_fit() -> None:
    watched = Watched()
    lane = Lane("test", threads=3, inflight_bytes_max=1)
    lane.submit([watched.job(n, 5) for n in range(30)], Urgency.DEMOTE)
    lane.close()

    assert sorted(watched.ran) == list(range(30))


class Device:
    """What is under way on a device: ends after some questions, in any order, or is lost."""

    def __init__(self) -> None:
        self.in_flight: dict[int, int] = {}
        self.most: list[tuple[int, int]] = []
        self.ended: dict[int, bool] = {}

    def job(self, number: int, size_bytes: int, questions: int, *, is_lost: bool) -> Job:
        device = self

        class Event:
            left = questions

            def query(self) -> bool:
                self.left -= 1
                if is_lost and self.left <= 0:
                    raise RuntimeError("lost, as planted")
                return self.left <= 0

            def synchronize(self) -> None:
                raise AssertionError("nobody may wait inside of the driver")

        def end(ok: bool) -> None:
            device.ended[number] = ok

        def run() -> Started:
            device.in_flight[number] = size_bytes
            left = [size for n, size in device.in_flight.items() if n not in device.ended]
            sizes = [size for size in left if size]
            device.most.append((len(sizes), sum(sizes)))
            return Started(Event(), end)

        return Job(number, size_bytes, run)


@settings(deadline=None, max_examples=60)
@given(
    jobs=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 5), st.booleans()), min_size=1, max_size=24
    ),
    bytes_max=st.integers(1, 16),
    urgencies=st.lists(st.sampled_from(Urgency), min_size=24, max_size=24),
    closes_at_once=st.booleans(),
)
def test_what_is_started_ends_once_and_within_the_bound(
    jobs: list[tuple[int, int, bool]],
    bytes_max: int,
    urgencies: list[Urgency],
    closes_at_once: bool,
) -> None:
    device = Device()
    lane = PolledLane("test", inflight_bytes_max=bytes_max)
    for number, (size, questions, is_lost) in enumerate(jobs):
        made = device.job(number, size, questions, is_lost=is_lost)
        lane.submit([made], urgencies[number])
    ends = time.monotonic() + DEADLINE_S
    while not closes_at_once and len(device.ended) < len(jobs):
        assert time.monotonic() < ends
        time.sleep(0.0002)
    lane.close()

    assert device.ended == {number: not job[2] for number, job in enumerate(jobs)}
    if not closes_at_once:  # closing lets go of the bound
        assert all(size <= bytes_max for count, size in device.most if count > 1)


def test_a_polled_lane_takes_the_urgent_first_and_plain_jobs_as_well() -> None:
    order: list[int] = []
    gate = threading.Event()
    lane = PolledLane("test", inflight_bytes_max=100)
    lane.submit([Job(0, 1, lambda: gate.wait(DEADLINE_S) and None)], Urgency.DEMAND)

    def plain(number: int) -> Job:
        return Job(number, 1, lambda: lambda: order.append(number))

    lane.submit([plain(1)], Urgency.DEMOTE)
    lane.submit([plain(2)], Urgency.PREFETCH)
    lane.submit([plain(3)], Urgency.DEMAND)
    gate.set()
    lane.close()

    assert order == [3, 2, 1]
