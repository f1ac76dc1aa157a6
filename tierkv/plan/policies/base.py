"""What an eviction policy promises.

A policy ranks **pages**, because a page is what is really freed. It is told of every page that
gains blocks, is used, or is gone, and is asked for the pages to give up. It knows nothing of
pins: the planner says which pages it may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol


class EvictionPolicy(Protocol):
    """Ranks the pages of one tier. Single owner (the planner); deterministic."""

    def track(self, page: int, now_ns: int) -> None:
        """A page was filled: it is the most recent. Tracking it again is a touch."""
        ...

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        """Pages were used, in this order. Pages that are not tracked are ignored.

        The planner passes the pages of a prefix last page first, so that recency alone evicts
        leaves before their parents.
        """
        ...

    def forget(self, page: int) -> None:
        """A page is gone. Forgetting an unknown page does nothing."""
        ...

    def evict(self, count: int, is_evictable: Callable[[int], bool]) -> list[int]:
        """Choose and stop tracking up to `count` evictable pages, least valuable first.

        Fewer are returned when fewer are evictable; `count == 0` gives []. Pages that are not
        evictable keep their rank.
        """
        ...

    def __len__(self) -> int:
        """How many pages are tracked."""
        ...
