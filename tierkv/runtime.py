"""Runtime: the loop between the planner and the transfer engine, and the lock that guards it.

An event goes to the planner, its transfers go to the engine, what ended comes back as an event.
Every method that changes something is called with `lock` held; waiting is done without it. No I/O
and no copy of KV bytes happens under the lock.

An event that raises half way (no memory, a bug) leaves tables that may say anything, a wrong place
for a block too. So the runtime gives up then: from there on every call of the store is a miss, and
`GaveUp` ends in it, until the store is closed and opened again. What was durable is found then.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from tierkv.core.errors import ConfigError, GaveUp, StoreClosed, TierKVError
from tierkv.core.transfer import Transfer, Urgency
from tierkv.plan import events as ev
from tierkv.plan.event_log import entry_line, head_line
from tierkv.plan.planner import Planner
from tierkv.plan.spec import PlanSpec
from tierkv.transfer.engine import TransferEngine

_LOG_LINES_MAX: Final = 4096

logger = logging.getLogger(__name__)

#: How Python and numpy say that there is no memory: not all of their code names it.
_NO_MEMORY: Final = (MemoryError, SystemError)

#: Instructions that the calling method carries out itself.
_FOR_CALLERS: Final = frozenset({ev.Fill, ev.Grant, ev.Short, ev.Erase})


class Runtime:
    """One planner, one engine, one lock. Any thread."""

    def __init__(
        self, spec: PlanSpec, engine: TransferEngine, *, demand_s: float, log: Path | None
    ) -> None:
        self.planner = Planner(spec)
        self.engine = engine
        self.lock = threading.Lock()
        self.is_closed = False
        self.gave_up = False
        self.guard = _Guard(self)
        self._demand_ns = int(demand_s * 1e9)
        self._log_path = log
        self._log: list[bytes] | None = None
        if log is not None:
            _begin_log(log, head_line(spec))
            self._log = []

    def handle(self, event: ev.AnyEvent) -> list[ev.AnyInstruction]:
        """One event to the planner, its transfers to the engine. Call with the lock held."""
        self._expect_usable()
        try:
            return self._handle(event)
        except TierKVError:
            raise  # misuse, and nothing was changed
        except BaseException:
            self.gave_up = True
            raise

    def _handle(self, event: ev.AnyEvent) -> list[ev.AnyInstruction]:
        now = time.monotonic_ns()
        out = self.planner.handle(event, now)
        if self._log is not None:
            self._log.append(entry_line(now, event, out))
        for item in out:
            if type(item) in _FOR_CALLERS:
                continue
            if isinstance(item, Transfer):
                is_demand = item.urgency is Urgency.DEMAND
                deadline = now + self._demand_ns if is_demand else None
                self.engine.submit(item, deadline_ns=deadline)
            elif isinstance(item, ev.Raise):
                self.engine.promote(item.transfer, item.urgency)
            elif isinstance(item, ev.Cancel):
                self.engine.cancel(item.transfer)
        return out

    def pump(self) -> None:
        """Feed ended transfers to the planner. Call with the lock held."""
        self._expect_usable()
        if not self.engine.has_results:
            return
        try:
            for result in self.engine.poll():
                self._handle(ev.TransferDone(result.transfer, result.outcomes))
        except BaseException:
            self.gave_up = True
            raise
        self.engine.wake()

    def _expect_usable(self) -> None:
        if self.is_closed:
            raise StoreClosed("the store is closed")
        if self.gave_up or self.engine.has_failed:
            self.gave_up = True
            raise GaveUp("an event was left half done; cure: close the store and open it again")

    def wait(self, transfers: Sequence[int], deadline: float) -> bool:
        """Until these transfers have ended and the planner knows; False at the deadline."""
        flights = self.planner.movement.flights
        while any(number in flights for number in transfers):
            # Another thread may take our results in: then `flights` shows it.
            if not self.engine.wait(
                deadline - time.monotonic(),
                until=lambda: not any(number in flights for number in transfers),
            ):
                return False
            with self.lock:
                self.pump()
        return True

    def wait_for_room(self, ended: int, deadline: float) -> bool:
        """Until more than `ended` transfers have ended; False if none will, or at the deadline."""
        if not self.engine.busy:
            return self.engine.ended != ended
        return self.engine.wait(
            deadline - time.monotonic(), until=lambda: self.engine.ended != ended
        )

    def write_log(self, *, force: bool = False) -> None:
        """Append what was recorded to the log's file. Call without the lock."""
        if self._log_path is None or self._log is None:
            return
        if force or len(self._log) > _LOG_LINES_MAX:
            with self.lock:
                lines, self._log = self._log, []
            try:
                with self._log_path.open("ab") as file:
                    file.writelines(lines)
            except OSError as error:  # a full disk costs the log, and nothing else
                logger.warning("event log ends here error=%s", error)
                with self.lock:
                    self._log = None


class _Guard:
    """Around a call of the store: `GaveUp` ends here, and whoever gives up in the middle is noted.

    One for all calls and threads, made beforehand: it must work where there is no memory.
    """

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if kind is None:
            return False
        if issubclass(kind, _NO_MEMORY):
            self._runtime.gave_up = True  # a pin may have no owner now
        return issubclass(kind, GaveUp)


def _begin_log(path: Path, head: bytes) -> None:
    """Make an event log with its first line. Raises ConfigError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_NONBLOCK: a pipe in its place would be waited for.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            file.truncate(0)
            file.write(head)
    except OSError as error:
        raise ConfigError(f"event_log: {error}; cure: another file, or null") from error
