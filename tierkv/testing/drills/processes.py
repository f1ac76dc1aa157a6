"""Real processes die, and their kernel refuses: a store in a child, on a real directory.

A case draws a life (`process_child`) and what is done to it (`process_faults`): strace kills it as
its n-th write, sync or rename begins, or has such a call fail or come late; it is killed at some
moment with several clients at work; its disk is full, its files may not grow, its allocations fail.
Then another child opens the directory, without faults, and holds it against the journal.

What must hold. Opening succeeds; what is found has bytes that were offered under that prefix; what
a flush called durable is found; nothing but manifest, lock and segments is left over; the store
takes pages and closes, and leaves no descriptor and no thread. A fault reaches the child as misses
and False, never as an exception (but for the MemoryError of a failed allocation) and never as a
hang. An interpreter that aborts without memory counts as killed.

A case whose means this machine lacks (strace, ptrace, memory disks) is `NOT_RUN`: the tally does
not hold, and says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from tierkv.testing.drills.base import (
    BROKEN,
    LEAKED,
    LOST,
    NOT_RUN,
    WRONG_BYTES,
    Tally,
    Wrong,
    case_random,
    run_cases,
)
from tierkv.testing.drills.process_child import (
    Book,
    Durable,
    Ended,
    Forgetting,
    Offered,
    Prefix,
    Said,
    Task,
    Word,
    root_of,
)
from tierkv.testing.drills.process_faults import Fault, fault_of
from tierkv.testing.drills.process_server import Order, Server

NAME: Final = "processes"
#: A life or a look that takes longer hangs.
LIMIT_S: Final = 60.0
_WORD_BYTES_MAX: Final = 1 << 18
_WORST_FIRST: Final = (WRONG_BYTES, LOST, BROKEN, LEAKED)
#: How an interpreter ends that found no memory where it cannot do without.
_ABORTS: Final = frozenset({-signal.SIGABRT, -signal.SIGSEGV})


def run(cases: int, seed: int, *, plant: str = "", only: str = "") -> Tally:
    """Cases one after the other.

    `plant`: a mistake to be found, as `module:function`. `only`: faults of one kind, by its name.
    """
    with Server(plant) as server:
        return run_cases(NAME, partial(_case, server, only), cases, seed)


def replay(seed: int, case: int, *, plant: str = "", only: str = "") -> None:
    """One case again; raises what was wrong with it."""
    with Server(plant) as server:
        _case(server, only, case_random(NAME, seed, case), case)


def _case(server: Server, only: str, rng: random.Random, number: int) -> None:
    with tempfile.TemporaryDirectory(prefix="tierkv-processes-") as top, ExitStack() as undo:
        fault = fault_of(rng, number, Path(top), only)
        try:
            _meet(server, fault, Path(top), undo)
        except Wrong as wrong:
            raise Wrong(wrong.kind, f"{fault.words}: {wrong.words}") from wrong
        except Exception as error:
            raise Wrong(BROKEN, f"{fault.words}: {error!r}") from error


def _meet(server: Server, fault: Fault, top: Path, undo: ExitStack) -> None:
    """A life, and the look at what it left."""
    cold = top / "cold"
    root_of(top).mkdir(mode=0o700, parents=True)
    if fault.disk_bytes:
        reason = server.mount(cold, fault.disk_bytes)
        if reason:
            raise Wrong(NOT_RUN, reason)
        undo.callback(server.mount, cold, 0)
    if fault.task.nomemory and importlib.util.find_spec("_testcapi") is None:
        raise Wrong(NOT_RUN, "this Python has no _testcapi, which makes allocations fail")
    journal = _Reader(fault)
    status = _watched(server, Order(fault.task, stacks=str(top / "stacks")), journal)
    journal.judge(status)
    book = top / "book"
    book.write_bytes(msgspec.json.encode(journal.book()))
    calm = Fault("", Task(str(top), 0, engine=fault.task.engine, host_pages=40))
    look = _Reader(calm)
    status = _watched(server, Order(calm.task, str(book), str(top / "stacks")), look)
    look.judge(status)


class _Reader:
    """A journal as it is read: a book, and what is wrong."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.words = 0
        self.ended = False
        self._offered: dict[Prefix, list[int]] = {}
        self._durable: set[Prefix] = set()
        self._wrong: list[Said] = []

    def take(self, message: bytes) -> None:
        """Read one word."""
        self.words += 1
        word = msgspec.json.decode(message, type=Word)
        if isinstance(word, Offered):
            for prefix in word.prefixes:
                self._offered.setdefault(prefix, []).append(word.value)
        elif isinstance(word, Durable):
            self._durable.update(word.prefixes)
        elif isinstance(word, Forgetting):
            self._durable = {one for one in self._durable if one[0] != word.namespace}
        elif isinstance(word, Said):
            self._wrong.append(word)
        else:
            assert isinstance(word, Ended)
            self.ended = True

    def book(self) -> Book:
        """What must be found, and what may be."""
        return Book(list(self._offered.items()), sorted(self._durable))

    def judge(self, status: int) -> None:
        """Raise `Wrong` for what was said, the worst first, and for an end that is none."""
        if self._wrong:
            worst = min(self._wrong, key=lambda said: _WORST_FIRST.index(said.kind))
            raise Wrong(worst.kind, worst.words)
        if self.ended and not status:
            return
        if self.fault.kills and status == -signal.SIGKILL:
            return
        if self.fault.task.nomemory and status in _ABORTS:
            return
        raise Wrong(BROKEN, f"it ended with status {status} and no word")


def _watched(server: Server, order: Order, journal: _Reader) -> int:
    """Have a child do what it is told to, under its fault; gives how it ended."""
    pid, pidfd, words = server.begin(order)
    try:
        with ExitStack() as undo:
            undo.callback(words.close)
            undo.callback(_kill, pidfd, signal.SIGKILL)
            if journal.fault.strace:
                undo.callback(_let_go, _traced(pid, journal.fault.strace))
            words.send(b"!")
            if not _listen(words, journal, pidfd):
                raise Wrong(BROKEN, f"it hung: {_stacks(pidfd, order)}")
    finally:
        status = server.status(LIMIT_S)
        os.close(pidfd)
    return status


def _listen(words: socket.socket, journal: _Reader, pidfd: int) -> bool:
    """Read a journal to its end, and kill its writer if its fault says so; False if it hangs."""
    kill_after = journal.fault.kill_after
    until = time.monotonic() + LIMIT_S
    kill_at = until
    while (now := time.monotonic()) < until:
        if kill_after and journal.words >= kill_after[0]:
            kill_at, kill_after = now + kill_after[1], None
        if select.select([words], [], [], max(0.0, min(kill_at, until) - now))[0]:
            message = _received(words)
            if not message:
                return True
            journal.take(message)
        elif kill_at < until:
            _kill(pidfd, signal.SIGKILL)
            kill_at = until
    return False


def _received(words: socket.socket) -> bytes:
    try:
        return words.recv(_WORD_BYTES_MAX)
    except ConnectionResetError:  # it died with a word of ours unread
        return b""


def _traced(pid: int, options: list[str]) -> subprocess.Popen[str]:
    """A strace that has hold of the child. Raises `Wrong` where that is impossible."""
    program = shutil.which("strace")
    if program is None:
        raise Wrong(NOT_RUN, "strace is not there; cure: install it")
    tracer = subprocess.Popen(
        [program, "-f", "-o", "/dev/null", *options, "-p", str(pid)],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tracer.stderr is not None
    said = ""
    while "attached" not in (line := tracer.stderr.readline()):
        said += line
        if not line:
            tracer.wait()
            tracer.stderr.close()
            raise Wrong(NOT_RUN, f"strace cannot trace a child of ours: {said.strip()}")
    return tracer


def _let_go(tracer: subprocess.Popen[str]) -> None:
    """Wait for strace, which ends when the child does."""
    try:
        tracer.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        tracer.kill()
        tracer.communicate()


def _kill(pidfd: int, number: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _stacks(pidfd: int, order: Order) -> str:
    """Where each thread of a child is."""
    _kill(pidfd, signal.SIGUSR1)
    time.sleep(0.5)
    return Path(order.stacks).read_text(encoding="utf-8")[-4000:]
