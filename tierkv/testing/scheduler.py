"""Scheduler: threads that take turns in an order drawn from a seed, on a clock of their own.

Inside of `Scheduler.replacing(modules)` those modules find `Lock`, `Condition` and `Thread` here
instead of in `threading`, and `monotonic` and `sleep` instead of in `time`. Their code runs as it
is, on real threads, but only one at a time: every use of a lock, a condition or the clock is a
place where another thread may go on instead, and the seed decides. So an order of events that
happens once in a million can be met, and met again. When nobody can go on, the clock jumps to the
next deadline; without one, all are `Stuck`, which a test with real threads would see as a hang.

`power_loss` ends all threads where they stand. The main thread gets `PowerLoss`, the others unwind
without touching anything.

After FoundationDB's and TigerBeetle's deterministic simulation. The seed draws how sticky a turn
is, how much a thread is favoured, and how often one is left standing for long: so some orders are
fair, some starve a lane, and in some the world changes between two lines of one thread.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Final

_STEP_NS: Final = (200, 5_000, 100_000)
#: How often a thread is left standing for a while, up to so many steps.
_FREEZES: Final = (0.0, 0.01, 0.04)
_FREEZE_STEPS: Final = 150


class PowerLoss(Exception):
    """The main thread's word that everything has stopped."""


class Stuck(Exception):
    """Nobody can go on, or everybody does for ever."""


class _Ended(BaseException):
    """Unwinds a thread that was stopped."""


class _Task:
    """One thread: whose turn it is holds the baton."""

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.baton = threading.Lock()
        self.baton.acquire()
        self.is_waiting = False
        self.deadline_ns: int | None = None
        self.waits_for = ""
        self.is_doomed = False
        self.has_ended = False


class Scheduler:
    """See the module. The thread that makes it is the main thread, and has the first turn."""

    def __init__(self, rng: random.Random, *, steps_max: int = 200_000) -> None:
        self.rng = rng
        self.now_ns = 1_000_000_000
        self.steps = 0
        #: Power is lost at this step.
        self.loses_power_at: int | None = None
        #: What threads raised that nobody caught.
        self.errors: list[str] = []
        self._steps_max = steps_max
        self._stickiness = rng.choice((0.0, 0.5, 0.9))
        self._is_fair = rng.random() < 0.5
        self._step_ns = rng.choice(_STEP_NS)
        self._freezes = rng.choice(_FREEZES)
        self._main = _Task("main", 1.0)
        self._tasks = [self._main]
        self._now = self._main
        self._word_to_main: Exception | None = None
        #: Whether everything was stopped.
        self.is_over = False

    # ---- for the main thread

    def start(self, work: Callable[[], object], name: str) -> _Task:
        """A thread that does `work` when its turn comes."""
        weight = 1.0 if self._is_fair else self.rng.choice((0.05, 0.3, 1.0, 3.0))
        task = _Task(name, weight)
        self._tasks.append(task)
        thread = threading.Thread(target=self._live, args=(task, work), name=name, daemon=True)
        thread.start()
        return task

    def join(self, task: _Task, timeout_s: float | None = None) -> bool:
        """Wait until a thread has ended."""
        deadline = None if timeout_s is None else self.now_ns + int(timeout_s * 1e9)
        while not task.has_ended:
            if deadline is not None and self.now_ns >= deadline:
                return False
            self.wait(f"the end of {task.name}", deadline)
        return True

    def stop(self) -> None:
        """End every other thread where it stands."""
        for task in self._tasks:
            if task is not self._main:
                task.is_doomed = True
                task.is_waiting = False
        self.loses_power_at = None
        while len(self._tasks) > 1:
            self.wait("the end of all")

    # ---- for every thread

    def pause(self) -> None:
        """Here another thread may go on."""
        me = self._now
        if me.is_doomed:
            raise _Ended
        if self.is_over:
            raise PowerLoss
        self.steps += 1
        self.now_ns += self.rng.randrange(self._step_ns)
        if self.loses_power_at is not None and self.steps >= self.loses_power_at:
            self._end_all(PowerLoss())
        elif self.steps >= self._steps_max:
            self._end_all(Stuck(f"still busy after {self.steps} steps: {self._words()}"))
        if self._freezes and self.rng.random() < self._freezes:
            steps = self.rng.randrange(_FREEZE_STEPS)
            self.wait("its turn", self.now_ns + steps * self._step_ns // 2)
        else:
            self._hand_over()

    def wait(self, what: str, deadline_ns: int | None = None) -> None:
        """Sleep until `wake`, or until the deadline."""
        me = self._now
        if me.is_doomed:
            raise _Ended
        me.is_waiting, me.deadline_ns, me.waits_for = True, deadline_ns, what
        self._hand_over()

    def wake(self, task: _Task) -> None:
        """Let a waiting thread go on when its turn comes."""
        task.is_waiting = False

    @property
    def current(self) -> _Task:
        """Whose turn it is."""
        return self._now

    # ---- turns

    def _live(self, task: _Task, work: Callable[[], object]) -> None:
        task.baton.acquire()
        try:
            if not task.is_doomed:
                work()
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 a thread that dies is a finding
            self.errors.append(f"{task.name} died: {error!r}")
        task.has_ended = True
        self._tasks.remove(task)
        for other in self._tasks:  # those who join look again
            if other.waits_for.startswith("the end of"):
                other.is_waiting = False
        self._next().baton.release()

    def _hand_over(self) -> None:
        me = self._now
        task = self._next()
        if task is not me:
            task.baton.release()
            me.baton.acquire()
        if me is self._main and self._word_to_main is not None:
            word, self._word_to_main = self._word_to_main, None
            raise word
        if me.is_doomed:
            raise _Ended

    def _next(self) -> _Task:
        """Choose who goes on, and make it the one whose turn it is."""
        me = self._now
        if not me.is_waiting and not me.has_ended and self.rng.random() < self._stickiness:
            return me
        ready = [task for task in self._tasks if not task.is_waiting or self._is_late(task)]
        if not ready:
            deadlines = [task.deadline_ns for task in self._tasks if task.deadline_ns is not None]
            if not deadlines:
                self._end_all(Stuck(f"nobody can go on: {self._words()}"))
            else:
                self.now_ns = max(self.now_ns, min(deadlines))
            ready = [task for task in self._tasks if not task.is_waiting or self._is_late(task)]
        if self._is_fair or len(ready) == 1:
            task = ready[int(self.rng.random() * len(ready))]
        else:
            task = self.rng.choices(ready, [task.weight for task in ready])[0]
        task.is_waiting, task.deadline_ns = False, None
        self._now = task
        return task

    def _is_late(self, task: _Task) -> bool:
        return task.deadline_ns is not None and task.deadline_ns <= self.now_ns

    def _end_all(self, word: Exception) -> None:
        self._word_to_main = word
        self.is_over = True
        for task in self._tasks:
            task.is_waiting = False
            task.is_doomed = task is not self._main
        self.loses_power_at = None
        self._steps_max *= 2

    def _words(self) -> str:
        waiting = [f"{t.name} waits for {t.waits_for}" for t in self._tasks if t.is_waiting]
        return "; ".join(waiting) or "all are busy"

    # ---- in the place of threading and time

    @contextmanager
    def replacing(self, modules: Iterable[ModuleType]) -> Iterator[None]:
        """Let `modules` find this scheduler where they look for threads and for the time."""
        threads = SimpleNamespace(
            Lock=lambda: SimulatedLock(self),
            Condition=lambda: SimulatedCondition(self),
            Thread=lambda **arguments: SimulatedThread(self, **arguments),
        )
        clock = SimpleNamespace(
            monotonic=self.monotonic, monotonic_ns=self.monotonic_ns, sleep=self.sleep
        )
        undo: list[tuple[ModuleType, str, object]] = []
        value: object
        try:
            for module in modules:
                for name, value in (("threading", threads), ("time", clock)):
                    if hasattr(module, name):
                        undo.append((module, name, getattr(module, name)))
                        setattr(module, name, value)
            yield
        finally:
            for module, name, value in undo:
                setattr(module, name, value)

    def monotonic_ns(self) -> int:
        """The time; it passes only here."""
        return self.now_ns

    def monotonic(self) -> float:
        """The time in seconds."""
        return self.now_ns / 1e9

    def sleep(self, seconds: float) -> None:
        """Let time pass, and others work."""
        self.wait("time to pass", self.now_ns + int(seconds * 1e9))


class SimulatedLock:
    """As `threading.Lock`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._holder: _Task | None = None
        self._waiting: list[_Task] = []

    def acquire(self) -> bool:
        """Take it; others may go on before."""
        scheduler = self._scheduler
        scheduler.pause()
        while self._holder is not None:
            me = scheduler.current
            if self._holder is me:
                raise RuntimeError(f"{me.name} takes a lock that it holds")
            self._waiting.append(me)
            scheduler.wait(f"a lock of {self._holder.name}")
        self._holder = scheduler.current
        return True

    def release(self) -> None:
        """Give it back, and let those who wait compete for it."""
        if self._holder is None and not self._scheduler.is_over:
            raise RuntimeError("a lock is given back that nobody holds")
        self._holder = None
        for task in self._waiting:
            self._scheduler.wake(task)
        self._waiting.clear()

    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._holder is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class SimulatedCondition(SimulatedLock):
    """As `threading.Condition` with a lock of its own: who is not waiting misses a notification."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self._notified: list[tuple[_Task, list[bool]]] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Give the lock back until notified or late; whether it was a notification."""
        scheduler = self._scheduler
        entry = (scheduler.current, [False])
        self._notified.append(entry)
        self.release()
        deadline = None if timeout is None else scheduler.now_ns + max(0, int(timeout * 1e9))
        scheduler.wait("a notification", deadline)
        if entry in self._notified:
            self._notified.remove(entry)
        self.acquire()
        return entry[1][0]

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `predicate()` or the timeout; gives what it last said."""
        end = None if timeout is None else self._scheduler.now_ns + int(timeout * 1e9)
        while not (holds := predicate()):
            left = None if end is None else (end - self._scheduler.now_ns) / 1e9
            if left is not None and left <= 0:
                break
            self.wait(left)
        return holds

    def notify(self, n: int = 1) -> None:
        """Wake the first `n` who wait. Only for who holds the lock."""
        if self._holder is not self._scheduler.current:
            raise RuntimeError("a notification by somebody who does not hold the lock")
        for task, flag in self._notified[:n]:
            flag[0] = True
            self._scheduler.wake(task)
        del self._notified[:n]

    def notify_all(self) -> None:
        """Wake all who wait."""
        self.notify(len(self._notified))


class SimulatedThread:
    """As `threading.Thread`, as far as a lane uses it."""

    def __init__(
        self, scheduler: Scheduler, *, target: Callable[[], object], name: str, daemon: bool = True
    ) -> None:
        del daemon
        self._scheduler = scheduler
        self._target = target
        self._name = name
        self._task: _Task | None = None

    def start(self) -> None:
        """Let it take turns."""
        self._task = self._scheduler.start(self._target, self._name)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        if self._task is not None:
            self._scheduler.join(self._task, timeout)
