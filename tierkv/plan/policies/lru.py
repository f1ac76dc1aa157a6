"""Least recently used, leaf first: the plain policy and the line to beat.

Leaf-first costs nothing: prefixes are touched child before parent (see `EvictionPolicy.touch`),
so a parent is always more recent than its children and goes after them.
"""

from __future__ import annotations

from collections.abc import Iterable

from tierkv.plan.policies.base import About
from tierkv.plan.policies.queues import Ordered


class LRU(Ordered):
    """Pages in order of use, oldest first."""

    __slots__ = ()

    def track(self, page: int, now_ns: int, about: About) -> None:
        self._order[page] = now_ns
        self._order.move_to_end(page)

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        order = self._order
        for page in pages:
            if page in order:
                order.move_to_end(page)

    renew = touch
