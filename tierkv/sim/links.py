"""Links: what carries bytes between two tiers in one direction, one job at a time.

A job is so many equal moves. The most urgent job goes first, and one that is more urgent takes the
link over where the current move ends; what was passed over goes on where it stopped. Each time a
job takes the link it waits for the latency once: moves of one job are in flight together.

Times are whole nanoseconds, so that the order of what happens is the same on every machine.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

from tierkv.core.transfer import Urgency
from tierkv.sim.costs import Link

SECOND_NS: Final = 1_000_000_000


@dataclass(slots=True, eq=False)
class Job:
    """Moves to be made; `done` of them are."""

    number: int
    moves: int
    move_bytes: int
    urgency: Urgency
    done: int = 0
    cancelled: bool = False


class Channel:
    """One direction of a link. Whoever drives it asks `ends_at` and calls `end` at that time."""

    def __init__(self, link: Link) -> None:
        self._latency_ns = round(link.latency_seconds * SECOND_NS)
        self._ns_per_byte = SECOND_NS / link.bytes_per_second if link.bytes_per_second else 0.0
        self._waiting: list[tuple[Urgency, int, Job]] = []
        self._waiting_ns = dict.fromkeys(Urgency, 0)
        self._current: Job | None = None
        self._began_ns = 0  # when the current job took the link, its latency not counted
        self._stop_at = 0  # how many moves are done when it leaves the link
        self.ends_at: int | None = None
        self.watched_at: int | None = None  # when whoever drives it comes back
        self.moved_bytes = 0
        self.busy_ns = 0

    def submit(self, job: Job, now_ns: int) -> None:
        """Take a job."""
        self._push(job)
        self._settle(now_ns)

    def hurry(self, job: Job, urgency: Urgency, now_ns: int) -> None:
        """A job is more urgent now."""
        if job.urgency > urgency:
            before, job.urgency = job.urgency, urgency
            if job is not self._current:
                self._waiting_ns[before] -= self._ns(job)
                self._waiting_ns[urgency] += self._ns(job)
                self._waiting = [(j.urgency, j.number, j) for _, _, j in self._waiting]
                heapq.heapify(self._waiting)
            self._settle(now_ns)

    def cancel(self, job: Job, now_ns: int) -> bool:
        """Call off the moves that have not begun; True if the job ended by this."""
        job.cancelled = True
        if job is self._current:
            self._stop_after_current_move(job, now_ns)
            return False
        self._waiting = [entry for entry in self._waiting if entry[2] is not job]
        heapq.heapify(self._waiting)
        self._waiting_ns[job.urgency] -= self._ns(job)
        return True

    def end(self, now_ns: int) -> Job | None:
        """The time `ends_at` has come: the job that has ended, if the current one has."""
        job = self._current
        assert job is not None
        moved = self._stop_at - job.done
        self.moved_bytes += moved * job.move_bytes
        self.busy_ns += now_ns - self._began_ns + self._latency_ns
        job.done = self._stop_at
        self._current = self.ends_at = None
        ended = job.done == job.moves or job.cancelled
        if not ended:
            self._push(job)
        self._settle(now_ns)
        return job if ended else None

    def expected_ns(self, size_bytes: int, now_ns: int) -> int:
        """How long a demand for so many bytes would take, from now on."""
        ahead = self._waiting_ns[Urgency.DEMAND]
        current = self._current
        if current is not None and self.ends_at is not None:
            left = self.ends_at - now_ns
            if current.urgency is not Urgency.DEMAND:
                left = min(left, round(current.move_bytes * self._ns_per_byte))
            ahead += left
        return ahead + self._latency_ns + round(size_bytes * self._ns_per_byte)

    def _ns(self, job: Job) -> int:
        return round((job.moves - job.done) * job.move_bytes * self._ns_per_byte)

    def _push(self, job: Job) -> None:
        heapq.heappush(self._waiting, (job.urgency, job.number, job))
        self._waiting_ns[job.urgency] += self._ns(job)

    def _settle(self, now_ns: int) -> None:
        """Give the idle link to the first job, or have the current one leave for it soon."""
        if not self._waiting:
            return
        current = self._current
        if current is not None:
            if self._waiting[0][0] < current.urgency:
                self._stop_after_current_move(current, now_ns)
            return
        _, _, job = heapq.heappop(self._waiting)
        self._waiting_ns[job.urgency] -= self._ns(job)
        self._current, self._stop_at = job, job.moves
        self._began_ns = now_ns + self._latency_ns
        self.ends_at = self._began_ns + self._ns(job)

    def _stop_after_current_move(self, job: Job, now_ns: int) -> None:
        move_ns = job.move_bytes * self._ns_per_byte
        elapsed = max(0, now_ns - self._began_ns)
        begun = int(elapsed / move_ns) + 1 if move_ns else job.moves
        self._stop_at = min(self._stop_at, job.done + begun)
        self.ends_at = max(now_ns, self._began_ns + round((self._stop_at - job.done) * move_ns))
