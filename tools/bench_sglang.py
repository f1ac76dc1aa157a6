"""Pages by second through SGLang's own calls, over its file backend in the same run.

    .venv-sglang/bin/python tools/bench_sglang.py [--json FILE] [--directory DIR] [--rows A,B,..]

A page is 64 KiB a token, 32 tokens: 2 MiB. Rates are of batches of 32 pages, the median of some.
The file backend reads through the system's page cache, and writes to it; ours reads from host
memory, or from the disk past that cache.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import sglang_cpu as cpu
from measuring import Row, options_of, report, scratch

PAGES = 32
BATCHES = 8

ROWS = "memory,disk,tensors"
#: Seconds of a batch: put, get.
Taken = tuple[float, float]


def main() -> int:
    """Measure the chosen rows; see the module."""
    options = options_of(__doc__.splitlines()[0], ROWS).parse_args()
    cpu.ready()
    with scratch(options.directory) as place:
        taken = measured(Path(place), options.rows)
    base, rows = taken.pop("file backend"), []
    size = PAGES * cpu.PAGE_TOKENS * 64 * 1024 / 1e9
    for what, seconds in taken.items():
        for way, ours, theirs in zip(("put", "get"), seconds, base, strict=True):
            note = f"{size / ours:.2f} GB/s, the file backend {size / theirs:.2f}"
            rows.append(Row(f"{way}, {what}", theirs / ours, None, True, "x files", note))
    return report(rows, options, "SGLang's pages with tierkv, against its file backend")


def measured(where: Path, chosen: list[str]) -> dict[str, Taken]:
    """Seconds of a batch, by backend."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    from tierkv.engines.sglang.storage import TierKVStorage

    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(where / "files")
    pool = cpu.host_pool(cpu.device_pool(layers=8, heads=8), tokens=PAGES * cpu.PAGE_TOKENS)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))

    def config(**extra: object) -> HiCacheStorageConfig:
        return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "m", extra_config=extra)

    def ours(host: str, **more: object) -> TierKVStorage:
        extra = {"host": host, "cold": "2GiB", "directory": str(where / "kv"), **more}
        backend = TierKVStorage(config(**extra))
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        return backend

    taken = {"file backend": seconds(*plain(pool, HiCacheFile(config())))}
    for name, host in (("memory", "1GiB"), ("disk", "128MiB")):
        if name in chosen:
            backend = ours(host, interface_v1=1)
            taken[f"{name}, by pointers"] = seconds(*pointers(pool, backend))
            assert backend.clear()
            backend.close()
    if "tensors" in chosen:
        backend = ours("1GiB")
        taken["memory, by tensors"] = seconds(*plain(pool, backend))
        backend.close()
    return taken


def plain(pool: Any, backend: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As SGLang's `_generic_page_set` and `_generic_page_get`."""

    def put(names: list[str]) -> None:
        step = cpu.PAGE_TOKENS
        pages = [pool.get_data_page(n * step, flat=True) for n in range(len(names))]
        assert backend.batch_set(names, pages)

    def get(names: list[str]) -> None:
        targets = [pool.get_dummy_flat_data_page() for _ in names]
        for number, page in enumerate(backend.batch_get(names, targets)):
            pool.set_from_flat_data_page(number * cpu.PAGE_TOKENS, page)

    return put, get


def pointers(pool: Any, backend: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As SGLang does where a backend takes addresses."""
    indices = torch.arange(PAGES * cpu.PAGE_TOKENS)

    def put(names: list[str]) -> None:
        assert all(backend.batch_set_v1(names, indices))

    def get(names: list[str]) -> None:
        assert all(backend.batch_get_v1(names, indices))

    return put, get


def seconds(put: Callable[..., Any], get: Callable[..., Any]) -> Taken:
    """What it takes to put batches, and to get them in order."""
    batches = [[f"{batch:032x}{page:032x}" for page in range(PAGES)] for batch in range(BATCHES)]
    puts, gets = ([seconds_of(move, names) for names in batches] for move in (put, get))
    return statistics.median(puts), statistics.median(gets)


def seconds_of(move: Callable[..., Any], names: list[str]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    move(names)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
