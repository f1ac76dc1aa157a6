"""Breaker: a tier that fails, or hangs, is left alone for a while, so that nobody waits for it.

Closed, everything goes through. After a few operations in a row that failed or took too long it
opens: what would go to the tier is skipped at once, which readers see as a miss, and what lies
there is not spoiled by more failing reads. When the time is over, one operation is let through
(half-open): if that is good the breaker closes, else it opens again for twice as long.

Operations overlap, and one that hung ends long after others. So each is of a *round*: a new round
begins when the breaker opens and when it closes, and an operation of an earlier one says nothing.

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
        self._round = 1
        self.skipped = 0
        #: Called after each change of state, by the thread that made it and without the lock.
        self.on_change: Callable[[], object] | None = None

    @property
    def state(self) -> State:
        """Half-open is when the next operation, or one under way, decides."""
        with self._lock:
            if self._opens_at is None:
                return State.CLOSED
            return State.HALF_OPEN if self._clock() >= self._opens_at else State.OPEN

    def begin(self) -> int | None:
        """The round of an operation that may start, which ends with `end`; None if it may not."""
        # The round is read first. If the breaker closes or opens between the two reads, the round
        # is an earlier one, and what the operation says later does not count.
        number = self._round
        return number if self._opens_at is None else self._begin_trial()

    def _begin_trial(self) -> int | None:
        """As `begin`, of a breaker that was just seen open."""
        with self._lock:
            if self._opens_at is None:
                return self._round
            if self._trying or self._clock() < self._opens_at:
                self.skipped += 1
                return None
            self._trying = True
            number = self._round
        self._tell()
        return number

    def try_now(self) -> None:
        """Do not wait any longer: somebody asks for it. The next operation decides."""
        with self._lock:
            if self._opens_at is not None:
                self._opens_at = min(self._opens_at, self._clock())

    def end(self, number: int, *, is_good: bool, seconds: float) -> None:
        """How the operation of round `number` ended, and how long it took."""
        is_good = is_good and seconds <= self._slow_s
        if is_good and not self._faults and self._opens_at is None:
            return
        with self._lock:
            if number != self._round:
                return  # it began before the breaker opened or closed, and says nothing new
            is_changed = self._close() if is_good else self._count_fault()
        if is_changed:
            self._tell()

    def _close(self) -> bool:
        """Something is good; whether that closes the breaker."""
        self._faults = 0
        if self._opens_at is None:
            return False
        self._opens_at, self._trying, self._pause = None, False, self._retry_s[0]
        self._round += 1
        logger.warning("breaker closed tier=%s", self._name)
        return True

    def _count_fault(self) -> bool:
        """Something failed; whether that opens the breaker."""
        if self._trying:
            self._pause = min(self._retry_s[1], 2 * self._pause)
        else:
            self._faults += 1
            if self._faults < self._faults_max:
                return False
        self._opens_at, self._trying = self._clock() + self._pause, False
        self._round += 1
        logger.warning("breaker open tier=%s seconds=%.0f", self._name, self._pause)
        return True

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()
