"""Leases: what was handed to a reader, and where it lies. Single owner (the planner)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tierkv.core.keys import BlockKey
from tierkv.core.tier import Span, TierId
from tierkv.plan.radix import RadixIndex
from tierkv.plan.residency import NO_PLACE, TierTable

#: The fastest tier that can serve each block first.
MEMORY: Final = (TierId.DEVICE, TierId.HOST)


class Located(NamedTuple):
    """Consecutive blocks of a lease that lie in one tier; spans count from the lease's start."""

    tier: TierId
    spans: list[Span]


@dataclass(slots=True)
class LeaseRecord:
    """Blocks handed to a reader, their keys, and every pin taken for it."""

    blocks: list[int]
    keys: Sequence[BlockKey]
    pins: list[tuple[TierId, int]]
    namespace: str
    ready: list[Located] | None = None


def located(
    record: LeaseRecord, index: RadixIndex, tables: Mapping[TierId, TierTable]
) -> list[Located]:
    """Where leased blocks are, in order, up to the first that did not arrive: `Planner.located`."""
    pinned = [
        (t, tables[t], {p for of, p in record.pins if of is t}) for t in MEMORY if t in tables
    ]
    names = index.names
    found: list[Located] = []
    places: list[int] = []
    current: TierId | None = None
    start = 0
    for number, (block, key) in enumerate(zip(record.blocks, record.keys, strict=False)):
        at, tier = NO_PLACE, None
        if names(block, key):
            for memory, table, pages in pinned:
                at = table.ready[block]
                if at >= 0 and at // table.page_blocks in pages:
                    tier = memory
                    break
        if tier is not current or tier is None:
            if current is not None:
                found.append(_locate(tables[current], current, places, start))
            if tier is None:
                return found
            current, places, start = tier, [], number
        places.append(at)
    if current is not None:
        found.append(_locate(tables[current], current, places, start))
    return found


def _locate(table: TierTable, tier: TierId, places: list[int], start: int) -> Located:
    spans = table.spans_of(places)
    return Located(tier, [s._replace(index=s.index + start) for s in spans] if start else spans)
