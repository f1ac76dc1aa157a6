"""Drills: the promise of `Store` held under one kind of fault, as often as asked.

Each drill is a module with ``run(cases, seed) -> Tally``: `make test` runs a few cases of each,
`make reliability` many. A case is drawn from the seed and its number alone, so that the line of a
failure is enough to have it again: ``replay(seed, case)``.
"""

from tierkv.testing.drills.base import Tally

__all__ = ["Tally"]
