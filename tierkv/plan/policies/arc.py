"""ARC, the adaptive replacement cache: recency and frequency share the tier as ghosts tell.

Nimrod Megiddo and Dharmendra S. Modha, "ARC: a self-tuning, low overhead replacement cache",
FAST 2003, figure 4. Pages used once are in T1, pages used again in T2, each in order of use; B1
and B2 remember what left them. A hit in B1 moves the target size of T1 up, one in B2 down.

Where we differ: several pages may be expected before room is made for them, so the target moves
for all of them first, and the ghosts are cut to size when the pages are there. For one page at a
time that is the paper's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tierkv.plan.policies.base import About, Name
from tierkv.plan.policies.queues import Ghosts, Named, Queue, holder


class ARC(Named):
    """Invariants: T1 and B1 are at most as many as the tier's pages, all four at most twice."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._once: Queue[None] = Queue()
        self._again: Queue[None] = Queue()
        self._left_once: Ghosts[bool] = Ghosts(pages)
        self._left_again: Ghosts[bool] = Ghosts(2 * pages)
        self._target = 0.0
        self._is_back_from_again = False

    @property
    def target(self) -> float:
        """How many of the pages those that were used once may have."""
        return self._target

    def expect(self, names: Iterable[Name]) -> None:
        once, again = self._left_once, self._left_again
        self._is_back_from_again = False
        for name in names:
            if name in once:
                step = max(len(again) / len(once), 1.0)
                self._target = min(self._target + step, float(self.pages))
                once.call(name)
            elif name in again:
                step = max(len(once) / len(again), 1.0)
                self._target = max(self._target - step, 0.0)
                again.call(name)
                self._is_back_from_again = True

    def _enter(self, page: int, about: About) -> None:
        was_once = self._left_once.claim(about.name)
        was_again = self._left_again.claim(about.name)
        if was_once or was_again:
            self._again[page] = None
        else:
            self._once[page] = None
        self._trim()

    def _use(self, page: int) -> None:
        self._once.pop(page, None)
        self._again[page] = None
        self._again.move_to_end(page)

    def _renew(self, page: int) -> None:
        holder((self._once, self._again), page).move_to_end(page)

    def _leave(self, page: int) -> None:
        del holder((self._once, self._again), page)[page]

    def _victim(self, is_evictable: Callable[[int], bool]) -> int | None:
        size = self._once.size
        is_over = size > self._target or (size == self._target and self._is_back_from_again)
        order = [(self._once, self._left_once), (self._again, self._left_again)]
        if not (size and is_over):
            order.reverse()
        for queue, ghosts in order:
            page = queue.oldest(is_evictable)
            if page is not None:
                del queue[page]
                ghosts.add(self._names[page], True)
                return page
        return None

    def _trim(self) -> None:
        """Only an arrival makes them too many: what is given up becomes a ghost."""
        once, again = self._left_once, self._left_again
        recent = self._once.size + len(once)
        while len(once) and recent > self.pages:
            once.drop_oldest()
            recent -= 1
        excess = recent + self._again.size + len(again) - 2 * self.pages
        while len(again) and excess > 0:
            again.drop_oldest()
            excess -= 1

    def _settle(self) -> None:
        self._once.put_back()
        self._again.put_back()
