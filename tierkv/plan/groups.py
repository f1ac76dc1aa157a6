"""Groups: what each request used last, ranked by what keeping it is worth.

The cache that `adaptive` keeps of its tier, as arrays. A request leaves up to three groups of
consecutive blocks of its chain, one a segment (see `hazard`); a block belongs to the group of the
request that used it last. Groups grow older together, bin by bin; blocks that were given up stay in
their group as *ghosts*, so that a return is an event although nothing was kept, up to a cap.

Given up is the last resident block of the group that is worth least, if nothing resident continues
it: leaves before their parents, whatever they are worth. What a group is worth is computed when it
enters a bin.

A block is an id from 0; ids are the caller's, whose `parents` are known before they are used.
Everything is changed in place. Single owner. Compiled by numba.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierkv.core.compiled import compiled
from tierkv.plan import hazard
from tierkv.plan.hazard import FACTORS, FEATURES, PAUSE_WEIGHT, SEGMENTS, Model

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

NONE: Final = -1

#: Weight of a group of n blocks in the model: n ** this. The blocks of one request return together,
#: so that a long one is not many findings.
WEIGHT_POWER: Final = 0.25
#: Ghosts that are remembered, by blocks of the capacity.
GHOSTS_PER_PLACE: Final = 4

#: How far a hint is believed that says when a session goes on.
_DUE_CHANCE: Final = 0.9

# Counts, by place in `Cache.counts`.
RESIDENT: Final = 0
GHOSTS: Final = 1
CANDIDATES: Final = 2
FREE: Final = 3  # the first free group; free ones are linked by `older`
REQUESTS: Final = 4
GHOSTS_MAX: Final = 5
_COUNTS: Final = 6


#: By block: its parent; the group that used it last (NONE: never, or forgotten); how many resident
#: blocks and how many whole ones (0, 1, or more) continue it.
BLOCK: Final = np.dtype(
    [("parent", "i4"), ("group", "i4"), ("children", "i4"), ("branches", "u1"), ("resident", "u1")],
    align=True,
)
#: By group: its blocks are a run of one chain, residents first, ghosts behind them. `tail` is the
#: last resident, `end` the last; `turn` and `length` are the request's, `last` and `usual` its
#: session's pauses as log(1 + s), below 0 where there was none; `place` is among the candidates;
#: `older` and `newer` are neighbours in the list of its bin.
GROUP: Final = np.dtype(
    [
        ("time_s", "f8"), ("due_s", "f8"), ("weight", "f4"), ("last", "f4"), ("usual", "f4"),
        ("tail", "i4"), ("end", "i4"), ("resident", "i4"), ("blocks", "i4"),
        ("turn", "i4"), ("length", "i4"), ("place", "i4"), ("older", "i4"), ("newer", "i4"),
        ("segment", "u1"), ("bin", "u1"), ("levels", "u1", (len(FACTORS),)),
    ],
    align=True,
)  # fmt: skip
Records = NDArray[np.void]


class Ranks(NamedTuple):
    """Groups that can be given up from, in no order: worth = at_zero + slope * time."""

    group: Ints
    at_zero: Floats
    slope: Floats
    due_s: Floats


class Cache(NamedTuple):
    """See the module."""

    model: Model
    blocks: Records
    groups: Records
    ranks: Ranks
    scratch: Floats
    oldest: Ints  # by bin
    newest: Ints
    counts: Longs


class Request(NamedTuple):
    """What is known of a request when it has used its chain."""

    now_s: float
    answer_tokens: int
    stop: int  # see `hazard.STOPS`
    due_s: float  # when its session is said to go on; below 0: nobody said


def new_cache(blocks: int, groups: int, ghosts_max: int) -> Cache:
    """An empty cache for block ids below `blocks`."""
    model = hazard.new_model()
    bins = len(model.edges) - 1

    def ints(count: int) -> Ints:
        return np.full(count, NONE, np.int32)

    counts = np.zeros(_COUNTS, np.int64)
    counts[GHOSTS_MAX] = ghosts_max
    records = np.zeros(groups, GROUP)
    records["older"][:-1] = np.arange(1, groups)
    records["older"][-1] = NONE
    known = np.zeros(blocks, BLOCK)
    known["parent"] = known["group"] = NONE
    return Cache(
        model=model,
        blocks=known,
        groups=records,
        ranks=Ranks(ints(groups), *np.zeros((3, groups))),
        scratch=np.zeros(bins),
        oldest=ints(bins),
        newest=ints(bins),
        counts=counts,
    )


# ---- time


@compiled
def age(cache: Cache, now_s: float) -> None:
    """Let groups enter the bins that they have reached."""
    model, groups = cache.model, cache.groups
    edges = model.edges
    for bin_ in range(len(edges) - 2):
        group = cache.oldest[bin_]
        while group != NONE and groups[group].time_s + edges[bin_ + 1] <= now_s:
            _unlist(cache, group)
            groups[group].bin = bin_ + 1
            _list(cache, group)
            weight = groups[group].weight * groups[group].blocks
            hazard.at_risk(model, groups[group].segment, groups[group].levels, bin_ + 1, weight)
            if groups[group].place != NONE:
                _rank(cache, group)
            group = cache.oldest[bin_]


@compiled
def _list(cache: Cache, group: int) -> None:
    groups = cache.groups
    bin_ = groups[group].bin
    last = cache.newest[bin_]
    groups[group].older, groups[group].newer = last, NONE
    if last == NONE:
        cache.oldest[bin_] = group
    else:
        groups[last].newer = group
    cache.newest[bin_] = group


@compiled
def _unlist(cache: Cache, group: int) -> None:
    groups = cache.groups
    bin_, older, newer = groups[group].bin, groups[group].older, groups[group].newer
    if older == NONE:
        cache.oldest[bin_] = newer
    else:
        groups[older].newer = newer
    if newer == NONE:
        cache.newest[bin_] = older
    else:
        groups[newer].older = older


# ---- candidates: groups that can be given up from


@compiled
def _rank(cache: Cache, group: int) -> None:
    """Note what a group is worth while it is in its bin."""
    groups, ranks, edges = cache.groups, cache.ranks, cache.model.edges
    place = groups[group].place
    if place == NONE:
        place = groups[group].place = cache.counts[CANDIDATES]
        cache.counts[CANDIDATES] += 1
        ranks.group[place] = group
    bin_ = groups[group].bin
    first, last = hazard.worth(
        cache.model, groups[group].segment, groups[group].levels, bin_, cache.scratch
    )
    slope = (last - first) / (edges[bin_ + 1] - edges[bin_])
    start = groups[group].time_s + edges[bin_]
    ranks.slope[place] = slope
    ranks.at_zero[place] = first - slope * start
    ranks.due_s[place] = groups[group].due_s


@compiled
def _unrank(cache: Cache, group: int) -> None:
    groups, ranks = cache.groups, cache.ranks
    place = groups[group].place
    if place == NONE:
        return
    groups[group].place = NONE
    cache.counts[CANDIDATES] -= 1
    last = cache.counts[CANDIDATES]
    moved = ranks.group[place] = ranks.group[last]
    if place != last:
        ranks.slope[place], ranks.at_zero[place] = ranks.slope[last], ranks.at_zero[last]
        ranks.due_s[place] = ranks.due_s[last]
        groups[moved].place = place


@compiled
def _least(cache: Cache, now_s: float) -> int:
    """The candidate that is worth least now; of equals the oldest."""
    ranks, groups = cache.ranks, cache.groups
    best, found = np.inf, NONE
    for place in range(cache.counts[CANDIDATES]):
        worth = ranks.at_zero[place] + ranks.slope[place] * now_s
        due_s = ranks.due_s[place]
        if due_s > now_s:
            worth = max(worth, _DUE_CHANCE / (due_s - now_s))
        if worth < best or (
            worth == best and groups[ranks.group[place]].time_s < groups[found].time_s
        ):
            best, found = worth, ranks.group[place]
    return found


# ---- use


@compiled
def use(cache: Cache, chain: Ints, whole: int, tokens: int, request: Request) -> None:
    """A request used all blocks of a chain, root first; all of them are resident now.

    chain: (n,), of which the first `whole` are whole blocks of `tokens` tokens.
    """
    now_s, answer_tokens, stop, due_s = request
    blocks, groups, counts = cache.blocks, cache.groups, cache.counts
    age(cache, now_s)
    counts[REQUESTS] += 1
    if counts[REQUESTS] % hazard.FIT_EVERY == 0:
        hazard.fit(cache.model, 2.0 ** (-hazard.FIT_EVERY / hazard.HALF_LIFE))
        for place in range(counts[CANDIDATES]):
            _rank(cache, cache.ranks.group[place])
    count = len(chain)
    seen = 0
    while seen < count and blocks[chain[seen]].group != NONE:
        seen += 1
    turn, last, usual = _session(cache, chain, seen, now_s)
    features, levels = np.empty(len(FEATURES)), np.empty(len(FACTORS), np.uint8)
    new = (count - seen) * tokens
    features[0], features[1], features[2] = turn, new, answer_tokens
    features[3] = -1.0 if last < 0 else math.exp(last) - 1.0
    features[4] = -1.0 if usual < 0 else math.exp(usual) - 1.0
    features[5] = stop
    hazard.levels_of(features, levels)

    for at in range(seen, whole):
        if at and blocks[chain[at - 1]].branches < 2:
            blocks[chain[at - 1]].branches += 1
    shared = whole
    while shared and blocks[chain[shared - 1]].branches < 2:
        shared -= 1
    made = np.full(SEGMENTS, NONE, np.int32)
    start = 0
    for segment, stop_ in enumerate((shared, whole, count)):
        if stop_ > start:
            group = made[segment] = counts[FREE]
            counts[FREE] = groups[group].older
            groups[group].time_s, groups[group].due_s = now_s, due_s
            groups[group].segment = segment
            groups[group].bin = 0
            groups[group].place = NONE
            groups[group].levels[:] = levels
            groups[group].turn, groups[group].length = turn, count
            groups[group].last, groups[group].usual = last, usual
            _take(cache, group, chain, start, stop_)
            start = stop_
    for group in made:  # when all are there, as one may go on where another ends
        if group != NONE and not blocks[groups[group].tail].children:
            _rank(cache, int(group))


@compiled
def _session(cache: Cache, chain: Ints, seen: int, now_s: float) -> tuple[int, float, float]:
    """Turn, last and usual pause of a request of whose chain so many blocks were seen before.

    It goes on with a session if those are all that an earlier request had, but for its last block.
    """
    groups = cache.groups
    if not seen:
        return 0, -1.0, -1.0
    before = cache.blocks[chain[seen - 1]].group
    if seen < groups[before].length - 1:
        return 0, -1.0, -1.0
    last, usual = math.log(1.0 + now_s - groups[before].time_s), float(groups[before].usual)
    usual = last if usual < 0 else usual + PAUSE_WEIGHT * (last - usual)
    return groups[before].turn + 1, last, usual


@compiled
def _take(cache: Cache, group: int, chain: Ints, start: int, stop: int) -> None:
    """Give ``chain[start:stop]`` to a new group."""
    blocks, groups, counts = cache.blocks, cache.groups, cache.counts
    count = stop - start
    weight = float(count) ** (WEIGHT_POWER - 1.0)
    groups[group].weight = weight
    groups[group].resident = groups[group].blocks = count
    groups[group].tail = groups[group].end = chain[stop - 1]
    if groups[group].segment < SEGMENTS - 1:
        cache.model.weights[0] += weight * count
        cache.model.weights[1] += 1.0
    hazard.at_risk(cache.model, groups[group].segment, groups[group].levels, 0, weight * count)
    at, arrived = start, 0
    while at < stop:
        block = chain[at]
        before = blocks[block].group
        if before == NONE:
            blocks[block].group = group
            arrived += 1
            blocks[block].resident = 1
            if blocks[block].parent != NONE:
                blocks[blocks[block].parent].children += 1
            at += 1
            continue
        # A run of one group at a time: most chains were used as a whole by one request before.
        run, stayed = at, 0
        while run < stop and blocks[chain[run]].group == before:
            block = chain[run]
            blocks[block].group = group
            if blocks[block].resident:
                stayed += 1
            else:
                arrived += 1
                counts[GHOSTS] -= 1
                blocks[block].resident = 1
                if blocks[block].parent != NONE:
                    blocks[blocks[block].parent].children += 1
            run += 1
        hazard.used(
            cache.model, groups[before].segment, groups[before].levels, groups[before].bin,
            groups[before].weight * (run - at),
        )  # fmt: skip
        groups[before].blocks -= run - at
        groups[before].resident -= stayed
        at = run
        if not groups[before].resident:
            _unrank(cache, before)
        if not groups[before].blocks:
            _forget(cache, before)
    counts[RESIDENT] += arrived
    _list(cache, group)


@compiled
def _forget(cache: Cache, group: int) -> None:
    """A group has no block left: its place is free."""
    _unlist(cache, group)
    cache.groups[group].older = cache.counts[FREE]
    cache.counts[FREE] = group


# ---- giving up


@compiled
def shrink(cache: Cache, capacity: int, now_s: float) -> None:
    """Give up blocks until `capacity` are left."""
    counts, groups = cache.counts, cache.groups
    while counts[RESIDENT] > capacity:
        group = _least(cache, now_s)
        while counts[RESIDENT] > capacity:
            _give_up(cache, group)
            if groups[group].place == NONE:
                break
    if counts[GHOSTS] > counts[GHOSTS_MAX]:
        _forget_ghosts(cache)


@compiled
def _give_up(cache: Cache, group: int) -> None:
    """Give up the last resident block of a group, which nothing resident continues."""
    blocks, groups = cache.blocks, cache.groups
    block = groups[group].tail
    parent = blocks[block].parent
    blocks[block].resident = 0
    cache.counts[RESIDENT] -= 1
    cache.counts[GHOSTS] += 1
    groups[group].resident -= 1
    groups[group].tail = parent
    if parent == NONE:
        _unrank(cache, group)
        return
    blocks[parent].children -= 1
    if not groups[group].resident:
        _unrank(cache, group)
        above = blocks[parent].group
        if not blocks[parent].children and groups[above].tail == parent:
            _rank(cache, above)
    elif blocks[parent].children:
        _unrank(cache, group)


@compiled
def _forget_ghosts(cache: Cache) -> None:
    """Forget the oldest ghosts, until an eighth of what is allowed is free again."""
    blocks, groups, counts = cache.blocks, cache.groups, cache.counts
    wanted = counts[GHOSTS_MAX] - counts[GHOSTS_MAX] // 8
    for bin_ in range(len(cache.oldest) - 1, -1, -1):
        group = cache.oldest[bin_]
        while group != NONE and counts[GHOSTS] > wanted:
            newer = groups[group].newer
            ghosts = groups[group].blocks - groups[group].resident
            block = groups[group].end
            for _ in range(ghosts):
                blocks[block].group = NONE
                block = blocks[block].parent
            counts[GHOSTS] -= ghosts
            groups[group].blocks -= ghosts
            groups[group].end = block
            if not groups[group].blocks:
                _forget(cache, group)
            group = newer
