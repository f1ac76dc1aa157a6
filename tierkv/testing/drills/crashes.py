"""Power is lost at every single call to the disk of many lives, and the disk is read again.

For each call of each life, the disk of that moment meets several fates: unsynced sectors of 512 or
4096 bytes that survive or not, names that survive in order. See `MemoryFiles` and `Life`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Final

from tierkv.testing.drills.base import BROKEN, Tally, Wrong, case_random
from tierkv.testing.drills.life import Life, script
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles

NAME: Final = "crashes"
#: Fates of each moment.
_FATES: Final = 8


class PowerLoss(BaseException):
    """Nothing that runs survives it, so no handler of errors may catch it."""


def run(cases: int, seed: int) -> Tally:
    """Lives one after the other, each crashed at every call, until there were `cases` fates."""
    tally = Tally(NAME, seed)
    begun = time.monotonic()
    for number, (life, call, fate) in enumerate(islice(_cases(seed), cases)):
        tally.cases += 1
        words = f"life {life}, call {call}, fate {fate}"
        try:
            _meet(seed, life, call, fate)
        except Wrong as wrong:
            tally.add(wrong.kind, number, f"{words}: {wrong.words}")
        except Exception as error:  # noqa: BLE001 recovery must always open
            tally.add(BROKEN, number, f"{words}: {error!r}")
    tally.seconds = time.monotonic() - begun
    return tally


def replay(seed: int, case: int) -> None:
    """One case again; raises what was wrong with it."""
    _meet(seed, *next(islice(_cases(seed), case, None)))


def _cases(seed: int) -> Iterator[tuple[int, int, int]]:
    """Life, call and fate of each case."""
    for life in count():
        for call in range(_calls(seed, life)):
            for fate in range(_FATES):
                yield life, call, fate


def _calls(seed: int, life: int) -> int:
    """How many calls a life makes when nothing happens to it."""
    files = FaultyFiles(MemoryFiles(Path("disk")))
    Life(files).play(script(case_random(NAME, seed, life)))
    return files.calls


def _meet(seed: int, life: int, call: int, fate: int) -> None:
    book, disk = _until(seed, life, call)
    survived = disk.copy(seed=case_random(NAME, seed, fate).randrange(1 << 30))
    survived.crash()
    book.check(survived)


#: The last moment that was played, as its fates come one after the other.
_moment: tuple[tuple[int, int, int], tuple[Life, MemoryFiles]] | None = None


def _until(seed: int, life: int, call: int) -> tuple[Life, MemoryFiles]:
    """A life up to its loss of power, and the disk of that moment."""
    global _moment  # noqa: PLW0603 a cache of one
    if _moment is None or _moment[0] != (seed, life, call):
        disk = MemoryFiles(Path("disk"))

        def strike(number: int, _operation: str) -> Fault | None:
            if number >= call:
                raise PowerLoss
            return None

        book = Life(FaultyFiles(disk, strike))
        with contextlib.suppress(PowerLoss):
            book.play(script(case_random(NAME, seed, life)))
        _moment = (seed, life, call), (book, disk)
    return _moment[1]
