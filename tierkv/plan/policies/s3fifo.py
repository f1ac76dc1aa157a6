"""S3-FIFO: three queues, none of which moves a page when it is used.

Juncheng Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, section 4.
What is new enters a small queue (10 % of the pages) and is given up from its end, unless it was
used: then it goes on to the main queue. What was given up there is a ghost (as many as 90 % of
the pages), and enters the main queue when it returns. The main queue gives a used page another
round, at most three.

Where we differ from the paper, as its authors' simulator does by default: two uses, not one, take
a page to the main queue. While nothing was ever given up, what does not fit into the small queue
enters the main queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from tierkv.plan.policies.base import About, Name
from tierkv.plan.policies.queues import Ghosts, Named, Queue, holder

_USES_TO_MAIN: Final = 2
_USES_MAX: Final = 3


class S3FIFO(Named):
    """Each page is in one of two queues, with how often it was used."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._small_pages = pages // 10
        self._main_pages = pages - self._small_pages
        self._small: Queue[int] = Queue()
        self._main: Queue[int] = Queue()
        self._ghosts: Ghosts[bool] = Ghosts(pages * 9 // 10)
        self._is_warm = False

    def expect(self, names: Iterable[Name]) -> None:
        for name in names:
            if name in self._ghosts:
                self._ghosts.call(name)

    def _enter(self, page: int, about: About) -> None:
        is_filling = not self._is_warm and len(self._small) >= self._small_pages
        if self._ghosts.claim(about.name) or is_filling:
            self._main[page] = 0
        else:
            self._small[page] = 0

    def _use(self, page: int) -> None:
        holder((self._small, self._main), page)[page] += 1

    def _leave(self, page: int) -> None:
        del holder((self._small, self._main), page)[page]

    def _victim(self, is_evictable: Callable[[int], bool]) -> int | None:
        self._is_warm = True
        if self._main.size > self._main_pages or not self._small.size:
            page = self._from_main(is_evictable)
            return self._from_small(is_evictable) if page is None else page
        page = self._from_small(is_evictable)
        return self._from_main(is_evictable) if page is None else page

    def _from_small(self, is_evictable: Callable[[int], bool]) -> int | None:
        while (page := self._small.oldest(is_evictable)) is not None:
            uses = self._small.pop(page)
            if uses < _USES_TO_MAIN:
                self._ghosts.add(self._names[page], True)
                return page
            self._main[page] = 0
        return None

    def _from_main(self, is_evictable: Callable[[int], bool]) -> int | None:
        while (page := self._main.oldest(is_evictable)) is not None:
            uses = self._main.pop(page)
            if not uses:
                return page
            self._main[page] = min(uses, _USES_MAX) - 1
        return None

    def _settle(self) -> None:
        self._small.put_back()
        self._main.put_back()
