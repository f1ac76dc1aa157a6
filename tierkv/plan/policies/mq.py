"""Multi-Queue: queues by frequency, from which pages sink that were not used for long.

Yuanyuan Zhou, James F. Philbin and Kai Li, "The Multi-Queue replacement algorithm for second level
buffer caches", USENIX 2001, sections 4 and 5. A page used f times is in queue log2(f), of eight.
Each use gives it a life time, counted in uses of any page; the oldest page of a queue that
outlived it sinks one queue. The lowest queue gives up first. What left is remembered with its
frequency, four times as many as the tier has pages. The life time is the distance at which pages
are used again most often, as measured so far.

Where we differ: distances are counted in powers of two, and halved when ten were measured for each
page of the tier; before the first the life time is the tier's pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from tierkv.plan.policies.base import About, Name
from tierkv.plan.policies.queues import Ghosts, Named, Queue

QUEUES: Final = 8
_GHOSTS_PER_PAGE: Final = 4
_USES_PER_PAGE: Final = 10


class MQ(Named):
    """Each page is in one queue, with the time when its life ends; and has a count of uses."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._queues: list[Queue[int]] = [Queue() for _ in range(QUEUES)]
        self._uses: dict[int, int] = {}
        self._level: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._ghosts: Ghosts[tuple[int, int]] = Ghosts(_GHOSTS_PER_PAGE * pages)
        self._distances = [0] * 64  # by their length in bits
        self._measured = 0
        self._life = pages
        self._time = 0

    def expect(self, names: Iterable[Name]) -> None:
        for name in names:
            if name in self._ghosts:
                self._ghosts.call(name)

    def _enter(self, page: int, about: About) -> None:
        self._place(page, *(self._ghosts.claim(about.name) or (0, 0)))

    def _use(self, page: int) -> None:
        del self._queues[self._level[page]][page]
        self._place(page, self._uses[page], self._last[page])

    def _place(self, page: int, uses: int, last: int) -> None:
        """Another use of a page, after so many, of which the last was then."""
        self._time += 1
        if uses:
            self._learn(self._time - last)
        self._uses[page] = uses = uses + 1
        self._last[page] = self._time
        level = self._level[page] = min(uses.bit_length(), QUEUES) - 1
        self._queues[level][page] = self._time + self._life
        self._sink()

    def _learn(self, distance: int) -> None:
        counts, bits = self._distances, distance.bit_length()
        counts[bits] += 1
        if 1 << bits != self._life and counts[bits] >= max(counts):
            self._life = 1 << bits
        self._measured += 1
        if self._measured >= _USES_PER_PAGE * self.pages:
            self._measured = 0
            self._distances = [count // 2 for count in counts]

    def _sink(self) -> None:
        """Pages whose time is over sink: of each queue at most the oldest."""
        lower = self._queues[0]
        for level, queue in enumerate(self._queues[1:]):
            if queue:
                page = next(iter(queue))
                if queue[page] < self._time:
                    del queue[page]
                    lower[page] = self._time + self._life
                    self._level[page] = level
            lower = queue

    def _renew(self, page: int) -> None:
        queue = self._queues[self._level[page]]
        queue[page] = self._time + self._life
        queue.move_to_end(page)

    def _leave(self, page: int) -> None:
        del self._queues[self._level.pop(page)][page]
        del self._uses[page], self._last[page]

    def _victim(self, is_evictable: Callable[[int], bool]) -> int | None:
        for queue in self._queues:
            page = queue.oldest(is_evictable)
            if page is not None:
                self._ghosts.add(self._names[page], (self._uses[page], self._last[page]))
                self._leave(page)
                return page
        return None

    def _settle(self) -> None:
        for queue in self._queues:
            queue.put_back()
