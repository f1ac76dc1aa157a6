"""Curves: what a policy hits at every size of one tier.

LRU, leaf first, is a stack algorithm (Mattson, Gecsei, Slutz and Traiger, 1970): what a tier of C
blocks holds is the C most recent of all blocks, so that one pass finds every size's hits. A block
is hit by every tier that is at least as large as its *distance*: its place, from 1, in the order
of last use when its request comes. A request counts as one: distances are those before any of its
blocks is used, and then the last is used first. Places are counted in a Fenwick tree over slots in
order of use, which are numbered anew when they run out. Exact: equal to `lru_hits` at every size.

Of other policies a part of the trace is replayed at a size that is scaled by the same part, after
SHARDS (Waldspurger, Park, Garthwaite and Ahmad, FAST 2015). Where we differ: what is sampled is not
a block but a whole session, or, where sessions are not known, a whole tree behind the trunk that
many requests share, as a block without its prefix is worth nothing; and the scale is the share of
blocks that came into the sample, trunk included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import xxhash
from numba import njit
from numpy.typing import NDArray

from tierkv.sim.densify import dense_order
from tierkv.sim.trace import Trace

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., object])

#: A block belongs to the trunk if more than this share of requests refers to it.
TRUNK_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Curve:
    """Hit ratios by size. blocks: (k,), rising.  ratios: (k,).

    is_exact: every size is in it, and between them nothing changes; else it is interpolated.
    """

    blocks: NDArray[np.int64]
    ratios: NDArray[np.float64]
    is_exact: bool

    def at(self, blocks: int) -> float:
        """The hit ratio of a tier of so many blocks."""
        if self.is_exact:
            place = int(np.searchsorted(self.blocks, blocks, side="right")) - 1
            return float(self.ratios[place]) if place >= 0 else 0.0
        return float(np.interp(blocks, np.r_[0, self.blocks], np.r_[0.0, self.ratios]))

    def smallest(self, ratio: float) -> int | None:
        """The least blocks that hit so much; None if no size does."""
        enough = np.flatnonzero(self.ratios >= ratio - 1e-12)
        if not len(enough):
            return None
        place = int(enough[0])
        if self.is_exact:
            return int(self.blocks[place])
        low = 0 if place == 0 else int(self.blocks[place - 1])
        before = 0.0 if place == 0 else float(self.ratios[place - 1])
        part = (ratio - before) / max(float(self.ratios[place]) - before, 1e-12)
        return low + int(np.ceil(part * (int(self.blocks[place]) - low)))


def lru_curve(trace: Trace, first: float = 0.0, last: float = 1.0) -> Curve:
    """The exact curve of LRU, leaf first, scored on that part of the requests."""
    low, high = int(first * trace.requests), int(last * trace.requests)
    tokens_at = _lru_tokens(
        trace.starts,
        trace.blocks,
        trace.unique_blocks,
        trace.input_tokens,
        np.array([trace.block_tokens, low, high]),
    )
    total = max(1, int(trace.input_tokens[low:high].sum(dtype=np.int64)))
    steps = np.flatnonzero(tokens_at)
    return Curve(steps, np.cumsum(tokens_at[steps]) / total, True)


def _compiled(function: _FunctionT) -> _FunctionT:
    """Numba's decorator, with types."""
    compiled: _FunctionT = njit(cache=True)(function)
    return compiled


@_compiled
def _lru_tokens(
    starts: NDArray[np.int64],
    blocks: NDArray[np.int32],
    unique: int,
    input_tokens: NDArray[np.int32],
    part: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Tokens that are hit from this size on: (unique + 1,), by distance in blocks."""
    block_tokens, low, high = part
    slots = 2 * unique + 1  # a request names no block twice
    tree = np.zeros(slots + 1, np.int32)  # marked slots, after Fenwick
    owner = np.full(slots, -1, np.int32)
    slot_of = np.full(unique, -1, np.int32)
    used, marked = 0, 0
    tokens_at = np.zeros(unique + 1, np.int64)
    for request in range(len(starts) - 1):
        start, stop = starts[request], starts[request + 1]
        farthest = 0
        for at in range(start, stop):
            slot = slot_of[blocks[at]]
            if slot < 0:
                break
            farthest = max(farthest, marked - _marked_before(tree, slot))
            if low <= request < high:
                begins = (at - start) * block_tokens
                tokens_at[farthest] += max(0, min(block_tokens, input_tokens[request] - begins))
        if used + stop - start > slots:
            used = _renumber(tree, owner, slot_of)
        for at in range(stop - 1, start - 1, -1):
            block = blocks[at]
            slot = slot_of[block]
            if slot >= 0:
                owner[slot] = -1
                _mark(tree, slot, -1)
            else:
                marked += 1
            owner[used], slot_of[block] = block, used
            _mark(tree, used, 1)
            used += 1
    return tokens_at


@_compiled
def _marked_before(tree: NDArray[np.int32], slot: int) -> int:
    count = 0
    while slot > 0:
        count += tree[slot]
        slot -= slot & -slot
    return count


@_compiled
def _mark(tree: NDArray[np.int32], slot: int, by: int) -> None:
    place = slot + 1
    while place < len(tree):
        tree[place] += by
        place += place & -place


@_compiled
def _renumber(tree: NDArray[np.int32], owner: NDArray[np.int32], slot_of: NDArray[np.int32]) -> int:
    """Move all marks to the first slots, in order; how many there are."""
    used = 0
    for slot in range(len(owner)):
        block = owner[slot]
        if block >= 0:
            owner[slot] = -1
            owner[used], slot_of[block] = block, used
            used += 1
    tree[:] = 0
    for place in range(1, len(tree)):
        if place <= used:
            tree[place] += 1
        above = place + (place & -place)
        if above < len(tree):
            tree[above] += tree[place]
    return used


def sampled(trace: Trace, share: float, seed: int = 0) -> Trace:
    """About that share of a trace, whole sessions or trees, as a trace with its own dense ids.

    The same share and seed give the same sample. Arrivals are left as they were.
    """
    limit = int(share * (1 << 64))
    keys = _tree_of(trace)
    chosen = {
        int(key): xxhash.xxh3_64_intdigest(int(key).to_bytes(8, "little", signed=True), seed)
        for key in np.unique(keys)
    }
    is_in = np.array([chosen[key] < limit for key in keys.tolist()], dtype=bool)
    counts = np.diff(trace.starts)
    blocks, parents = dense_order(trace.blocks[np.repeat(is_in, counts)], trace.parents)
    return replace(
        trace,
        arrival_ns=trace.arrival_ns[is_in],
        starts=np.concatenate([[0], np.cumsum(counts[is_in])]).astype(np.int64),
        blocks=blocks,
        parents=parents,
        input_tokens=trace.input_tokens[is_in],
        output_tokens=trace.output_tokens[is_in],
        session=trace.session[is_in],
        tenant=trace.tenant[is_in],
        stop=trace.stop[is_in],
        pause_ns=trace.pause_ns[is_in],
        busy_ns=trace.busy_ns[is_in],
    )


def _tree_of(trace: Trace) -> NDArray[np.int64]:
    """(n,): what a request is sampled by: its session, or below 0 its first block off the trunk."""
    uses = np.bincount(trace.blocks, minlength=trace.unique_blocks)
    is_trunk = uses > max(2.0, TRUNK_SHARE * trace.requests)
    keys = np.full(trace.requests, -1, np.int64)
    off = np.flatnonzero(~is_trunk[trace.blocks])
    owners = np.searchsorted(trace.starts, off, side="right") - 1
    requests, firsts = np.unique(owners, return_index=True)
    keys[requests] = -2 - trace.blocks[off[firsts]].astype(np.int64)
    return np.where(trace.session >= 0, trace.session.astype(np.int64), keys)
