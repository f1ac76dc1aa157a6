"""Lane: every job once, the urgent ones first, never more bytes under way than allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.core.transfer import Urgency
from tierkv.transfer.lane import Job, Lane

DEADLINE_S = 10.0


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
