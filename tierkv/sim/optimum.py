"""Optimum: what nobody can do better than, who does not know the future.

Belady's MIN (1966) with bypass: of all blocks keep those that are wanted again soonest; one that is
wanted later than all that are kept is not kept at all. In a prefix tree a request that reads a block
reads its parent first, so that a parent's next use is never later than its child's: MIN gives up
children before parents by itself, and what it keeps are whole prefixes. Its block hits are then its
prefix hits, and no policy has more of either. Exact for blocks of equal size in one tier; where an
unusual trace names one block with several parents it is still the bound of block hits.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tierkv.sim.trace import Trace


def optimum_hits(trace: Trace, capacity: int) -> NDArray[np.int32]:
    """Blocks of each request that MIN has when it comes: (n,)."""
    return _min(trace.starts, trace.blocks, trace.unique_blocks, capacity)


@njit(cache=True)
def _min(
    starts: NDArray[np.int64], blocks: NDArray[np.int32], unique: int, capacity: int
) -> NDArray[np.int32]:
    count = len(blocks)
    never = count
    next_use, soonest = np.full(count, never, np.int32), np.full(unique, never, np.int32)
    for at in range(count - 1, -1, -1):
        next_use[at] = soonest[blocks[at]]
        soonest[blocks[at]] = at
    # A heap of (next use, block), latest first; an entry of a use that has passed is stale.
    uses, kept = np.empty(count + 1, np.int32), np.empty(count + 1, np.int32)
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
            block, use = blocks[at], next_use[at]
            if wanted_at[block] != never:
                resident -= 1
            wanted_at[block] = use
            if use == never:
                continue
            resident += 1
            place = entries
            entries += 1
            while place:
                above = (place - 1) >> 1
                if uses[above] >= use:
                    break
                uses[place], kept[place] = uses[above], kept[above]
                place = above
            uses[place], kept[place] = use, block
            while resident > capacity:
                latest, goes = uses[0], kept[0]
                entries -= 1
                use, block = uses[entries], kept[entries]
                place = 0
                while True:
                    below = 2 * place + 1
                    if below >= entries:
                        break
                    if below + 1 < entries and uses[below + 1] > uses[below]:
                        below += 1
                    if uses[below] <= use:
                        break
                    uses[place], kept[place] = uses[below], kept[below]
                    place = below
                uses[place], kept[place] = use, block
                if wanted_at[goes] == latest:
                    wanted_at[goes] = never
                    resident -= 1
    return hits
