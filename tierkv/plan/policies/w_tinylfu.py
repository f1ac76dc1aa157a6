"""W-TinyLFU: what is new must have been wanted more often than what would go for it.

Gil Einziger, Roy Friedman and Ben Manes, "TinyLFU: a highly efficient cache admission policy", ACM
Transactions on Storage 13(4), 2017, sections 3 and 4. New pages are in a window (1 %) in order of
use. The rest is a segmented LRU: on probation, and protected (80 % of it) once used there. The
oldest of a window that is too large stands against the oldest on probation, and the one that was
wanted less often goes; often is what a count-min sketch says, of four rows of counts up to 15,
halved after every ten uses for each page of the tier.

Where we differ: what stands against what is decided only when room is made, and until then the
window keeps what is too much for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from tierkv.plan.policies.base import About, Name
from tierkv.plan.policies.queues import Named, Queue, holder

_ROWS: Final = 4
_COUNT_MAX: Final = 15
_USES_PER_PAGE: Final = 10
_HALF: Final = bytes(count // 2 for count in range(256))
_MIX: Final = 0x9E3779B97F4A7C15
_WORD: Final = (1 << 64) - 1


class WTinyLFU(Named):
    """Each page is in one of three queues."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._window_pages = max(1, pages // 100)
        self._main_pages = max(0, pages - self._window_pages)
        self._protected_pages = self._main_pages * 4 // 5
        self._window: Queue[None] = Queue()
        self._probation: Queue[None] = Queue()
        self._protected: Queue[None] = Queue()
        self._sketch = Sketch(pages)

    def expect(self, names: Iterable[Name]) -> None:
        for name in names:
            self._sketch.add(name)

    def _enter(self, page: int, about: About) -> None:
        self._window[page] = None
        while len(self._window) > self._window_pages and self._main_size() < self._main_pages:
            self._probation[self._window.popitem(last=False)[0]] = None

    def _use(self, page: int) -> None:
        self._sketch.add(self._names[page])
        if page in self._probation:
            del self._probation[page]
            self._protected[page] = None
            if len(self._protected) > self._protected_pages:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            self._renew(page)

    def _renew(self, page: int) -> None:
        self._holder(page).move_to_end(page)

    def _leave(self, page: int) -> None:
        del self._holder(page)[page]

    def _victim(self, is_evictable: Callable[[int], bool]) -> int | None:
        new = old = None
        if self._window.size >= self._window_pages or not self._main_size():
            new = self._window.oldest(is_evictable)
        old = self._probation.oldest(is_evictable)
        if old is None:
            old = self._protected.oldest(is_evictable)
        if new is None and old is None:
            new = self._window.oldest(is_evictable)
        if old is None or new is None:
            page = new if old is None else old
        else:
            count, names = self._sketch.count, self._names
            is_admitted = count(names[new]) > count(names[old])
            page = old if is_admitted else new
            if is_admitted:
                del self._window[new]
                self._probation[new] = None
        if page is not None:
            self._leave(page)
        return page

    def _main_size(self) -> int:
        return self._probation.size + self._protected.size

    def _holder(self, page: int) -> Queue[None]:
        return holder((self._window, self._probation, self._protected), page)

    def _settle(self) -> None:
        for queue in (self._window, self._probation, self._protected):
            queue.put_back()


class Sketch:
    """How often names were seen lately: never too little, rarely too much."""

    __slots__ = ("_left", "_period", "_rows", "_shift")

    def __init__(self, pages: int) -> None:
        bits = max(6, (pages - 1).bit_length() + 2)  # at least four counters a page in each row
        self._shift = 64 - bits
        self._rows = [bytearray(1 << bits) for _ in range(_ROWS)]
        self._period = self._left = max(1, _USES_PER_PAGE * pages)

    def add(self, name: Name) -> None:
        """Count one use."""
        place, step = self._hash(name)
        for row in self._rows:
            at = (place & _WORD) >> self._shift
            if row[at] < _COUNT_MAX:
                row[at] += 1
            place += step
        self._left -= 1
        if not self._left:
            self._left = self._period // 2  # what is left of the uses counted
            self._rows = [row.translate(_HALF) for row in self._rows]

    def count(self, name: Name) -> int:
        """How often it was used, of late."""
        place, step = self._hash(name)
        least = _COUNT_MAX
        for row in self._rows:
            least = min(least, row[(place & _WORD) >> self._shift])
            place += step
        return least

    def _hash(self, name: Name) -> tuple[int, int]:
        """Two numbers that say where a name is counted; Python's own hash differs by process."""
        word = name if isinstance(name, int) else int.from_bytes(name[:8], "little")
        word = (word + 1) * _MIX & _WORD
        word = (word ^ word >> 29) * _MIX & _WORD
        return word, (word << 32 | word >> 32) | 1
