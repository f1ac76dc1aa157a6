"""Lane: a few named worker threads and three queues of jobs, one per urgency.

A `PolledLane` has one thread, whose jobs only start something: it asks for all that is under way
whether it is done, and sleeps in between, so that no thread waits inside of a driver.

Jobs of a more urgent queue always go first, in the order in which they came. Bytes in flight are
bounded: a job starts when nothing is under way, or when it keeps what is within the bound. So with
a small bound requests end one after the other rather than all at once.

A lane may be *behind* another one, to which it gives way: while that one is busy it has one job
under way, as what a device has begun cannot be overtaken.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Final, NamedTuple, TypeAlias

from tierkv.core.transfer import Urgency
from tierkv.transfer.streams import Event

logger = logging.getLogger(__name__)

#: How long the polled lane sleeps: from the first, doubled while nothing ends, up to the second.
_POLL_S: Final = (50e-6, 400e-6)


class Started(NamedTuple):
    """Something a device does: `then(ok)` is called once when `event` is done, or failed."""

    event: Event
    then: Callable[[bool], object]


#: A reader whose request ended soon has the next: until then its lane counts as busy.
_BUSY_NS: Final = 10_000_000

Follow: TypeAlias = Callable[[], object]


@dataclass(slots=True)
class Job:
    """A piece of a batch: `run` moves `size_bytes`; it must not raise.

    What it gives back is called next, when the bytes are no longer in flight. On a polled lane it
    may give back `Started`; then they are in flight until its event is done.
    """

    batch: int
    size_bytes: int
    run: Callable[[], Follow | Started | None]


class Held:
    """A condition's lock, held: given back without an allocation, as a condition's own exit is not.

    Without memory that exit would raise, and the lock would stay taken for ever.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self, condition: threading.Condition) -> None:
        self._acquire = condition.acquire
        self._release = condition.release

    def __enter__(self) -> None:
        self._acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()


class Lane:
    """Worker threads over the queues. Any thread may call; `run` is called on the workers."""

    def __init__(
        self,
        name: str,
        *,
        threads: int,
        inflight_bytes_max: int,
        on_failure: Callable[[], None] = lambda: None,
        behind: Lane | None = None,
    ) -> None:
        self._on_failure = on_failure
        self._behind = behind
        self._ended_ns = 0
        self._queues: dict[Urgency, deque[Job]] = {urgency: deque() for urgency in Urgency}
        self._wake = threading.Condition()
        self._lock = Held(self._wake)
        self._inflight_bytes_max = inflight_bytes_max
        self._inflight_bytes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"tierkv-{name}-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: list[Job], urgency: Urgency) -> None:
        """Queue the jobs of one batch, in order."""
        with self._lock:
            self._queues[urgency].extend(jobs)
            self._wake.notify()

    def promote(self, batch: int, urgency: Urgency) -> None:
        """Move what is still queued of a batch to another urgency."""
        with self._lock:
            moved: list[Job] = []
            for other, queue in self._queues.items():
                if other != urgency:
                    moved += [job for job in queue if job.batch == batch]
                    self._queues[other] = deque(job for job in queue if job.batch != batch)
            self._queues[urgency].extend(moved)
            self._wake.notify(len(moved))

    @property
    def is_busy(self) -> bool:
        """Whether something is under way, or just was; needs no lock."""
        return bool(self._inflight_bytes) or time.monotonic_ns() - self._ended_ns < _BUSY_NS

    def close(self) -> None:
        """Finish what is queued, then end the threads."""
        with self._lock:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """Work until closed. Where not even bookkeeping finds memory, say so, and go on."""
        is_lost = False
        while True:
            try:
                if is_lost:
                    time.sleep(_POLL_S[1])
                    self._on_failure()
                    is_lost = False
                return self._work()
            except Exception:  # noqa: BLE001 nobody else would hear of it, and all would wait
                is_lost = True

    def _work(self) -> None:
        while (job := self._next()) is not None:
            then = job.run()
            assert not isinstance(then, Started), "only a polled lane can wait for events"
            self._end(job, then)

    def _end(self, job: Job, then: Follow | None) -> None:
        """Its bytes are no longer in flight; go on with what it gave back."""
        with self._lock:
            self._inflight_bytes -= job.size_bytes
            self._ended_ns = time.monotonic_ns()
            if then is not None:
                self._wake.notify()  # what we gave back may be room for another
        if then is not None:
            then()

    def _next(self, wait_s: float | None = None) -> Job | None:
        """Take the next job that fits, waiting for one; None when closed and empty.

        With `wait_s` it waits no longer than that, and None may mean that the time is over.
        """
        with self._lock:
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
                if wait_s == 0:
                    return None
                self._wake.wait(wait_s)
                wait_s = None if wait_s is None else 0

    def _fits(self, job: Job) -> bool:
        in_flight = self._inflight_bytes
        if not in_flight or self._closed:
            return True
        if self._behind is not None and self._behind.is_busy:
            return False
        return in_flight + job.size_bytes <= self._inflight_bytes_max


class PolledLane(Lane):
    """One thread that starts jobs and asks for what is under way; see the module."""

    def __init__(
        self,
        name: str,
        *,
        inflight_bytes_max: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._under_way: list[tuple[Job, Started]] = []
        super().__init__(
            name, threads=1, inflight_bytes_max=inflight_bytes_max, on_failure=on_failure
        )

    def _work(self) -> None:
        pause, most = _POLL_S
        sleep = pause
        while True:
            job = self._next(sleep if self._under_way else None)
            if job is not None:
                then = job.run()
                if isinstance(then, Started):
                    self._under_way.append((job, then))
                    sleep = pause
                else:
                    self._end(job, then)
            elif not self._under_way:
                return  # closed, and all is done
            elif self._closed:
                time.sleep(sleep)  # nothing comes any more: `_next` does not wait
            sleep = pause if self._poll() else min(most, 2 * sleep)

    def _poll(self) -> bool:
        """End what is done; whether something was."""
        left: list[tuple[Job, Started]] = []
        done: list[tuple[Job, Follow]] = []
        for job, started in self._under_way:
            try:
                ended, ok = started.event.query(), True
            except Exception:  # the device is lost: what was under way did not arrive
                logger.exception("transfer failed on the device")
                ended, ok = True, False
            if ended:
                done.append((job, partial(started.then, ok)))
            else:
                left.append((job, started))
        self._under_way = left
        for job, then in done:
            self._end(job, then)
        return bool(done)
