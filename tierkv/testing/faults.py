"""Faults of a disk, and schedules of them: which call fails, and how."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias


class Fault(StrEnum):
    """What can go wrong with one call."""

    EIO = "eio"
    ENOSPC = "enospc"
    EDQUOT = "edquot"
    EMFILE = "emfile"
    EINTR = "eintr"
    EAGAIN = "eagain"
    #: Half the bytes move, then EIO: what an engine may make of a short transfer.
    SHORT = "short"
    #: A read succeeds with one bit wrong.
    FLIP = "flip"
    #: A write succeeds, and nothing was written.
    LOST = "lost"
    #: A write succeeds, and its bytes are some pages further on or back.
    MISDIRECTED = "misdirected"
    DELAY = "delay"


#: Which calls a fault drawn at a rate may hit.
_APPLIES: Final[Mapping[Fault, frozenset[str]]] = {
    Fault.EIO: frozenset({"read", "write", "sync", "open", "rename", "sync_root"}),
    Fault.ENOSPC: frozenset({"write", "preallocate", "open"}),
    Fault.EDQUOT: frozenset({"write", "preallocate", "open"}),
    Fault.EMFILE: frozenset({"open"}),
    Fault.EINTR: frozenset({"read", "write", "sync", "open"}),
    Fault.EAGAIN: frozenset({"read", "write", "preallocate"}),
    Fault.SHORT: frozenset({"read", "write"}),
    Fault.FLIP: frozenset({"read"}),
    Fault.LOST: frozenset({"write"}),
    Fault.MISDIRECTED: frozenset({"write"}),
    Fault.DELAY: frozenset({"read", "write", "sync"}),
}

#: The fault, or none, for call number `number`, counted from 0, of operation `operation`.
Schedule: TypeAlias = Callable[[int, str], Fault | None]


def once(number: int, fault: Fault) -> Schedule:
    """A schedule with one fault, at call `number`."""
    return lambda n, operation: fault if n == number and _applies(fault, operation) else None


def from_then_on(number: int, fault: Fault) -> Schedule:
    """A schedule with a fault at every call from `number` on."""
    return lambda n, operation: fault if n >= number and _applies(fault, operation) else None


def at_rates(seed: int, rates: Mapping[Fault, float]) -> Schedule:
    """A schedule that draws each fault with its chance per call that it applies to."""
    rng = random.Random(seed)

    def draw(_number: int, operation: str) -> Fault | None:
        for fault, rate in rates.items():
            if _applies(fault, operation) and rng.random() < rate:
                return fault
        return None

    return draw


#: Faults that a call reports.
ERRNO: Final[Mapping[Fault, int]] = {
    Fault.EIO: errno.EIO,
    Fault.ENOSPC: errno.ENOSPC,
    Fault.EDQUOT: errno.EDQUOT,
    Fault.EMFILE: errno.EMFILE,
    Fault.EINTR: errno.EINTR,
    Fault.EAGAIN: errno.EAGAIN,
}


def _applies(fault: Fault, operation: str) -> bool:
    return operation in _APPLIES[fault]
