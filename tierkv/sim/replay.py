"""Plain replay: a trace through one tier with any policy, block by block, and what was hit.

A page is a block, and nothing takes time: a request finds the longest prefix that is resident, and
stores the rest at once. For a tier with pages of one block that is what the planner does with
`Acquire`, `Put`, `Filled` and `Release`; a property holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from tierkv.plan.policies.base import UNNAMED, About, EvictionPolicy, Name
from tierkv.plan.room import pages_to_evict

_HIT, _MISS = 1, 0


@dataclass(frozen=True, slots=True)
class Replay:
    """What each request hit, in blocks, and what was resident at the end."""

    #: How long the longest resident prefix was when the request came.
    prefix_hits: NDArray[np.int32]
    #: How many of the request's blocks were resident then.
    block_hits: NDArray[np.int32]
    #: Ids of the blocks that are resident after the last request, in order.
    resident: NDArray[np.int64]


def replay(
    policy: EvictionPolicy,
    starts: NDArray[np.int64],
    blocks: NDArray[np.int32],
    capacity: int,
    now_ns: NDArray[np.int64] | None = None,
    *,
    unit: Literal["request", "block"] = "request",
    names: Sequence[Name] | None = None,
) -> Replay:
    """Send requests through a tier of `capacity` blocks that `policy`, made for it, ranks.

    starts: (n + 1,).  blocks: dense ids; request i is the chain ``blocks[starts[i]:starts[i + 1]]``
    and names no block twice.  now_ns: (n,), the time of each, else 0, 1, 2, ...
    unit: "block" takes each reference for a request of its own, in order, as simulators of caches
    do: what is used is touched, what is absent takes the place of one other.
    names: by what the policy knows each block; its id, if None.
    """
    tier = _Tier(policy, capacity, int(blocks.max(initial=-1)) + 1, names)
    bounds = starts.tolist()
    times = range(len(bounds) - 1) if now_ns is None else now_ns.tolist()
    serve = tier.serve if unit == "request" else tier.serve_each
    prefix_hits, block_hits = [], []
    for number, now in enumerate(times):
        hits = serve(blocks[bounds[number] : bounds[number + 1]].tolist(), now)
        prefix = hits.find(_MISS)
        prefix_hits.append(len(hits) if prefix < 0 else prefix)
        block_hits.append(hits.count(_HIT))
    return Replay(
        np.array(prefix_hits, np.int32),
        np.array(block_hits, np.int32),
        np.flatnonzero(np.frombuffer(tier.resident, np.uint8)),
    )


class _Tier:
    """What is resident. Invariant: the policy tracks exactly that, at most `capacity` blocks."""

    def __init__(
        self, policy: EvictionPolicy, capacity: int, ids_end: int, names: Sequence[Name] | None
    ) -> None:
        self.resident = bytearray(ids_end)
        self._policy = policy
        self._capacity = capacity
        self._names: Sequence[Name] = range(ids_end) if names is None else names
        self._free = capacity
        # Its look-up is the predicate of evictions: no call of ours a page.
        self._may_go = bytearray(b"\1") * ids_end
        self._is_evictable = cast("Callable[[int], bool]", self._may_go.__getitem__)

    def serve(self, chain: list[int], now: int) -> bytes:
        """One request; gives a byte for each of its blocks, `_HIT` or `_MISS`."""
        hits = bytes(map(self.resident.__getitem__, chain))
        prefix = hits.find(_MISS)
        if prefix < 0:
            self._policy.touch(reversed(chain), now)
            return hits
        if prefix:
            self._policy.touch(reversed(chain[:prefix]), now)
        if _HIT in hits[prefix:]:
            absent = [at for at, hit in enumerate(hits) if not hit]
            there = [block for block, hit in zip(chain, hits, strict=True) if hit]
        else:
            absent, there = list(range(prefix, len(chain))), chain[:prefix]
        if self._policy.wants_names:
            names = self._names
            self._policy.expect([names[chain[at]] for at in absent])
        if len(absent) > self._free:
            self._make_room(len(absent) - self._free, there, now)
            del absent[self._free :]  # the head of what does not fit is kept
        if absent:
            self._store(chain, absent, now)
            if absent[-1] >= len(absent):  # else all of it is new, and in order
                self._policy.renew(chain[absent[-1] :: -1], now)
        return hits

    def serve_each(self, chain: list[int], now: int) -> bytes:
        """As `serve`, each block for itself."""
        policy, resident, names = self._policy, self.resident, self._names
        wants = policy.wants_names
        hits = bytearray()
        for block in chain:
            hits.append(resident[block])
            if resident[block]:
                policy.touch((block,), now)
                continue
            if wants:
                policy.expect((names[block],))
            if not self._free:
                for victim in policy.evict(1, self._is_evictable, now):
                    resident[victim] = 0
                    self._free += 1
            if self._free:
                policy.track(block, now, About(names[block]) if wants else UNNAMED)
                resident[block] = 1
                self._free -= 1
        return bytes(hits)

    def _make_room(self, wanted: int, there: list[int], now: int) -> None:
        """Evict so many blocks, or a few more, but none of `there`."""
        may_go, resident = self._may_go, self.resident
        for block in there:
            may_go[block] = 0
        victims = self._policy.evict(
            pages_to_evict(wanted, self._capacity), self._is_evictable, now
        )
        for block in there:
            may_go[block] = 1
        for block in victims:
            resident[block] = 0
        self._free += len(victims)

    def _store(self, chain: list[int], absent: list[int], now: int) -> None:
        """Blocks of a chain become resident, the last first."""
        resident, track, names = self.resident, self._policy.track, self._names
        if self._policy.wants_names:
            for at in reversed(absent):
                block = chain[at]
                resident[block] = 1
                track(block, now, About(names[block], 1.0, at))
        else:
            for at in reversed(absent):
                block = chain[at]
                resident[block] = 1
                track(block, now, UNNAMED)
        self._free -= len(absent)
