"""Faults of the drill `processes`, as they are drawn: what is done to a child, and in words."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tierkv.testing.drills.process_child import Task, root_of

#: Calls to the system that an engine makes, by what they do, and up to which of them is struck: a
#: thread of a life makes so many or a few more. Counted by strace for each thread alone.
_WRITES: Final = {"direct": "pwritev2,pwritev", "portable": "write"}
_READS: Final = {"direct": "preadv2,preadv", "portable": "read"}
_CALLS: Final = {"write": 24, "fdatasync": 12, "fsync": 10, "renameat": 8, "unlinkat": 8,
                 "fallocate": 8}  # fmt: skip
#: Calls that take names: only those beneath the root are struck.
_BY_NAME: Final = frozenset({"openat", "renameat", "unlinkat", "fsync"})
_ERRORS: Final = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EAGAIN", "EMFILE")
#: Asked for again at once, so that one from then on would be asked for forever.
_RETRIED: Final = frozenset({"EINTR"})
_DELAY_US_MAX: Final = 20_000
_DISK_BYTES: Final = 8 << 20


@dataclass(slots=True)
class Fault:
    """What is done to one life."""

    words: str
    task: Task
    #: Options of strace; empty: nobody traces it.
    strace: list[str] = field(default_factory=list)
    #: Killed after so many words of the journal, and so many seconds more.
    kill_after: tuple[int, float] | None = None
    disk_bytes: int = 0

    @property
    def kills(self) -> bool:
        """Whether it may end by SIGKILL."""
        return self.kill_after is not None or "signal=SIGKILL" in " ".join(self.strace)


def kill_at_a_call(rng: random.Random, task: Task) -> Fault:
    """SIGKILL as the n-th call of a kind begins: it is not carried out."""
    call = rng.choices(list(_CALLS), weights=[6, 3, 3, 2, 1, 2])[0]
    number = _number(rng, _CALLS[call])
    name = _call_of(call, task.engine)
    options = ["-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={number}"]
    return Fault(f"killed at {call} {number}", task, options)


def error_at_a_call(rng: random.Random, task: Task) -> Fault:
    """The n-th call of a kind fails, once or from then on."""
    calls = {**_CALLS, "read": 8, "openat": 100}
    call = rng.choices(list(calls), weights=[3, 5, 2, 1, 1, 2, 3, 1])[0]
    error = rng.choice(_ERRORS)
    lasts = rng.random() < 0.5 and error not in _RETRIED
    number = _number(rng, calls[call])
    name = _call_of(call, task.engine)
    when = f"{number}+" if lasts else str(number)
    options = [*_beneath(task, call), "-e", f"trace={name}"]
    options += ["-e", f"inject={name}:error={error}:when={when}"]
    task = _with(task, is_faultless=False, spoils_reads=call == "read")
    return Fault(f"{error} from {call} {number}{' and on' if lasts else ''}", task, options)


def slow_calls(rng: random.Random, task: Task) -> Fault:
    """Some calls of a kind are late, before or after they are carried out; often a kill too."""
    call = rng.choice(["write", "fdatasync", "fsync", "renameat", "read"])
    name = _call_of(call, task.engine)
    where = rng.choice(["delay_enter", "delay_exit"])
    delay = rng.randint(100, _DELAY_US_MAX)
    when = f"{rng.randint(1, 4)}+{rng.randint(1, 4)}"
    options = ["-e", f"trace={name}", "-e", f"inject={name}:{where}={delay}:when={when}"]
    fault = Fault(f"{where} {delay} us at {call} {when}", task, options)
    if rng.random() < 0.7:
        fault.kill_after = rng.randint(1, 14), rng.random() * 0.01
        fault.words += _kill_words(fault)
    return fault


def kill_at_a_moment(rng: random.Random, task: Task) -> Fault:
    """Several clients at once, and a kill that comes from outside."""
    task = _with(task, clients=rng.randint(2, 4))
    fault = Fault(f"{task.clients} clients", task)
    fault.kill_after = rng.randint(1, 90), rng.random() * 0.01
    fault.words += _kill_words(fault)
    return fault


def full_disk(rng: random.Random, task: Task) -> Fault:
    """A memory disk of 8 MiB that has only some KiB left, from some step on."""
    left = rng.choice([0, 4096, rng.randrange(64) * 4096])
    task = _with(
        task, is_faultless=False, engine="auto", disk_bytes_left=left,
        strikes_at=rng.randrange(12),
    )  # fmt: skip
    words = f"a disk with {left} bytes left from step {task.strikes_at}"
    return Fault(words, task, disk_bytes=_DISK_BYTES)


def large_files_refused(rng: random.Random, task: Task) -> Fault:
    """No file may grow or be written beyond a size, from some step on."""
    most = rng.choice([0, 4096, 8192, rng.randrange(60_000)])
    strikes = rng.randrange(12)
    task = _with(task, is_faultless=False, file_bytes_max=most, strikes_at=strikes)
    return Fault(f"files of at most {most} bytes from step {strikes}", task)


def no_memory(rng: random.Random, task: Task) -> Fault:
    """Allocations fail in an operation; see `process_memory`."""
    operation = rng.choice(["put", "get", "flush", "match"])
    plan = (operation, rng.randrange(40), rng.choice([1, 1, 2, 5]), rng.choice([1, 3, 11]))
    # The other engine runs on asyncio, whose own bookkeeping does not outlive a failed allocation.
    task = _with(task, nomemory=plan, closes=True, engine="direct")
    return Fault("allocations of {} fail: from {}, {} of them, by {}".format(*plan), task)


#: One after the other, so that a few cases have some of each.
KINDS: Final = (
    kill_at_a_call, error_at_a_call, kill_at_a_moment, full_disk, kill_at_a_call,
    large_files_refused, error_at_a_call, slow_calls, kill_at_a_call, no_memory,
)  # fmt: skip


def fault_of(rng: random.Random, number: int, top: Path, only: str = "") -> Fault:
    """The fault of a case; `only`: of one kind, by its name."""
    task = Task(
        str(top),
        rng.randrange(1 << 30),
        engine=rng.choice(["direct", "portable"]),
        host_pages=rng.choice([3, 6, 40]),
        closes=rng.random() < 0.7,
    )
    kinds = [kind for kind in KINDS if only in ("", kind.__name__)]
    fault = kinds[number % len(kinds)](rng, task)
    fault.words = f"{fault.task.engine}, {fault.words}"
    return fault


def _with(task: Task, **changes: object) -> Task:
    from msgspec.structs import replace

    return replace(task, **changes)


def _number(rng: random.Random, most: int) -> int:
    """Of a call: mostly an early one, as some lives make few."""
    return min(rng.randint(1, most), rng.randint(1, most))


def _call_of(call: str, engine: str) -> str:
    if call in ("write", "read"):
        return (_WRITES if call == "write" else _READS)[engine]
    return "openat,openat2" if call == "openat" else call


def _beneath(task: Task, call: str) -> list[str]:
    """Only what happens in the cold directory, where others make such calls too."""
    root = root_of(Path(task.top))
    if call in _BY_NAME:
        return ["-P", str(root)]
    if call == "read" and task.engine == "portable":
        names = ["manifest", *(f"segment-{number:08d}.tkv" for number in range(24))]
        return [option for name in names for option in ("-P", str(root / name))]
    return []


def _kill_words(fault: Fault) -> str:
    assert fault.kill_after is not None
    words, seconds = fault.kill_after
    return f", killed {seconds * 1e3:.1f} ms after word {words} of its journal"
