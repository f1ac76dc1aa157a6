"""Watch: what has become readable, or unreadable, since somebody last asked.

For whoever keeps a copy of what is stored. Nothing is noted before the first call, which gives all
of it. Single owner (the planner).
"""

from __future__ import annotations

from collections.abc import Mapping

from tierkv.core.keys import BlockKey
from tierkv.core.tier import TierId
from tierkv.plan.radix import RadixIndex
from tierkv.plan.residency import TierTable


class Watch:
    """See the module."""

    def __init__(self, index: RadixIndex, tables: Mapping[TierId, TierTable]) -> None:
        self._index = index
        self._tables = tables

    def changes(self) -> dict[BlockKey, TierId | None]:
        """The fastest tier of each block where that may have changed; None: it cannot be read."""
        index, changed = self._index, set[int]()
        if index.forgotten is None:
            for run in index.runs():
                changed.update(run)
        found: dict[BlockKey, TierId | None] = dict.fromkeys(index.forgotten or ())
        index.forgotten = []
        for table in self._tables.values():
            changed |= table.changed or set()
            table.changed = set()
        # By what is there now: an id of then may name another block.
        found |= {index.key(b): self._tier_of(b) for b in changed if index.is_known(b)}
        return found

    def _tier_of(self, block: int) -> TierId | None:
        return next((t for t, table in self._tables.items() if table.ready[block] >= 0), None)
