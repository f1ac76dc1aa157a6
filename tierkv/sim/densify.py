"""Dense numbers for blocks: a hash table from ids of any kind, and the order of first reference.

The table is open addressing with linear probing over nodes (id, parent), at most half full. Where
ids are chained a node is found by its id alone and its parent is checked; where they are content
it is found by both, which makes any input a prefix tree. Compiled by numba when first used; about
10 ns a reference for tens of millions of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

_FIRST_SLOTS: Final = 1 << 12
_UNCLAIMED: Final = -2  # a node of a request that was refused; whoever comes next gives the parent

_Take: TypeAlias = Callable[..., int]
_Order: TypeAlias = Callable[..., int]


class Densifier:
    """Gives each block a number, in the order in which blocks are taken. Single owner."""

    def __init__(self, *, chained: bool) -> None:
        self._is_chained = chained
        self._slots = np.full(_FIRST_SLOTS, -1, dtype=np.int32)
        self._ids = np.empty(_FIRST_SLOTS // 2, dtype=np.int64)
        self._parents = np.empty(_FIRST_SLOTS // 2, dtype=np.int32)
        self._state = np.zeros(2, dtype=np.int64)  # nodes, claims of the last request

    def take(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """The numbers of one request's blocks, from the root on.

        Raises ValueError for a chained id that has another parent already; later requests are
        then answered as if this one had not been.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        need = int(self._state[0]) + len(ids)
        if need > 1 << 30:
            raise ValueError("more than a thousand million different blocks")
        if need > len(self._ids):
            size = 1 << (2 * need - 1).bit_length()
            self._ids = _longer(self._ids, size // 2)
            self._parents = _longer(self._parents, size // 2)
            self._slots = np.full(size, -1, dtype=np.int32)
            count, by_parent = int(self._state[0]), not self._is_chained
            _rehash_kernel()(self._slots, self._ids, self._parents, count, by_parent)
        out = np.empty(len(ids), dtype=np.int32)
        state, first = self._state, int(self._state[0])
        take = _take_kernel()
        bad = take(self._slots, self._ids, self._parents, state, ids, out, self._is_chained)
        if bad >= 0:
            # What this request brought keeps its nodes, but loses their parents.
            self._parents[first : state[0]] = _UNCLAIMED
            claimed = ~out[:bad]
            self._parents[claimed[claimed >= 0]] = _UNCLAIMED
            raise ValueError(f"block {bad} (id {int(ids[bad])}) had another parent before")
        if state[1]:
            np.copyto(out, ~out, where=out < 0)
        return out

    def parents(self) -> NDArray[np.int32]:
        """The parent of each block, by number; -1 for a root."""
        return self._parents[: self._state[0]]


def dense_order(
    blocks: NDArray[np.int32], parents: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Renumber references in order of first reference: (blocks, parents), both new."""
    if not len(blocks):
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
    number = np.full(len(parents), -1, dtype=np.int32)
    out = np.empty(len(blocks), dtype=np.int32)
    kept = np.empty(len(parents), dtype=np.int32)
    count = _order_kernel()(np.ascontiguousarray(blocks), parents, number, out, kept)
    return out, kept[:count].copy()


def _longer(array: NDArray[Any], size: int) -> NDArray[Any]:
    out = np.empty(size, dtype=array.dtype)
    out[: len(array)] = array
    return out


@cache
def _order_kernel() -> _Order:
    from numba import njit

    def order(
        blocks: NDArray[np.int32],
        parents: NDArray[np.int32],
        number: NDArray[np.int32],
        out: NDArray[np.int32],
        kept: NDArray[np.int32],
    ) -> int:
        count = 0
        for i in range(len(blocks)):
            block = blocks[i]
            if number[block] < 0:
                number[block] = count
                parent = parents[block]
                kept[count] = number[parent] if parent >= 0 else -1
                count += 1
            out[i] = number[block]
        return count

    compiled: _Order = njit(nogil=True)(order)
    return compiled


@cache
def _mix_kernel() -> Callable[[int, int], int]:
    from numba import njit

    def mix(value: int, parent: int) -> int:
        # splitmix64's finaliser.
        x = np.uint64(value) ^ (np.uint64(parent + 2) * np.uint64(0x9E3779B97F4A7C15))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))  # type: ignore[return-value]

    compiled: Callable[[int, int], int] = njit(nogil=True)(mix)
    return compiled


@cache
def _rehash_kernel() -> Callable[..., None]:
    from numba import njit

    mix = _mix_kernel()

    def rehash(
        slots: NDArray[np.int32],
        ids: NDArray[np.int64],
        parents: NDArray[np.int32],
        count: int,
        by_parent: bool,
    ) -> None:
        mask = np.uint64(len(slots) - 1)
        for node in range(count):
            at = mix(ids[node], parents[node] if by_parent else -1) & mask
            while slots[at] >= 0:
                at = (at + np.uint64(1)) & mask
            slots[at] = node

    compiled: Callable[..., None] = njit(nogil=True)(rehash)
    return compiled


@cache
def _take_kernel() -> _Take:
    """Into out the nodes, inverted where one was claimed; -1, or the position of a refused id."""
    from numba import njit

    mix = _mix_kernel()

    def take(
        slots: NDArray[np.int32],
        ids: NDArray[np.int64],
        parents: NDArray[np.int32],
        state: NDArray[np.int64],
        wanted: NDArray[np.int64],
        out: NDArray[np.int32],
        chained: bool,
    ) -> int:
        mask = np.uint64(len(slots) - 1)
        before = -1
        claims = 0
        for i in range(len(wanted)):
            value = wanted[i]
            at = mix(value, -1 if chained else before) & mask
            node = -1
            while slots[at] >= 0:
                found = slots[at]
                if ids[found] == value and (chained or parents[found] == before):
                    node = found
                    break
                at = (at + np.uint64(1)) & mask
            if node < 0:
                node = state[0]
                slots[at] = node
                ids[node] = value
                parents[node] = before
                state[0] += 1
                out[i] = node
            elif parents[node] == _UNCLAIMED:
                parents[node] = before
                out[i] = ~node  # marked, in case of a refusal further on
                claims += 1
            elif parents[node] != before:
                return i
            else:
                out[i] = node
            before = node
        state[1] = claims
        return -1

    compiled: _Take = njit(nogil=True)(take)
    return compiled
