"""Trace: requests in order of arrival as arrays, and the builder that makes one of any ids.

Blocks form a prefix tree: a request refers to a chain of blocks from a root, so that a block's
identity includes all that precedes it. Ids are dense and in order of first reference; therefore

1. a parent's id is less than its child's, and every request refers to a whole path from a root;
2. at the time of request i the blocks seen before are exactly those with an id less than one more
   than the largest id in ``blocks[:starts[i]]``.

Block k of a request covers its tokens [k * block_tokens, (k + 1) * block_tokens), cut at
`input_tokens`: the last block may be partial, and some traces leave a partial block out. k blocks
of a request are therefore ``min(k * block_tokens, input_tokens)`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tierkv.core.errors import ConfigError
from tierkv.sim.densify import Densifier, dense_order

TOKENS_MAX: Final = 1 << 30
NS_MAX: Final = 1 << 61
SECOND_NS: Final = 1_000_000_000


class Stop(IntEnum):
    """Why an answer ended, as far as the trace says."""

    UNKNOWN = 0
    END = 1
    TOOL = 2
    LENGTH = 3


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """Where a trace is from, and what in it is not from there.

    digest: hex, of the content that was read. bad_lines: how many were left out; `problems` has
    the first of them as `file:line: reason`. synthesised: what was made up, and how. settings:
    what the reader or the generator was asked for, defaults included.
    """

    format: str
    source: tuple[str, ...] = ()
    digest: str = ""
    bad_lines: int = 0
    problems: tuple[str, ...] = ()
    synthesised: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


#: Names of the arrays of a trace with their types: what is cached, converted and compared.
ARRAYS: Final[dict[str, str]] = {
    "arrival_ns": "<i8",
    "starts": "<i8",
    "blocks": "<i4",
    "parents": "<i4",
    "input_tokens": "<i4",
    "output_tokens": "<i4",
    "session": "<i4",
    "tenant": "<i2",
    "stop": "<i1",
    "pause_ns": "<i8",
    "busy_ns": "<i8",
}


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival, as arrays: n requests, m references to u unique blocks.

    arrival_ns: (n,), non-decreasing, from the first request's 0.
    starts: (n + 1,): request i refers to ``blocks[starts[i]:starts[i + 1]]``.
    blocks: (m,), dense ids in order of first reference.  parents: (u,), -1 for a root.
    input_tokens, output_tokens: (n,), output 0 where not known.
    session: (n,), a thread of turns (a sub-agent has its own), -1 where not known.
    tenant: (n,), 0 where there is one.  stop: (n,), of `Stop`.
    pause_ns: (n,), what an engine could hint at the end of the answer: the time from there until
    the session's next request is sent; -1 where not known, as for a session's last.
    busy_ns: (n,), how long the request ran, where the trace says so; -1 where not.
    """

    name: str
    block_tokens: int
    arrival_ns: NDArray[np.int64]
    starts: NDArray[np.int64]
    blocks: NDArray[np.int32]
    parents: NDArray[np.int32]
    input_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    session: NDArray[np.int32]
    tenant: NDArray[np.int16]
    stop: NDArray[np.int8]
    pause_ns: NDArray[np.int64]
    busy_ns: NDArray[np.int64]
    facts: TraceFacts

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.arrival_ns)

    @property
    def references(self) -> int:
        """How many references to blocks all requests have together."""
        return len(self.blocks)

    @property
    def unique_blocks(self) -> int:
        """How many different blocks are referred to."""
        return len(self.parents)

    @property
    def duration_ns(self) -> int:
        """From the first arrival to the last."""
        return int(self.arrival_ns[-1]) if self.requests else 0

    @property
    def duration(self) -> float:
        """From the first arrival to the last, in seconds."""
        return self.duration_ns / SECOND_NS

    def check(self) -> None:
        """Raise ValueError unless everything that this class promises holds."""
        n = self.requests
        _require(self.block_tokens > 0, "block_tokens is not positive")
        for name, kind in ARRAYS.items():
            array = getattr(self, name)
            _require(array.dtype == np.dtype(kind) and array.ndim == 1, f"{name} is no {kind}")
            if name not in ("starts", "blocks", "parents"):
                _require(len(array) == n, f"{name} has not one value for each request")
        _require(len(self.starts) == n + 1 and self.starts[0] == 0, "starts does not fit")
        _require(int(self.starts[-1]) == self.references, "starts and blocks do not fit")
        counts = np.diff(self.starts)
        _require(bool((counts >= 0).all()), "starts goes back")
        _require(bool((np.diff(self.arrival_ns) >= 0).all()), "arrivals are not in order")
        _require(n == 0 or self.arrival_ns[0] == 0, "the first arrival is not 0")
        size = self.block_tokens
        whole = self.input_tokens // size
        fits = (counts >= whole) & (counts <= -(-self.input_tokens.astype(np.int64) // size))
        _require(bool(fits.all()), "the number of blocks does not fit the input's tokens")
        _require(bool((self.output_tokens >= 0).all()), "a negative number of output tokens")
        self._check_tree()

    def _check_tree(self) -> None:
        blocks, parents = self.blocks, self.parents
        ids = np.arange(self.unique_blocks, dtype=np.int32)
        _require(bool(((parents >= -1) & (parents < ids)).all()), "a parent is after its child")
        if not self.references:
            _require(self.unique_blocks == 0, "blocks that nothing refers to")
            return
        _require(bool((blocks >= 0).all()), "a negative block")
        highest = np.maximum.accumulate(blocks)
        grows = np.diff(highest, prepend=np.int32(-1))
        _require(bool((grows <= 1).all()), "ids are not in order of first reference")
        _require(int(highest[-1]) + 1 == self.unique_blocks, "blocks that nothing refers to")
        before = np.empty_like(blocks)
        before[1:] = blocks[:-1]
        before[self.starts[:-1][np.diff(self.starts) > 0]] = -1
        _require(bool((parents[blocks] == before).all()), "a block does not follow its parent")

    def cut(self, first: int, stop: int) -> Trace:
        """The requests [first, stop) as a trace of their own: dense ids, arrivals from 0."""
        first, stop, _ = slice(first, stop).indices(self.requests)
        stop = max(first, stop)
        low, high = self.starts[first], self.starts[stop]
        blocks, parents = dense_order(self.blocks[low:high], self.parents)
        part = slice(first, stop)
        arrival = self.arrival_ns[part]
        return replace(
            self,
            arrival_ns=arrival - arrival[0] if len(arrival) else arrival.copy(),
            starts=self.starts[first : stop + 1] - low,
            blocks=blocks,
            parents=parents,
            input_tokens=self.input_tokens[part],
            output_tokens=self.output_tokens[part],
            session=self.session[part],
            tenant=self.tenant[part],
            stop=self.stop[part],
            pause_ns=self.pause_ns[part],
            busy_ns=self.busy_ns[part],
        )


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise ValueError(f"not a trace: {what}")


class TraceBuilder:
    """Takes requests in any order, with ids of any kind, and makes a `Trace`. Single owner.

    chained: an id names a block with all that precedes it, so it has one parent; a request that
    gives it another is refused. Otherwise an id names a block's content, and a block is its
    content after that of its parent.
    """

    def __init__(self, name: str, block_tokens: int, *, chained: bool = True) -> None:
        if not 0 < block_tokens <= TOKENS_MAX:
            raise ConfigError(f"a block of {block_tokens} tokens")
        self._name = name
        self._block_tokens = block_tokens
        self._ids = Densifier(chained=chained)
        self._rows: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._chunks: list[NDArray[np.int32]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        arrival_ns: int,
        ids: NDArray[np.int64],
        *,
        input_tokens: int,
        output_tokens: int = 0,
        session: int = -1,
        tenant: int = 0,
        stop: Stop = Stop.UNKNOWN,
        pause_ns: int = -1,
        busy_ns: int = -1,
    ) -> None:
        """Take one request. Raises ValueError, changing nothing, if it cannot be one."""
        size, count = self._block_tokens, len(ids)
        if not 0 < input_tokens <= TOKENS_MAX:
            raise ValueError(f"{input_tokens} input tokens")
        if not 0 <= output_tokens <= TOKENS_MAX:
            raise ValueError(f"{output_tokens} output tokens")
        if not input_tokens // size <= count <= -(-input_tokens // size):
            raise ValueError(f"{count} blocks of {size} tokens for {input_tokens} input tokens")
        if max(abs(arrival_ns), pause_ns, busy_ns) > NS_MAX:
            raise ValueError("a time out of range")
        if not -1 <= session < 1 << 31 or not 0 <= tenant < 1 << 15:
            raise ValueError(f"session {session} or tenant {tenant} out of range")
        self._chunks.append(self._ids.take(ids))
        row = (input_tokens, output_tokens, session, tenant, int(stop), max(pause_ns, -1))
        self._rows.append((arrival_ns, *row, max(busy_ns, -1)))

    def build(self, facts: TraceFacts) -> Trace:
        """The trace of all requests taken. The builder is used up."""
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 8)
        chunks = self._chunks
        self._rows, self._chunks = [], []
        order = np.argsort(rows[:, 0], kind="stable")
        rows = rows[order]
        starts = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum([len(chunks[i]) for i in order], out=starts[1:])
        blocks = np.empty(int(starts[-1]), dtype=np.int32)
        for place, i in enumerate(order):
            blocks[starts[place] : starts[place + 1]] = chunks[i]
        del chunks
        blocks, parents = dense_order(blocks, self._ids.parents())
        arrival = rows[:, 0] - rows[0, 0] if len(rows) else rows[:, 0].copy()
        return Trace(
            name=self._name,
            block_tokens=self._block_tokens,
            arrival_ns=arrival,
            starts=starts,
            blocks=blocks,
            parents=parents,
            input_tokens=rows[:, 1].astype(np.int32),
            output_tokens=rows[:, 2].astype(np.int32),
            session=rows[:, 3].astype(np.int32),
            tenant=rows[:, 4].astype(np.int16),
            stop=rows[:, 5].astype(np.int8),
            pause_ns=rows[:, 6].copy(),
            busy_ns=rows[:, 7].copy(),
            facts=facts,
        )
