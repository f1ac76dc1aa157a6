"""History: what clients wrote and read of each key, and whether one cache can have been all that.

A cache is a register that may forget at any time: a write of a key that it has not forgotten does
nothing, a read gives what the register holds or nothing. So what is to be explained is who read
which value when. Every value is written once. Read operations that got a value, and its write, form
a **cluster**; the register held that value from the earliest end to the latest beginning of any of
its operations (a forward zone), or, if those are the other way round, at some moment in between (a
backward zone). All is explained if no two forward zones of a key overlap and no backward zone lies
within forward ones.

After P. Gibbons, E. Korach, Testing Shared Memories, SIAM J. Comput. 26(4), 1997, section 4.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

#: The end of an operation that never came back.
NEVER = 1 << 62


class Span(NamedTuple):
    """When an operation was asked for, and when it came back; times that nobody shares."""

    begun: int
    ended: int


@dataclass(slots=True)
class _Cluster:
    """The operations with one value."""

    write: Span
    last_begun: int
    first_ended: int
    reads: int = 0


class History:
    """See the module. One thread at a time.

    `copies`: so many registers may hold values of one key at once. Where clients write different
    bytes under one key, a cache of several tiers is one register for each: they took what they
    lacked.
    """

    def __init__(self, copies: int = 1) -> None:
        self._copies = copies
        self._keys: dict[Hashable, dict[Hashable, _Cluster]] = {}

    def writes(self, key: Hashable, value: Hashable, begun: int) -> None:
        """A write is asked for; whether it takes effect is the cache's business."""
        self._keys.setdefault(key, {})[value] = _Cluster(Span(begun, NEVER), begun, NEVER)

    def wrote(self, key: Hashable, value: Hashable, ended: int) -> None:
        """That write came back."""
        cluster = self._keys[key][value]
        cluster.write = Span(cluster.write.begun, ended)
        cluster.first_ended = min(cluster.first_ended, ended)

    def was_written(self, key: Hashable, value: Hashable) -> bool:
        """Whether a write of this value was asked for."""
        return value in self._keys.get(key, {})

    def read(self, key: Hashable, value: Hashable, span: Span) -> None:
        """A read got this value. KeyError for one that was never written."""
        cluster = self._keys[key][value]
        cluster.reads += 1
        cluster.last_begun = max(cluster.last_begun, span.begun)
        cluster.first_ended = min(cluster.first_ended, span.ended)

    def unexplained(self) -> list[str]:
        """What no register can have done, in words."""
        found: list[str] = []
        for key, clusters in self._keys.items():
            seen = {value: cluster for value, cluster in clusters.items() if cluster.reads}
            for value, cluster in seen.items():
                if cluster.first_ended < cluster.write.begun:
                    found.append(f"{key}: {value} was read before it was written")
            found += _crowds(key, seen, self._copies)
        return found

    def settled_before(self, begun: int, ended: int) -> Iterator[tuple[Hashable, Hashable]]:
        """Keys and values whose write came back before `begun`, and that were read after `ended`.

        A value is written once, so it was there all the time in between.
        """
        for key, clusters in self._keys.items():
            for value, cluster in clusters.items():
                if cluster.reads and cluster.write.ended < begun and ended < cluster.last_begun:
                    yield key, value


def _crowds(key: Hashable, clusters: dict[Hashable, _Cluster], copies: int) -> list[str]:
    """Values that were seen while as many others as there are registers must have been there."""
    forward: list[tuple[int, int, Hashable]] = []
    backward: list[tuple[int, int, Hashable]] = []
    for value, cluster in clusters.items():
        low, high = sorted((cluster.first_ended, cluster.last_begun))
        is_forward = cluster.first_ended < cluster.last_begun
        (forward if is_forward else backward).append((low, high, value))
    found: list[str] = []
    for low, _, value in forward:
        there = [zone[2] for zone in forward if zone[0] < low < zone[1]]
        if len(there) >= copies:
            found.append(f"{key}: {value} was seen while {there} were there")
    for low, high, value in backward:
        # All of the time when it may have been there, others filled every register.
        ends = sorted({low, high, *(t for zone in forward for t in zone[:2] if low < t < high)})
        gaps = [(a + b) / 2 for a, b in pairwise(ends)]
        crowds = [[zone[2] for zone in forward if zone[0] < at < zone[1]] for at in gaps]
        if crowds and min(map(len, crowds)) >= copies:
            found.append(f"{key}: {value} was seen while {crowds[0]} were there")
    return found
