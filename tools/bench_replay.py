"""Every policy through one tier: prefix hits of a trace, and how fast it is replayed.

    python tools/bench_replay.py TRACE.jsonl[.zst] [--percent 1 2 5 10] [--policies lru mq]

TRACE is in Mooncake's form: a line a request, with `hash_ids`, and `timestamp` in ms. Hits are in
blocks, of the second half of the requests; sizes are percentages of the trace's unique blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from tierkv.plan.policies import POLICIES
from tierkv.sim.replay import replay

_Trace = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]


def main() -> None:
    """Print a line a policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--percent", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    args = parser.parse_args()
    starts, blocks, times = _read(args.trace)
    unique, half = int(blocks.max()) + 1, (len(starts) - 1) // 2
    print(f"{args.trace.name}: {len(times):,} requests, {len(blocks):,} blocks, {unique:,} unique")
    print("".join([f"{'policy':<12}", *(f"{p:>8g} %" for p in args.percent), "   M blocks/s"]))
    for policy in args.policies:
        cells, spent_s = [], 0.0
        for percent in args.percent:
            capacity = int(unique * percent / 100)
            kind = POLICIES.load(policy)(capacity)
            before = time.process_time()
            hits = replay(kind, starts, blocks, capacity, times).prefix_hits
            spent_s += time.process_time() - before
            cells.append(f"{100 * hits[half:].sum() / (starts[-1] - starts[half]):>10.2f}")
        rate = len(blocks) * len(args.percent) / spent_s / 1e6
        print(f"{policy:<12}{''.join(cells)}{rate:>13.2f}", flush=True)


def _read(path: Path) -> _Trace:
    """Starts, dense block ids, times in ns."""
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    ids: dict[int, int] = {}
    starts, blocks, times = [0], list[int](), list[int]()
    for line in data.splitlines():
        request = json.loads(line)
        blocks += [ids.setdefault(name, len(ids)) for name in request["hash_ids"]]
        starts.append(len(blocks))
        times.append(request["timestamp"] * 1_000_000)
    return np.array(starts, np.int64), np.array(blocks, np.int32), np.array(times, np.int64)


if __name__ == "__main__":
    main()
