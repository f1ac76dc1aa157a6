"""SIEVE: one queue, one bit a page, and a hand that gives up what was not used since it passed.

Yazhuo Zhang et al., "SIEVE is simpler than LRU", NSDI 2024, section 3. The hand goes from the
oldest page to the newest and begins anew; a used page stays where it is and loses its bit.

The queue is kept in two parts: what the hand has passed, which is older, and what lies ahead.
"""

from __future__ import annotations

from collections.abc import Callable

from tierkv.plan.policies.base import About
from tierkv.plan.policies.queues import Named, Queue, holder


class SIEVE(Named):
    """Each page is behind the hand or ahead of it, with its bit."""

    wants_names = False

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._passed: Queue[bool] = Queue()
        self._ahead: Queue[bool] = Queue()

    def _enter(self, page: int, about: About) -> None:
        self._ahead[page] = False

    def _use(self, page: int) -> None:
        holder((self._ahead, self._passed), page)[page] = True

    def _leave(self, page: int) -> None:
        del holder((self._ahead, self._passed), page)[page]
        self._wrap()

    def _victim(self, is_evictable: Callable[[int], bool]) -> int | None:
        # Twice around: the first time may only take bits away.
        for _ in range(2 * len(self._names)):
            page = next(iter(self._ahead))
            is_used = self._ahead.pop(page)
            is_free = is_evictable(page)
            if is_free and not is_used:
                self._wrap()
                return page
            self._passed[page] = is_used and not is_free
            self._wrap()
        return None

    def _wrap(self) -> None:
        """At the newest page the hand goes back to the oldest."""
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead

    def _settle(self) -> None:
        """Nothing is set aside: the hand has passed what may not go."""
