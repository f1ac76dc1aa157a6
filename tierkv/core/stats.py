"""Counters: plain ints with a name and labels, written under the store's lock, read by anyone.

Names follow Prometheus conventions (base units, `_total`); exporting them is another layer's
work. A counter exists, at zero, from the moment its family is declared.
"""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

Labels: TypeAlias = tuple[str, ...]


class Stats:
    """A set of named counters. Single owner for writes; `snapshot` from any thread."""

    __slots__ = ("_counters",)

    def __init__(self) -> None:
        self._counters: dict[str, Counter[Labels]] = {}

    def declare(self, name: str, *labels: Labels) -> Counter[Labels]:
        """Make the counters of `name` exist at zero, one per label tuple, and return them."""
        family = self._counters.setdefault(name, Counter())
        for label in labels:
            family.setdefault(label, 0)
        return family

    def add(self, name: str, amount: int, *labels: str) -> None:
        """Add `amount` to the counter of `name` with these label values."""
        family = self._counters.get(name)
        if family is None:
            family = self._counters[name] = Counter()
        family[labels] = family.get(labels, 0) + amount

    def get(self, name: str, *labels: str) -> int:
        """One counter's value; 0 if it was never touched."""
        return self._counters.get(name, Counter())[labels]

    def snapshot(self) -> dict[str, dict[str, int]]:
        """A copy: {name: {"label,label": value}}."""
        return {
            name: {",".join(label): value for label, value in list(family.items())}
            for name, family in sorted(self._counters.items())
        }
