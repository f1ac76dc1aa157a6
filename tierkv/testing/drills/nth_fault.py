"""The n-th call to the disk fails, once or from then on, for every n: the loop of SQLite's tests.

Errors that the disk reports leave what was acknowledged as durable in place. A disk that lies (it
loses a write, puts it elsewhere, or flips a bit, and says nothing) may cost anything, and never
gives wrong bytes. The life goes on after an operation that raised.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Final

from tierkv.testing.drills.base import BROKEN, Tally, Wrong, case_random
from tierkv.testing.drills.life import Life, script
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles, from_then_on, once

NAME: Final = "n-th fault"
#: What the disk does without saying so.
LIES: Final = frozenset({Fault.LOST, Fault.FLIP, Fault.MISDIRECTED})
_KINDS: Final = tuple(fault for fault in Fault if fault is not Fault.DELAY)
_LASTING: Final = (once, from_then_on)


def run(cases: int, seed: int) -> Tally:
    """Lives one after the other, each with every fault at every call, until there were `cases`."""
    tally = Tally(NAME, seed)
    begun = time.monotonic()
    for number, (life, call, fault, lasts) in enumerate(islice(_cases(seed), cases)):
        tally.cases += 1
        words = f"life {life}, {fault} at call {call}{' and on' if lasts else ''}"
        try:
            _meet(seed, life, call, fault, lasts)
        except Wrong as wrong:
            tally.add(wrong.kind, number, f"{words}: {wrong.words}")
        except Exception as error:  # noqa: BLE001 a fault may not reach the engine untyped
            tally.add(BROKEN, number, f"{words}: {error!r}")
    tally.seconds = time.monotonic() - begun
    return tally


def replay(seed: int, case: int) -> None:
    """One case again; raises what was wrong with it."""
    _meet(seed, *next(islice(_cases(seed), case, None)))


def _cases(seed: int) -> Iterator[tuple[int, int, Fault, bool]]:
    for life in count():
        files = FaultyFiles(MemoryFiles(Path("disk")))
        Life(files).play(_script(seed, life))
        for call in range(files.calls):
            for fault in _KINDS:
                for lasts in (False, True):
                    yield life, call, fault, lasts


def _script(seed: int, life: int) -> list:  # type: ignore[type-arg]
    return script(case_random(NAME, seed, life))


def _meet(seed: int, life: int, call: int, fault: Fault, lasts: bool) -> None:
    disk = MemoryFiles(Path("disk"), seed=call)
    files = FaultyFiles(disk, _LASTING[lasts](call, fault), seed=call)
    book = Life(files, trusts_disk=fault not in LIES)
    book.play(_script(seed, life), goes_on=True)
    disk.crash()
    book.check(disk)
