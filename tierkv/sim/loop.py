"""Loop: what happens when, in simulated time; ties in the order in which they were posted."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Loop:
    """A heap of (time, number, what to call, with what). `now_ns` is the simulated time."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, Callable[..., None], object]] = []
        self._number = 0

    def post(self, at_ns: int, act: Callable[[T], None], what: T) -> None:
        """Have ``act(what)`` called at a time, which must not have passed."""
        heapq.heappush(self._heap, (at_ns, self._number, act, what))
        self._number += 1

    def run(self, look: Callable[[], int]) -> None:
        """Until nothing is left; `look` is called on the way, and says when it wants the next."""
        heap, pop, next_look = self._heap, heapq.heappop, 0
        while heap:
            at_ns, _, act, what = pop(heap)
            while next_look < at_ns:
                self.now_ns = next_look
                next_look = look()
            self.now_ns = at_ns
            act(what)
        look()
