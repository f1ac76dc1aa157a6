"""Lane: a few named worker threads and three queues of jobs, one per urgency.

Jobs of a more urgent queue always go first. Bytes in flight are bounded: a job that nobody waits
for starts only while the bytes under way stay below the bound; demand is never held back by it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tierkv.core.transfer import Urgency


@dataclass(slots=True)
class Job:
    """A piece of a batch: `run` moves `size_bytes`; it must not raise."""

    batch: int
    size_bytes: int
    run: Callable[[], None]


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
            self._wake.notify(len(jobs))

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
        job = self._next(0)
        while job is not None:
            job.run()
            job = self._next(job.size_bytes)

    def _next(self, done_bytes: int) -> Job | None:
        """Give back a finished job's bytes and take the next job; None when closed and empty."""
        with self._wake:
            self._inflight_bytes -= done_bytes
            while True:
                for urgency, queue in self._queues.items():
                    if queue and self._fits(queue[0], urgency):
                        job = queue.popleft()
                        self._inflight_bytes += job.size_bytes
                        if done_bytes and queue:
                            self._wake.notify()  # what we gave back may be room for two
                        return job
                if self._closed and not any(self._queues.values()):
                    return None
                self._wake.wait()

    def _fits(self, job: Job, urgency: Urgency) -> bool:
        if urgency is Urgency.DEMAND or not self._inflight_bytes or self._closed:
            return True
        return self._inflight_bytes + job.size_bytes <= self._inflight_bytes_max
