"""Fast replay: what a trace hits in one tier of equal blocks, on arrays.

As `replay` in its unit "request", for LRU and for `adaptive`, whose own code this runs; a property
holds LRU's two replays together. A request finds the longest prefix that is resident; then all of
its chain is resident, last block used first, and what is worth least goes until the rest fits: the
chain's own end, where that is worth least. Compiled by numba.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tierkv.core.compiled import compiled
from tierkv.plan import groups
from tierkv.plan.groups import Cache, Request
from tierkv.sim.trace import Trace

Hits = NDArray[np.int32]

_NOBODY: Final = -1


def lru_hits(trace: Trace, capacity: int) -> Hits:
    """Blocks of each request that LRU, leaf first, has when it comes: (n,)."""
    return _lru(trace.starts, trace.blocks, trace.unique_blocks, capacity)


def adaptive_hits(
    trace: Trace, capacity: int, *, hints: bool = False, ghosts_per_place: float | None = None
) -> Hits:
    """Blocks of each request that `adaptive` has when it comes: (n,).

    hints: it is told why answers ended and when sessions go on, as far as the trace knows.
    ghosts_per_place: blocks that are remembered after they were given up, by capacity; None: all.
    """
    cache = adaptive_cache(trace, capacity, ghosts_per_place)
    return replay_into(cache, trace, capacity, hints=hints)


def adaptive_cache(trace: Trace, capacity: int, ghosts_per_place: float | None) -> Cache:
    """An empty cache with room for the groups and ghosts that this trace can leave."""
    ghosts = trace.unique_blocks if ghosts_per_place is None else int(ghosts_per_place * capacity)
    longest = int(np.diff(trace.starts).max(initial=0))
    held = min(trace.unique_blocks, capacity + ghosts + 2 * longest)
    cache = groups.new_cache(trace.unique_blocks, min(held, 3 * trace.requests) + 4, ghosts)
    cache.blocks["parent"] = trace.parents
    return cache


def replay_into(cache: Cache, trace: Trace, capacity: int, *, hints: bool = False) -> Hits:
    """As `adaptive_hits`, in a cache that was made for the trace."""
    now_s = trace.arrival_ns / 1e9
    stops, due_s = np.zeros(trace.requests, np.int64), np.full(trace.requests, -1.0)
    if hints:
        stops = trace.stop.astype(np.int64)
        ends_s = now_s + np.maximum(trace.busy_ns, 0) / 1e9
        due_s = np.where(trace.pause_ns >= 0, ends_s + trace.pause_ns / 1e9, -1.0)
    return _adaptive(
        cache,
        trace.starts,
        trace.blocks,
        np.array([trace.block_tokens, capacity]),
        now_s,
        trace.input_tokens,
        trace.output_tokens,
        stops,
        due_s,
    )


@compiled
def _adaptive(
    cache: Cache,
    starts: NDArray[np.int64],
    blocks: NDArray[np.int32],
    sizes: NDArray[np.int64],
    now_s: NDArray[np.float64],
    input_tokens: NDArray[np.int32],
    output_tokens: NDArray[np.int32],
    stops: NDArray[np.int64],
    due_s: NDArray[np.float64],
) -> Hits:
    tokens, capacity = sizes
    known = cache.blocks
    hits = np.zeros(len(starts) - 1, np.int32)
    for request in range(len(hits)):
        chain = blocks[starts[request] : starts[request + 1]]
        length = 0
        while length < len(chain) and known[chain[length]].resident:
            length += 1
        hits[request] = length
        whole = min(len(chain), input_tokens[request] // tokens)
        about = Request(now_s[request], output_tokens[request], stops[request], due_s[request])
        groups.use(cache, chain, whole, tokens, about)
        groups.shrink(cache, capacity, now_s[request])
    return hits


@compiled
def _lru(starts: NDArray[np.int64], blocks: NDArray[np.int32], unique: int, capacity: int) -> Hits:
    newer, older = np.full(unique + 1, unique, np.int32), np.full(unique + 1, unique, np.int32)
    is_resident = np.zeros(unique, np.uint8)
    ends = unique  # its `newer` is the oldest, its `older` the newest
    resident = 0
    hits = np.zeros(len(starts) - 1, np.int32)
    for request in range(len(hits)):
        start, stop = starts[request], starts[request + 1]
        at = start
        while at < stop and is_resident[blocks[at]]:
            at += 1
        hits[request] = at - start
        for at in range(stop - 1, start - 1, -1):
            block = blocks[at]
            if is_resident[block]:
                before, after = older[block], newer[block]
                newer[before], older[after] = after, before
            else:
                is_resident[block] = 1
                resident += 1
            last = older[ends]
            newer[last], older[block] = block, last
            newer[block], older[ends] = ends, block
        while resident > capacity:
            block = newer[ends]
            after = newer[block]
            newer[ends], older[after] = after, ends
            is_resident[block] = 0
            resident -= 1
    return hits
