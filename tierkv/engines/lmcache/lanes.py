"""Lanes: tasks on threads of their own, with results that are asked for and an event for each end.

LMCache never waits for an adapter: it submits a task, is told by a file descriptor that some have
ended, and takes the results. A task never raises: what it raises is logged, and its result is the
one that says that nothing was done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

R = TypeVar("R")


class Notifier(Protocol):
    """What is used of LMCache's `EventNotifier`."""

    def fileno(self) -> int:
        """Readable once notified."""

    def notify(self) -> None:
        """Make it readable."""

    def close(self) -> None:
        """Let the descriptor go."""


class Lane(Generic[R]):
    """Tasks of one kind. Any thread; it owns `notifier`."""

    def __init__(self, name: str, notifier: Notifier, *, threads: int = 1) -> None:
        self._notifier = notifier
        self._pool = ThreadPoolExecutor(threads, name)
        self._mutex = threading.Lock()
        self._next_task = 0
        self._results: dict[int, R] = {}

    def fileno(self) -> int:
        """Readable when a task has ended."""
        return self._notifier.fileno()

    def submit(self, work: Callable[[], R], failed: R) -> int:
        """Have `work` done; gives the task's number. `failed` is its result if it raises."""
        task = self._number()
        self._start(lambda: self._end(task, _safely(work, failed)))
        return task

    def submit_each(
        self, works: Sequence[Callable[[], bool]], collect: Callable[[list[bool]], R]
    ) -> int:
        """Have all of `works` done, as many at once as there are threads, as one task.

        Its result is made of theirs by `collect`, which must not raise.
        """
        task, done = self._number(), [False] * len(works)
        left = len(works)

        def run(index: int) -> None:
            nonlocal left
            done[index] = _safely(works[index], False)
            with self._mutex:
                left -= 1
                is_last = not left
            if is_last:
                self._end(task, collect(done))

        if not works:
            self._end(task, collect(done))
        for index in range(len(works)):
            self._start(lambda index=index: run(index))  # type: ignore[misc]
        return task

    def take(self, task: int) -> R | None:
        """A task's result, once; None before it has ended."""
        with self._mutex:
            return self._results.pop(task, None)

    def take_all(self) -> dict[int, R]:
        """The results of all that have ended since this was last asked."""
        with self._mutex:
            results, self._results = self._results, {}
        return results

    def stop(self) -> None:
        """Let what is under way end; what has not begun never does."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Stop, and close the descriptor."""
        self.stop()
        self._notifier.close()

    def _number(self) -> int:
        with self._mutex:
            self._next_task += 1
            return self._next_task

    def _start(self, job: Callable[[], None]) -> None:
        try:
            self._pool.submit(job)
        except RuntimeError:  # stopped: nobody waits for it any more
            logger.debug("a task came after the end")

    def _end(self, task: int, result: R) -> None:
        with self._mutex:
            self._results[task] = result
        self._notifier.notify()


def _safely(work: Callable[[], R], failed: R) -> R:
    try:
        return work()
    except Exception:  # whatever it was, the server goes on without these chunks
        logger.exception("a task failed")
        return failed
