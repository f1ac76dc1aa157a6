"""tierkv and LMCache's own adapters of files as a second level of LMCache, in one run by turns.

    .venv-lmcache/bin/python tools/bench_lmcache.py [--chunk-mib 8] [--chunks 32] [--rounds 7]
        [--json FILE] [--directory DIR]

It runs where LMCache is. Each round stores chunks that nobody knows and loads those of the round
before, in each adapter in turn, as LMCache's controllers do: one task of all chunks. `stored` is
what the task takes, after which LMCache may give its memory to others; `on disk` ends when every
byte is in a file (tierkv: `flush`, with a sync; files: an fsync of each). `loaded` is from the disk
and verified (tierkv has host memory for four chunks), or from the page cache unless O_DIRECT. A
value is the files' seconds over ours, the median of the rounds.
"""

from __future__ import annotations

import os
import select
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(LMCACHE_LOG_LEVEL="ERROR", LMCACHE_TRACK_USAGE="false")

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import (
    FSL2Adapter,
    FSL2AdapterConfig,
)
from lmcache.v1.memory_management import (
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryObj,
)
from lmcache.v1.platform import consume_fd

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, options_of, report, scratch

from tierkv.engines.lmcache.adapter import TierKVL2Adapter

Adapter = Any


ROWS = "stored,on-disk,looked-up,loaded"


def main() -> int:
    """Measure the chosen rows; see the module."""
    parser = options_of(__doc__.splitlines()[0], ROWS)
    parser.add_argument("--chunk-mib", type=float, default=8)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    size = int(options.chunk_mib * (1 << 20))
    with scratch(options.directory) as place:
        found = measured(Path(place), size, options.chunks, options.rounds)
    taken = {
        name: [statistics.median(column) for column in zip(*times, strict=True)]
        for name, times in found.items()
    }
    ours, gigabytes, rows = taken.pop("tierkv"), size * options.chunks / 1e9, []
    for number, what in enumerate(ROWS.split(",")):
        if what not in options.rows:
            continue
        for name, theirs in taken.items():
            if what == "looked-up":
                note = f"{ours[number] * 1e3:.2f} ms, {name} {theirs[number] * 1e3:.2f} ms"
            else:
                rates = [gigabytes / seconds for seconds in (ours[number], theirs[number])]
                note = f"{rates[0]:.2f} GB/s, {name} {rates[1]:.2f}"
            ratio = theirs[number] / ours[number]
            rows.append(Row(f"{what}, against {name}", ratio, None, True, "x faster", note))
    title = f"{options.chunks} chunks of {options.chunk_mib:g} MiB a task, {options.rounds} rounds"
    return report(rows, options, title)


def measured(
    place: Path, size: int, count: int, rounds: int
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Seconds to store, to have on disk, to look up and to load, by adapter and round."""
    host = f"{max(16, 4 * size >> 20)}MiB"
    params = {"host": host, "cold": "16GiB", "directory": str(place / "kv")}
    adapters: dict[str, Adapter] = {
        "tierkv": TierKVL2Adapter(params),
        "fs": FSL2Adapter(FSL2AdapterConfig(str(place / "fs"))),
        "fs O_DIRECT": FSL2Adapter(FSL2AdapterConfig(str(place / "direct"), use_odirect=True)),
    }
    arena = aligned(size * count)
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in adapters}
    layouts = {0: MemoryLayoutDesc([torch.Size([size // 4, 1])], [torch.float32])}
    for number in range(rounds + 1):
        fill = torch.randint(0, 1 << 30, (size * count // 8,), dtype=torch.int64)
        for name in [*adapters][number % 3 :] + [*adapters][: number % 3]:
            adapter, keys = adapters[name], keys_of(number, count)
            arena.copy_(fill.view(torch.uint8))
            start = time.perf_counter()
            store(adapter, keys, chunks_of(arena, size, count))
            stored = time.perf_counter() - start
            durable(adapter, place / ("direct" if "DIR" in name else "fs"))
            on_disk = time.perf_counter() - start
            arena.zero_()
            start = time.perf_counter()
            assert look(adapter, keys, layouts) == count
            looked = time.perf_counter() - start
            start = time.perf_counter()
            assert load(adapter, keys, chunks_of(arena, size, count)) == count
            loaded = time.perf_counter() - start
            adapter.submit_unlock(keys)
            assert torch.equal(arena, fill.view(torch.uint8)), f"{name} gave other bytes"
            if number:  # the first round opens files and compiles
                found[name].append((stored, on_disk, looked, loaded))
    for adapter in adapters.values():
        adapter.close()
    return found


def durable(adapter: Adapter, directory: Path) -> None:
    """Have everything synced."""
    if isinstance(adapter, TierKVL2Adapter):
        assert adapter.flush()
        return
    for file in directory.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def store(adapter: Adapter, keys: list[ObjectKey], chunks: list[TensorMemoryObj]) -> None:
    """One store task, to its end."""
    task = adapter.submit_store_task(keys, chunks)
    ended = waited(
        adapter.get_store_event_fd(), lambda: adapter.pop_completed_store_tasks().get(task)
    )
    assert ended.is_successful()


def look(adapter: Adapter, keys: list[ObjectKey], layouts: dict[int, MemoryLayoutDesc]) -> int:
    """One lookup; how many were found."""
    task = adapter.submit_lookup_and_lock_task(keys, layouts)
    fd = adapter.get_lookup_and_lock_event_fd()
    return int(waited(fd, lambda: adapter.query_lookup_and_lock_result(task)).popcount())


def load(adapter: Adapter, keys: list[ObjectKey], chunks: list[TensorMemoryObj]) -> int:
    """One load; how many were loaded."""
    task = adapter.submit_load_task(keys, chunks)
    fd = adapter.get_load_event_fd()
    return int(waited(fd, lambda: adapter.query_load_result(task)).popcount())


def waited(fd: int, ask: Callable[[], Any]) -> Any:  # noqa: ANN401 LMCache's have no types
    """What a task gives, when the descriptor says that it has ended."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while (found := ask()) is None:
        assert poller.poll(60_000), "no event within a minute"
        consume_fd(fd)
    return found


def keys_of(number: int, count: int) -> list[ObjectKey]:
    """The keys of one round."""
    return [ObjectKey((number * count + n).to_bytes(32, "big"), "bench", 0) for n in range(count)]


def chunks_of(arena: torch.Tensor, size: int, count: int) -> list[TensorMemoryObj]:
    """Buffers in an arena, as LMCache's first level has them."""
    shape, dtype = torch.Size([size // 4, 1]), torch.float32
    return [
        TensorMemoryObj(
            arena[n * size : (n + 1) * size],
            MemoryObjMetadata(shape, dtype, n * size, size, 1, fmt=MemoryFormat.KV_2LTD,
                              shapes=[shape], dtypes=[dtype]),
            None,
        )
        for n in range(count)
    ]  # fmt: skip


def aligned(size: int) -> torch.Tensor:
    """Memory that O_DIRECT takes."""
    found = torch.empty(size + 4096, dtype=torch.uint8)
    skip = -found.data_ptr() % 4096
    return found[skip : skip + size]


if __name__ == "__main__":
    raise SystemExit(main())
