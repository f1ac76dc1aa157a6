"""Optimum: what nobody can do better than, who does not know the future.

Belady's MIN (1966) with bypass: of all blocks keep those that are wanted again soonest; one that is
wanted later than all that are kept is not kept at all. In a prefix tree a request that reads a
block reads its parent first, so that a parent's next use is never later than its child's: MIN gives
up children before parents by itself, and what it keeps are whole prefixes. Its block hits are then
its prefix hits, and no policy has more of either. Exact for blocks of equal size in one tier.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tierkv.core.compiled import compiled
from tierkv.sim.trace import Trace


def optimum_hits(trace: Trace, capacity: int) -> NDArray[np.int32]:
    """Blocks of each request that MIN has when it comes: (n,)."""
    return _min(trace.starts, trace.blocks, trace.unique_blocks, capacity)


@compiled
def _min(
    starts: NDArray[np.int64], blocks: NDArray[np.int32], unique: int, capacity: int
) -> NDArray[np.int32]:
    count = len(blocks)
    never = count
    next_use, soonest = np.full(count, never, np.int32), np.full(unique, never, np.int32)
    for at in range(count - 1, -1, -1):
        next_use[at] = soonest[blocks[at]]
        soonest[blocks[at]] = at
    heap = np.empty((count + 1, 2), np.int32)  # (next use, block), latest first; some are stale
    entries = resident = 0
    wanted_at = np.full(unique, never, np.int32)  # of resident blocks
    hits = np.zeros(len(starts) - 1, np.int32)
    for request in range(len(hits)):
        start, stop = starts[request], starts[request + 1]
        at = start
        while at < stop and wanted_at[blocks[at]] != never:
            at += 1
        hits[request] = at - start
        for at in range(start, stop):
            block = blocks[at]
            resident += int(next_use[at] != never) - int(wanted_at[block] != never)
            wanted_at[block] = next_use[at]
            if next_use[at] != never:
                _push(heap, entries, next_use[at], block)
                entries += 1
            while resident > capacity:
                use, block = heap[0, 0], heap[0, 1]
                entries -= 1
                _sink(heap, entries)
                if wanted_at[block] == use:
                    wanted_at[block] = never
                    resident -= 1
    return hits


@compiled
def _push(heap: NDArray[np.int32], entries: int, use: int, block: int) -> None:
    place = entries
    while place:
        above = (place - 1) >> 1
        if heap[above, 0] >= use:
            break
        heap[place] = heap[above]
        place = above
    heap[place, 0], heap[place, 1] = use, block


@compiled
def _sink(heap: NDArray[np.int32], entries: int) -> None:
    """Put the entry at `entries` in the place of the first."""
    use, block = heap[entries, 0], heap[entries, 1]
    place = 0
    while 2 * place + 1 < entries:
        below = 2 * place + 1
        if below + 1 < entries and heap[below + 1, 0] > heap[below, 0]:
            below += 1
        if heap[below, 0] <= use:
            break
        heap[place] = heap[below]
        place = below
    heap[place, 0], heap[place, 1] = use, block
