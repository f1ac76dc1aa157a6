"""Pages by second through SGLang's own calls, beside its file backend: `tools/bench_sglang.py`.

Run by the Python of `.venv-sglang`. A page is 64 KiB a token, 32 tokens: 2 MiB. Rates are GB/s of
batches of 32 pages, the median of some. The file backend reads through the system's page cache,
and writes to it; ours reads from host memory, or from the disk past that cache.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import sglang_cpu as cpu

PAGES = 32
BATCHES = 8


def main() -> None:
    """Measure, and print a table."""
    cpu.ready()
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    from tierkv.engines.sglang.storage import TierKVStorage

    where = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(where / "files")
    pool = cpu.host_pool(cpu.device_pool(layers=8, heads=8), tokens=PAGES * cpu.PAGE_TOKENS)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    indices = torch.arange(PAGES * cpu.PAGE_TOKENS)

    def config(**extra: object) -> HiCacheStorageConfig:
        return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "m", extra_config=extra)

    def ours(host: str, **more: object) -> TierKVStorage:
        extra = {"host": host, "cold": "2GiB", "directory": str(where / "kv"), **more}
        backend = TierKVStorage(config(**extra))
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        return backend

    def plain(backend: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
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

    def pointers(backend: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def put(names: list[str]) -> None:
            assert all(backend.batch_set_v1(names, indices))

        def get(names: list[str]) -> None:
            assert all(backend.batch_get_v1(names, indices))

        return put, get

    try:
        measure("file backend", *plain(HiCacheFile(config())))
        for name, host in (("memory", "1GiB"), ("disk", "128MiB")):
            backend = ours(host, interface_v1=1)
            measure(f"tierkv, {name}, pointers", *pointers(backend))
            assert backend.clear()
            backend.close()
        backend = ours("1GiB")
        measure("tierkv, memory, tensors", *plain(backend))
        backend.close()
    finally:
        shutil.rmtree(where)


def measure(what: str, put: Callable[..., Any], get: Callable[..., Any]) -> None:
    """Put batches, get them in order, and print both rates."""
    batches = [[f"{batch:032x}{page:032x}" for page in range(PAGES)] for batch in range(BATCHES)]
    rates = [statistics.median(seconds_of(move, names) for names in batches) for move in (put, get)]
    size = PAGES * cpu.PAGE_TOKENS * 64 * 1024 / 1e9
    print(f"{what:<28} put {size / rates[0]:6.2f} GB/s   get {size / rates[1]:6.2f} GB/s")


def seconds_of(move: Callable[..., Any], names: list[str]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    move(names)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
