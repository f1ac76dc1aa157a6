"""Greedy-Dual-Size-Frequency: the value of a page is its cost times its uses, and ages.

Ludmila Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching
policy", HP Laboratories HPL-98-69R1, 1998. A page's priority is L + uses * cost / size, and L rises
to the priority of what is given up, so that what was valuable once goes in time.

Where we differ: pages have one size, so cost is counted per byte (`About.cost`); of equal
priorities the one that was used longest ago goes first, which keeps chains leaf-first.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from tierkv.plan.policies.base import About
from tierkv.plan.policies.queues import Named

#: (priority, number of the change, page)
_Entry = tuple[float, int, int]


class GDSF(Named):
    """A heap with entries that are out of date; `_entry` has each page's one that is not."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._heap: list[_Entry] = []
        self._entry: dict[int, _Entry] = {}
        self._value: dict[int, tuple[int, float]] = {}  # page -> (uses, cost)
        self._floor = 0.0
        self._changes = 0
        self._aside: list[_Entry] = []

    def _enter(self, page: int, about: About) -> None:
        self._value[page] = (1, about.cost)
        self._renew(page)

    def _use(self, page: int) -> None:
        uses, cost = self._value[page]
        self._value[page] = (uses + 1, cost)
        self._renew(page)

    def _renew(self, page: int) -> None:
        uses, cost = self._value[page]
        self._changes += 1
        entry = self._entry[page] = (self._floor + uses * cost, self._changes, page)
        heappush(self._heap, entry)
        if len(self._heap) > 64 + 4 * len(self._entry):
            self._heap = list(self._entry.values())
            heapify(self._heap)

    def _leave(self, page: int) -> None:
        del self._entry[page], self._value[page]

    def _victim(self, is_evictable: Callable[[int], bool]) -> int | None:
        while self._heap:
            entry = heappop(self._heap)
            page = entry[2]
            if self._entry.get(page) != entry:
                continue
            if not is_evictable(page):
                self._aside.append(entry)
                continue
            self._floor = max(self._floor, entry[0])
            self._leave(page)
            return page
        return None

    def _settle(self) -> None:
        for entry in self._aside:
            heappush(self._heap, entry)
        self._aside.clear()
