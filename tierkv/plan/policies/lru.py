"""Least recently used, leaf first: the plain policy and the line to beat.

Leaf-first costs nothing: prefixes are touched child before parent (see `EvictionPolicy.touch`),
so a parent is always more recent than its children and goes after them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice


class LRU:
    """Pages in order of use, oldest first."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def track(self, page: int, now_ns: int) -> None:
        self._order[page] = None
        self._order.move_to_end(page)

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        order = self._order
        for page in pages:
            if page in order:
                order.move_to_end(page)

    def forget(self, page: int) -> None:
        self._order.pop(page, None)

    def evict(self, count: int, is_evictable: Callable[[int], bool]) -> list[int]:
        chosen = list(islice(filter(is_evictable, self._order), count))
        for page in chosen:
            del self._order[page]
        return chosen

    def __len__(self) -> int:
        return len(self._order)
