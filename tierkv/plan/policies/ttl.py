"""LRU, leaf first, with a guard: what was used in the last 30 seconds is not given up.

Against thrash: where many conversations take turns in a tier that cannot hold them, LRU gives up
each just before it returns. A tier that keeps what it has, and stores nothing new until that is
old enough, serves a part of them well. A reader that waits is never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice, takewhile
from typing import ClassVar, Final

from tierkv.plan.policies.lru import LRU

GUARD_NS: Final = 30_000_000_000


class TTL(LRU):
    """Pages in order of use, oldest first, each with the time of its last use."""

    __slots__ = ()

    may_refuse: ClassVar[bool] = True

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        order = self._order
        for page in pages:
            if page in order:
                order[page] = now_ns
                order.move_to_end(page)

    renew = touch

    def evict(
        self, count: int, is_evictable: Callable[[int], bool], now_ns: int, *, must: bool = False
    ) -> list[int]:
        if must:
            return super().evict(count, is_evictable, now_ns)
        order, latest = self._order, now_ns - GUARD_NS
        old = takewhile(lambda page: order[page] <= latest, order)
        chosen = list(islice(filter(is_evictable, old), count))
        for page in chosen:
            del order[page]
        return chosen
