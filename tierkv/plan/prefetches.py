"""What became of prefetches: every one ends as timely, late or wasted, counted in bytes."""

from __future__ import annotations

from tierkv.core.stats import Stats


class Prefetches:
    """Host pages that a prefetch brought and nobody has used. Single owner (the planner)."""

    def __init__(self, stats: Stats, block_bytes: int) -> None:
        self._stats = stats
        self._block_bytes = block_bytes
        self._blocks: dict[int, int] = {}  # page -> blocks brought

    def __bool__(self) -> bool:
        return bool(self._blocks)

    @property
    def held_bytes(self) -> int:
        """What was brought, and is neither used nor gone yet."""
        return sum(self._blocks.values()) * self._block_bytes

    def began(self, page: int, blocks: int) -> None:
        """A prefetch of so many blocks into a page has begun."""
        self._blocks[page] = blocks

    def used(self, page: int, *, late: bool) -> None:
        """A page is wanted now; `late` if it is still awaited."""
        self._end(page, "late" if late else "timely")

    def gone(self, page: int) -> None:
        """A page was emptied."""
        self._end(page, "wasted")

    def _end(self, page: int, outcome: str) -> None:
        blocks = self._blocks.pop(page, 0)
        if blocks:
            self._stats.add("tierkv_prefetch_bytes_total", blocks * self._block_bytes, outcome)
