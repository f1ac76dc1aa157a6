"""Breaker: a tier that fails, or hangs, is left alone for a while, so that nobody waits for it.

Closed, everything goes through. After a few operations in a row that failed or took too long it
opens: what would go to the tier is skipped at once, which readers see as a miss, and what lies
there is not spoiled by more failing reads. When the time is over, one operation is let through
(half-open): if that is good the breaker closes, else it opens again for twice as long.

After M. Nygard, Release It!, "Circuit Breaker". Any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import IntEnum

logger = logging.getLogger(__name__)


class State(IntEnum):
    """As it is shown in `Store.snapshot`."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Of one tier. `faults_max` in a row open it; `slow_s` is what counts as a fault as well."""

    def __init__(
        self,
        name: str,
        *,
        faults_max: int = 3,
        slow_s: float = 5.0,
        retry_s: float = 1.0,
        retry_max_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._faults_max = faults_max
        self._slow_s = slow_s
        self._retry_s = (retry_s, retry_max_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._faults = 0
        self._pause = retry_s
        self._opens_at: float | None = None  # when it may be tried again; None while closed
        self._trying = False
        self.skipped = 0

    @property
    def state(self) -> State:
        """Half-open is when the next operation, or one under way, decides."""
        with self._lock:
            if self._opens_at is None:
                return State.CLOSED
            return State.HALF_OPEN if self._clock() >= self._opens_at else State.OPEN

    def begin(self) -> bool:
        """Whether an operation may start; each that does ends with `end`."""
        with self._lock:
            if self._opens_at is None:
                return True
            if self._trying or self._clock() < self._opens_at:
                self.skipped += 1
                return False
            self._trying = True
            return True

    def try_now(self) -> None:
        """Do not wait any longer: somebody asks for it. The next operation decides."""
        with self._lock:
            if self._opens_at is not None:
                self._opens_at = min(self._opens_at, self._clock())

    def end(self, *, is_good: bool, seconds: float) -> None:
        """How an operation ended, and how long it took."""
        is_good = is_good and seconds <= self._slow_s
        if is_good and not self._faults and self._opens_at is None:
            return
        with self._lock:
            if is_good:
                if self._opens_at is not None:
                    logger.warning("breaker closed tier=%s", self._name)
                self._faults, self._opens_at = 0, None
                self._trying, self._pause = False, self._retry_s[0]
                return
            self._faults += 1
            was_trying, self._trying = self._trying, False
            if self._opens_at is not None and not was_trying:
                return  # it began before the breaker opened, and says nothing new
            if was_trying:
                self._pause = min(self._retry_s[1], 2 * self._pause)
            elif self._faults < self._faults_max:
                return
            self._opens_at = self._clock() + self._pause
            logger.warning("breaker open tier=%s seconds=%.0f", self._name, self._pause)
