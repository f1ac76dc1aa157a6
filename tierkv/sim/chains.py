"""Chains: the keys of a trace's requests, made once, as a planner takes them.

A key is the dense id of a block and its parent's, scattered over 32 bytes: as different blocks have
different ids, no two share one, and making a million takes a second.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tierkv.core.keys import KEY_BYTES
from tierkv.sim.trace import Trace

_ODD: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


class Chains:
    """Keys of whole blocks by request. Read only."""

    def __init__(self, trace: Trace) -> None:
        self._keys = _keys_of(trace.parents)
        self._blocks = trace.blocks
        self._starts = trace.starts.tolist()
        counts = np.minimum(np.diff(trace.starts), trace.input_tokens // trace.block_tokens)
        #: Whole blocks of each request; a partial tail is not stored.
        self.counts: list[int] = counts.tolist()
        #: The next request of the same session, or -1.
        self.following: list[int] = following_of(trace.session).tolist()
        kept = (trace.input_tokens.astype(np.int64) + trace.output_tokens) // trace.block_tokens
        self._whole_after: list[int] = kept.tolist()

    def of(self, request: int) -> list[bytes]:
        """The keys of a request's whole blocks."""
        start = self._starts[request]
        found: list[bytes] = self._keys[self._blocks[start : start + self.counts[request]]].tolist()
        return found

    def with_answer(self, request: int) -> list[bytes]:
        """The same and the blocks that its answer filled, as far as the session's next shows them.

        The next prompt is taken to be this one, the answer, and more; where it does not begin with
        this one's blocks, nothing is known of the answer.
        """
        after, count = self.following[request], self.counts[request]
        stop = min(self._whole_after[request], self.counts[after]) if after >= 0 else 0
        keys = self.of(request)
        if stop <= count:
            return keys
        start, then = self._starts[request], self._starts[after]
        if count and self._blocks[start + count - 1] != self._blocks[then + count - 1]:
            return keys
        more: list[bytes] = self._keys[self._blocks[then + count : then + stop]].tolist()
        return keys + more


def following_of(session: NDArray[np.int32]) -> NDArray[np.int64]:
    """For each request, the next of its session; -1 for a session's last, and without sessions."""
    order = np.argsort(session, kind="stable")
    found = np.full(len(session), -1, np.int64)
    same = (session[order[:-1]] == session[order[1:]]) & (session[order[1:]] >= 0)
    found[order[:-1][same]] = order[1:][same]
    return found


def _keys_of(parents: NDArray[np.int32]) -> NDArray[np.object_]:
    words = np.zeros((len(parents), KEY_BYTES // 8), np.uint64)
    ids = np.arange(len(parents), dtype=np.uint64)
    words[:, 0] = (ids + np.uint64(1)) * _ODD
    words[:, 1] = (parents.astype(np.int64) + 2).astype(np.uint64) * _ODD
    words[:, 2] = ids
    raw = words.tobytes()
    keys = np.empty(len(parents), object)
    keys[:] = [raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)]
    return keys
