"""Fit the generators to the public traces, and print how close they come.

    python tools/fit_generator.py [chat] [agents] [rag] [--traces FOLDER] [--tables]

For each generator a table: quantiles of the trace beside those of what the generator makes, of the
distance between two uses of a block (different blocks in between: what an LRU cache would need),
the time between them, turns of a session, times between arrivals, pauses after an answer, lengths.
`--tables` prints what is measured for the constants in `tierkv/sim/generator/`, as they are written
there. The traces are looked for in ../shared/traces, or where TIERKV_TRACES says.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tierkv.sim import Stop, Trace, open_trace
from tierkv.sim.generator.base import LEVELS
from tierkv.sim.summary import known_blocks, quantiles, reuse_gaps, summarise, turn_depths
from tierkv.sim.trace import SECOND_NS

ROOT = Path(__file__).resolve().parent.parent
PERCENTS = (5, 10, 25, 50, 75, 90, 95)

#: The public trace with its settings, and the generator's settings for the same amount of load.
FITS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "chat": ("mooncake/conversation_trace.jsonl.zst", {}, {"hours": "0.9825"}),
    # A quarter of the sessions: distances take time, and the load is the generator's default.
    "agents": (
        "kv-cache-tester/cc_public.tar.zst",
        {"every": "4,0"},
        {"hours": "12", "sessions": "124"},
    ),
    "rag": ("ragpulse", {}, {}),
}


def main() -> int:
    """Print the tables; 2 if the traces are not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FITS)}")
    default = Path(os.environ.get("TIERKV_TRACES", ROOT.parent / "shared" / "traces"))
    parser.add_argument("--traces", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--tables", action="store_true", help="print what the constants are")
    parser.add_argument("--seed", default="1")
    args = parser.parse_args()
    unknown = set(args.names) - set(FITS)
    if unknown:
        parser.error(f"unknown generator {', '.join(sorted(unknown))}; known: {', '.join(FITS)}")
    if not args.traces.is_dir():
        print(f"{args.traces}: no traces there", file=sys.stderr)
        return 2
    for name in args.names or FITS:
        path, settings, amount = FITS[name]
        real = open_trace(str(args.traces / path), settings=settings)
        began = time.monotonic()
        made = open_trace(f"builtin:{name}", settings={"seed": args.seed, **amount})
        seconds = time.monotonic() - began
        print(
            f"\n{name}: {real.name} {settings or ''} | builtin:{name} {amount} in {seconds:.1f} s"
        )
        compare(real, made)
        if args.tables:
            tables(name, real)
    return 0


def compare(real: Trace, made: Trace) -> None:
    """Print the figures of both, one beside the other."""
    one, other = summarise(real), summarise(made)
    rows: list[tuple[str, float, float]] = [
        ("requests", one.requests, other.requests),
        ("references to blocks", one.references, other.references),
        ("unique blocks", one.unique_blocks, other.unique_blocks),
        ("sessions", one.sessions, other.sessions),
        ("prefix hit at most, %", 100 * one.prefix_hit_max, 100 * other.prefix_hit_max),
        ("blocks used once, %", 100 * one.one_hit, 100 * other.one_hit),
    ]
    for label, left, right in rows:
        ratio = f"   x{right / left:.2f}" if left else ""
        print(f"  {label:<26}{left:>14,.5g} {right:>14,.5g}{ratio}")
    print(f"  {'quantiles':<26}" + "".join(f"p{percent}".rjust(10) for percent in PERCENTS))
    for label, measure in MEASURES.items():
        left_values, right_values = measure(real), measure(made)
        if len(left_values) and len(right_values):
            for said, values in ((label, left_values), ("", right_values)):
                row = "".join(f"{value:>10.4g}" for value in quantiles(values, PERCENTS))
                print(f"  {said:<26}{row}")


def reuse_distances(trace: Trace) -> NDArray[np.floating]:
    """Different blocks between two uses of a block, for each reference that is not its first."""
    out = np.empty(trace.references - trace.unique_blocks, dtype=np.int32)
    last = np.full(trace.unique_blocks, -1, dtype=np.int64)
    tree = np.zeros(trace.references + 1, dtype=np.int32)
    _distance_kernel()(trace.blocks, last, tree, out)
    return out.astype(np.float64)


@cache
def _distance_kernel() -> Callable[..., None]:
    from numba import njit

    def distances(
        blocks: NDArray[np.int32],
        last: NDArray[np.int64],
        tree: NDArray[np.int32],
        out: NDArray[np.int32],
    ) -> None:
        # A Fenwick tree with a one at each block's latest use; a distance is the ones since.
        count = live = 0
        size = len(tree)
        for now in range(len(blocks)):
            block = blocks[now]
            before = last[block]
            if before >= 0:
                below = 0
                at = before + 1
                while at > 0:
                    below += tree[at]
                    at -= at & -at
                out[count] = live - below
                count += 1
                at = before + 1
                while at < size:
                    tree[at] -= 1
                    at += at & -at
            else:
                live += 1
            at = now + 1
            while at < size:
                tree[at] += 1
                at += at & -at
            last[block] = now

    compiled: Callable[..., None] = njit(nogil=True)(distances)
    return compiled


def _pauses(trace: Trace, stop: Stop) -> NDArray[np.floating]:
    pauses: NDArray[np.floating] = (
        trace.pause_ns[(trace.pause_ns >= 0) & (trace.stop == stop)] / SECOND_NS
    )
    return pauses


MEASURES: dict[str, Callable[[Trace], NDArray[np.floating]]] = {
    "reuse distance, blocks": reuse_distances,
    "reuse gap, s": lambda trace: reuse_gaps(trace).astype(np.float64),
    "turns of a session": lambda trace: turn_depths(trace.session[trace.session >= 0]) * 1.0,
    "depth, blocks known": lambda trace: known_blocks(trace) * 1.0,
    "between arrivals, s": lambda trace: np.diff(trace.arrival_ns) / SECOND_NS,
    "pause after a tool call, s": lambda trace: _pauses(trace, Stop.TOOL),
    "pause after a turn, s": lambda trace: _pauses(trace, Stop.END),
    "input tokens": lambda trace: trace.input_tokens * 1.0,
    "output tokens": lambda trace: trace.output_tokens * 1.0,
}


def tables(name: str, trace: Trace) -> None:
    """Print the quantile tables that a generator's constants are."""
    if name == "chat":
        _chat_tables(trace)
    else:
        _session_tables(trace, with_tools=name == "agents")


def _table(label: str, values: NDArray[np.floating]) -> None:
    inner = quantiles(values, tuple(100 * level for level in LEVELS))
    print(f"  {label:<18}= Quantiles(" + ", ".join(f"{value:.4g}" for value in inner) + ")")


def _session_tables(trace: Trace, *, with_tools: bool) -> None:
    order = np.lexsort((trace.arrival_ns, trace.session))
    same = trace.session[order][1:] == trace.session[order][:-1]
    before, after = order[:-1][same], order[1:][same]
    grown = (trace.input_tokens[after].astype(np.int64) - trace.input_tokens[before]) * 1.0
    firsts = order[np.concatenate([[True], ~same])]
    _table("turns", turn_depths(trace.session) * 1.0)
    _table("first input", trace.input_tokens[firsts] * 1.0)
    _table("between requests s", (trace.arrival_ns[after] - trace.arrival_ns[before]) / SECOND_NS)
    kinds = (Stop.TOOL, Stop.END) if with_tools else (Stop.END,)
    for kind in kinds:
        which = trace.stop[before] == kind
        label = kind.name.lower()
        _table(f"{label}: grown", grown[which & (grown > 0)])
        _table(f"{label}: output", trace.output_tokens[before][which] * 1.0)
        if with_tools:
            _table(f"{label}: pause s", _pauses(trace, kind))
    if with_tools:
        known = trace.stop[np.isin(trace.stop, (Stop.TOOL, Stop.END))]
        print(f"  ends a turn       = {float((known == Stop.END).mean()):.4f}")
        timed = trace.busy_ns >= 0
        terms = np.stack([np.ones(int(timed.sum())), trace.output_tokens[timed] * 1.0], axis=1)
        fit = np.linalg.lstsq(terms, trace.busy_ns[timed] / SECOND_NS, rcond=None)[0]
        print(f"  busy              = {fit[0]:.3g} s + {fit[1]:.3g} s a token")


def _chat_tables(trace: Trace) -> None:
    """Threads are found by blocks: a request goes on with the last that had its last known one."""
    known, counts = known_blocks(trace), np.diff(trace.starts)
    owner = np.full(trace.unique_blocks, -1, dtype=np.int64)
    before = np.full(trace.requests, -1, dtype=np.int64)
    turn = np.zeros(trace.requests, dtype=np.int64)
    returns = np.zeros(trace.requests, dtype=bool)
    for i in range(trace.requests):
        blocks = trace.blocks[trace.starts[i] : trace.starts[i + 1]]
        if known[i] >= 2:  # the first is the system prompt's
            before[i] = owner[blocks[known[i] - 1]]
            turn[i] = turn[before[i]] + 1
            returns[before[i]] = True
        owner[blocks] = i
    goes_on = before >= 0
    old = before[goes_on]
    lost = counts[old] - known[goes_on]
    new = trace.input_tokens - np.minimum(known * trace.block_tokens, trace.input_tokens) * 1.0
    _table("first tokens", np.maximum(trace.input_tokens[~goes_on] - 890.0, 1))
    _table("gap s", (trace.arrival_ns[goes_on] - trace.arrival_ns[old]) / SECOND_NS)
    _table("new tokens", new[goes_on][lost <= 1])
    _table("edit keeps", (known[goes_on] / counts[old])[lost > 1])
    _table("edit tokens", new[goes_on][lost > 1])
    _table("output", trace.output_tokens * 1.0)
    shares = [float(returns[turn == k].mean()) for k in range(11)]
    print("  goes on           = " + ", ".join(f"{share:.3f}" for share in shares))
    print(f"  edited            = {float((lost > 1).mean()):.3f}")
    print(f"  threads a second  = {float((~goes_on).sum()) / trace.duration:.4g}")


if __name__ == "__main__":
    sys.exit(main())
