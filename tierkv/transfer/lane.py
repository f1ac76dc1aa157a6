"""Lane: a few named worker threads and three queues of jobs, one per urgency.

Jobs of a more urgent queue always go first, in the order in which they came. Bytes in flight are
bounded: a job starts when nothing is under way, or when it keeps what is within the bound. So with
a small bound requests end one after the other rather than all at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tierkv.core.transfer import Urgency


@dataclass(slots=True)
class Job:
    """A piece of a batch: `run` moves `size_bytes`; it must not raise.

    What it gives back is called next, when the bytes are no longer in flight.
    """

    batch: int
    size_bytes: int
    run: Callable[[], Callable[[], object] | None]


class Lane:
    """Worker threads over the queues. Any thread may call; `run` is called on the workers."""

    def __init__(self, name: str, *, threads: int, inflight_bytes_max: int) -> None:
        self._queues: dict[Urgency, deque[Job]] = {urgency: deque() for urgency in Urgency}
        self._wake = threading.Condition()
        self._inflight_bytes_max = inflight_bytes_max
        self._inflight_bytes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"tierkv-{name}-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: list[Job], urgency: Urgency) -> None:
        """Queue the jobs of one batch, in order."""
        with self._wake:
            self._queues[urgency].extend(jobs)
            self._wake.notify()

    def promote(self, batch: int, urgency: Urgency) -> None:
        """Move what is still queued of a batch to another urgency."""
        with self._wake:
            moved: list[Job] = []
            for other, queue in self._queues.items():
                if other != urgency:
                    moved += [job for job in queue if job.batch == batch]
                    self._queues[other] = deque(job for job in queue if job.batch != batch)
            self._queues[urgency].extend(moved)
            self._wake.notify(len(moved))

    def close(self) -> None:
        """Finish what is queued, then end the threads."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            then = job.run()
            with self._wake:
                self._inflight_bytes -= job.size_bytes
                if then is not None:
                    self._wake.notify()  # what we gave back may be room for another
            if then is not None:
                then()

    def _next(self) -> Job | None:
        """Take the next job that fits, waiting for one; None when closed and empty."""
        with self._wake:
            while True:
                queue = next((queue for queue in self._queues.values() if queue), None)
                if queue and self._fits(queue[0]):
                    job = queue.popleft()
                    self._inflight_bytes += job.size_bytes
                    if any(self._queues.values()):
                        self._wake.notify()  # one wakes the next, as far as there is room
                    return job
                if self._closed and queue is None:
                    return None
                self._wake.wait()

    def _fits(self, job: Job) -> bool:
        in_flight = self._inflight_bytes
        if not in_flight or self._closed:
            return True
        return in_flight + job.size_bytes <= self._inflight_bytes_max
