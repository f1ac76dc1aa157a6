"""Runtime: the loop between the planner and the transfer engine, and the lock that guards it.

An event goes to the planner, its transfers go to the engine, what ended comes back as an event.
Every method that changes something is called with `lock` held; waiting is done without it. No I/O
and no copy of KV bytes happens under the lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tierkv.core.errors import StoreClosed
from tierkv.core.transfer import Transfer, Urgency
from tierkv.plan import events as ev
from tierkv.plan.event_log import entry_line, head_line
from tierkv.plan.planner import Planner
from tierkv.plan.spec import PlanSpec
from tierkv.transfer.engine import TransferEngine

_LOG_LINES_MAX: Final = 4096

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
        self._demand_ns = int(demand_s * 1e9)
        self._log_path = log
        self._log: list[bytes] | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(head_line(spec))
            self._log = []

    def handle(self, event: ev.AnyEvent) -> list[ev.AnyInstruction]:
        """One event to the planner, its transfers to the engine. Call with the lock held."""
        if self.is_closed:
            raise StoreClosed("the store is closed")
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
        if self.is_closed:
            raise StoreClosed("the store is closed")
        if not self.engine.has_results:
            return
        for result in self.engine.poll():
            self.handle(ev.TransferDone(result.transfer, result.outcomes))
        self.engine.wake()

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
            with self._log_path.open("ab") as file:
                file.writelines(lines)
