"""What is in a trace: the figures that say what a cache could gain of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tierkv.sim.trace import SECOND_NS, Stop, Trace

#: Percentiles in every summary.
PERCENTS: Final = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Figures of a trace; times in seconds, quantiles at `PERCENTS`, () where there is nothing.

    prefix_hit_max: the share of input tokens that a cache without limit finds, as the longest
    prefix seen before the request; block_hit_max: of references to blocks.
    one_hit: the share of unique blocks that are referred to once.
    """

    requests: int
    references: int
    unique_blocks: int
    block_tokens: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    sessions: int
    tenants: int
    prefix_hit_max: float
    block_hit_max: float
    one_hit: float
    stops: dict[str, int]
    input_quantiles: tuple[float, ...]
    output_quantiles: tuple[float, ...]
    depth_quantiles: tuple[float, ...]
    arrival_gap_s: tuple[float, ...]
    reuse_gap_s: tuple[float, ...]
    pause_s: tuple[float, ...]


def summarise(trace: Trace) -> TraceSummary:
    """The figures of a trace."""
    known = known_blocks(trace)
    found = np.minimum(known * trace.block_tokens, trace.input_tokens)
    tokens = int(trace.input_tokens.sum(dtype=np.int64))
    uses = np.bincount(trace.blocks, minlength=trace.unique_blocks)
    kinds = np.bincount(np.clip(trace.stop, 0, max(Stop)), minlength=len(Stop))
    has_session = trace.session[trace.session >= 0]
    return TraceSummary(
        requests=trace.requests,
        references=trace.references,
        unique_blocks=trace.unique_blocks,
        block_tokens=trace.block_tokens,
        duration_s=trace.duration,
        input_tokens=tokens,
        output_tokens=int(trace.output_tokens.sum(dtype=np.int64)),
        sessions=len(np.unique(has_session)),
        tenants=len(np.unique(trace.tenant)),
        prefix_hit_max=float(found.sum(dtype=np.int64)) / max(tokens, 1),
        block_hit_max=float(known.sum()) / max(trace.references, 1),
        one_hit=float((uses == 1).sum()) / max(trace.unique_blocks, 1),
        stops={Stop(kind).name.lower(): int(kinds[kind]) for kind in range(len(Stop))},
        input_quantiles=quantiles(trace.input_tokens),
        output_quantiles=quantiles(trace.output_tokens),
        depth_quantiles=quantiles(turn_depths(has_session)),
        arrival_gap_s=quantiles(np.diff(trace.arrival_ns) / SECOND_NS),
        reuse_gap_s=quantiles(reuse_gaps(trace)),
        pause_s=quantiles(trace.pause_ns[trace.pause_ns >= 0] / SECOND_NS),
    )


def known_blocks(trace: Trace) -> NDArray[np.int64]:
    """(n,): how many blocks of each request were seen in a request before it."""
    highest = np.empty(trace.references + 1, dtype=np.int32)
    highest[0] = -1
    np.maximum.accumulate(trace.blocks, out=highest[1:])
    # Ids are in order of first reference, so a request's new blocks are those that raise the mark.
    counts = np.diff(trace.starts)
    new = highest[trace.starts[1:]] - highest[trace.starts[:-1]]
    known: NDArray[np.int64] = counts - new
    return known


def reuse_gaps(trace: Trace) -> NDArray[np.float32]:
    """Seconds since the block's last use, for each reference that is not the block's first."""
    out = np.empty(trace.references - trace.unique_blocks, dtype=np.float32)
    last = np.full(trace.unique_blocks, -1, dtype=np.int64)
    _gap_kernel()(trace.arrival_ns, trace.starts, trace.blocks, last, out)
    return out


def turn_depths(session: NDArray[np.int32]) -> NDArray[np.int64]:
    """Requests of each session."""
    return np.unique(session, return_counts=True)[1].astype(np.int64)


def quantiles(
    values: NDArray[np.signedinteger] | NDArray[np.floating], percents: tuple[float, ...] = PERCENTS
) -> tuple[float, ...]:
    """Percentiles; () of nothing."""
    if not len(values):
        return ()
    return tuple(float(value) for value in np.percentile(values.astype(np.float64), percents))


@cache
def _gap_kernel() -> Callable[..., None]:
    from numba import njit

    def gaps(
        arrival: NDArray[np.int64],
        starts: NDArray[np.int64],
        blocks: NDArray[np.int32],
        last: NDArray[np.int64],
        out: NDArray[np.float32],
    ) -> None:
        count = 0
        for request in range(len(arrival)):
            now = arrival[request]
            for at in range(starts[request], starts[request + 1]):
                block = blocks[at]
                if last[block] >= 0:
                    out[count] = (now - last[block]) * 1e-9
                    count += 1
                last[block] = now

    compiled: Callable[..., None] = njit(nogil=True)(gaps)
    return compiled
