"""What a drill reports."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: What may be wrong with a case, worst first.
WRONG_BYTES = "wrong bytes"
LOST = "durable and lost"
BROKEN = "not a miss but an error"
LEAKED = "leaked"
#: What the case needs is not on this machine; the drill does not hold, as it was not held.
NOT_RUN = "not run"


@dataclass(slots=True)
class Tally:
    """Cases of one drill, and what was wrong with them, by kind, each with how to replay it."""

    drill: str
    seed: int
    cases: int = 0
    seconds: float = 0.0
    wrong: dict[str, list[str]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing was wrong."""
        return not self.wrong

    def add(self, kind: str, case: int, words: str) -> None:
        """Note what was wrong with a case."""
        self.wrong.setdefault(kind, []).append(f"seed {self.seed}, case {case}: {words}")


class Wrong(Exception):
    """A case went wrong: the kind, and in words."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind}: {words}")
        self.kind = kind
        self.words = words


def run_cases(
    drill: str, case: Callable[[random.Random, int], None], cases: int, seed: int
) -> Tally:
    """Run cases 0 .. `cases` of a drill; each gets randomness of its own, and raises `Wrong`."""
    tally = Tally(drill, seed)
    begun = time.monotonic()
    for number in range(cases):
        tally.cases += 1
        try:
            case(case_random(drill, seed, number), number)
        except Wrong as wrong:
            tally.add(wrong.kind, number, wrong.words)
        except Exception as error:  # noqa: BLE001 any other exception reached the engine
            tally.add(BROKEN, number, repr(error))
    tally.seconds = time.monotonic() - begun
    return tally


def case_random(drill: str, seed: int, number: int) -> random.Random:
    """The randomness of one case."""
    return random.Random(f"{drill}/{seed}/{number}")


@contextmanager
def quiet() -> Iterator[None]:
    """No logs: most cases repair or refuse something, and say so."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
