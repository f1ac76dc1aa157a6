"""LMCache in this process, measured as tools/bench_store.py measures tierkv; for comparison only.

    python tools/peer_lmcache.py [--quick] [--directory DIR]

LMCache wants other versions of shared packages, so it lives in a virtual environment of its own:
`.venv-lmcache` in the checkout, or where TIERKV_PEER_VENV says. It is made on first use. This file
runs in it again with `--run` and prints its ratios as JSON; that part imports no tierkv.

Memory: LocalCPUBackend, an arena that is full, so that each put evicts; a get is a reference from
the backend and the copy out. Disk: LocalDiskBackend with O_DIRECT; a put ends with an fsync of
each file, which LMCache itself leaves out, and a get ends in LMCache's own memory, unverified.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Bytes, Pairs, RawFiles, Row, aligned, copy_each, show

VERSION = "0.5.6"
MIB = 1 << 20
SHAPES = {2 * MIB: (32, 16, 8, 128), MIB // 16: (32, 8, 1, 64)}  # layers, tokens, heads, size
NEEDS = [
    *("numpy<=2.2.6", "aiofile", "aiofiles", "blake3", "aiohttp", "cryptography", "fastapi"),
    *("httpx", "huggingface_hub>=1.5.0", "msgspec", "numba", "nvtx", "opentelemetry-api"),
    *("opentelemetry-sdk", "opentelemetry-exporter-otlp", "opentelemetry-exporter-prometheus"),
    *("prometheus_client", "psutil", "py-cpuinfo", "pyyaml", "pyzmq", "grpcio>=1.78.0"),
    *("protobuf<7", "redis", "safetensors", "sortedcontainers", "transformers>=5.4", "uvicorn"),
    *("httptools", "cachetools"),
]


def peer_rows(scale: float, directory: Path) -> list[Row]:
    """Ratios of LMCache to raw, measured in its own environment; they have no reach."""
    command = [str(environment()), __file__, "--run"]
    command += ["--scale", str(scale), "--directory", str(directory)]
    quiet = {"LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_TRACK_USAGE": "false"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | quiet
    )
    ratios = json.loads(done.stdout.splitlines()[-1])
    return [Row(what, value, None, note=f"lmcache {VERSION}") for what, value in ratios.items()]


def environment() -> Path:
    """The Python of the environment with LMCache, which is installed last, so marks it whole."""
    root = Path(__file__).resolve().parents[1]
    place = root / os.environ.get("TIERKV_PEER_VENV", ".venv-lmcache")
    python = place / "bin" / "python"
    if not list(place.glob(f"lib/python3*/site-packages/lmcache-{VERSION}.dist-info")):
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        for wanted in (["torch==2.13.0"], NEEDS, ["--no-deps", f"lmcache=={VERSION}"]):
            subprocess.run([*pip, *wanted], check=True, stdout=sys.stderr)
    return python


# ---- what follows runs in the environment with LMCache


class Peer:
    """LMCache's storage manager and one of its backends, for chunks of one size."""

    def __init__(self, chunk: int, memory: int, disk: Path | None = None) -> None:
        torch: Any = importlib.import_module("torch")
        layers, tokens, heads, size = SHAPES[chunk]
        self._shape = torch.Size([2, layers, tokens, heads * size])
        self._dtype = torch.bfloat16
        self._key: Any = importlib.import_module("lmcache.utils").CacheEngineKey
        options: dict[str, Any] = {
            "chunk_size": tokens,
            "local_cpu": disk is None,
            "max_local_cpu_size": memory / 1024**3,
            "extra_config": {"local_cpu.pinned_align_bytes": 4096, "use_odirect": True},
        }
        if disk is not None:
            disk.mkdir(parents=True)
            options |= {"local_disk": str(disk), "max_local_disk_size": 64.0}
        config = importlib.import_module("lmcache.v1.config")
        metadata = importlib.import_module("lmcache.v1.metadata")
        events = importlib.import_module("lmcache.v1.event_manager")
        storage = importlib.import_module("lmcache.v1.storage_backend.storage_manager")
        self._manager: Any = storage.StorageManager(
            config.LMCacheEngineConfig.from_defaults(**options),
            metadata.LMCacheMetadata(
                model_name="bench",
                world_size=1,
                local_world_size=1,
                worker_id=0,
                local_worker_id=0,
                kv_dtype=self._dtype,
                kv_shape=(layers, 2, tokens, heads, size),
                chunk_size=tokens,
            ),
            events.EventManager(),
        )
        self._where = "LocalCPUBackend" if disk is None else "LocalDiskBackend"
        self.backend: Any = self._manager.storage_backends[self._where]
        self._fsyncs = ThreadPoolExecutor(4)

    def keys(self, first: int, count: int) -> list[Any]:
        """The keys of chunks by number."""
        return [
            self._key("bench", 1, 0, number + 1, self._dtype)
            for number in range(first, first + count)
        ]

    def put(self, keys: list[Any], source: Bytes) -> None:
        """Copy chunks in, as raw does (torch copies 64 KiB slower), and hand them over."""
        chunks = []
        for row in source:
            chunk = self._manager.allocate(self._shape, self._dtype)
            np.copyto(np.frombuffer(chunk.byte_array, np.uint8), row)
            chunks.append(chunk)
        self._manager.batched_put(keys, chunks, location=self._where)

    def put_durable(self, keys: list[Any], source: Bytes) -> None:
        """Put to disk, wait until each chunk is written, fsync its file."""
        self.put(keys, source)
        while self.backend.disk_worker.put_tasks:
            time.sleep(0.0002)
        list(self._fsyncs.map(fsync, [self.backend.dict[key].path for key in keys]))

    def get(self, keys: list[Any], target: Bytes) -> None:
        """Copy chunks out of memory."""
        for key, row in zip(keys, target, strict=True):
            chunk = self._manager.get(key, self._where)
            np.copyto(row, np.frombuffer(chunk.byte_array, np.uint8))
            chunk.ref_count_down()

    def read(self, keys: list[Any]) -> None:
        """Bring chunks from disk into LMCache's memory, then let go of them."""
        for chunk in self.backend.batched_get_blocking(keys):
            assert chunk is not None
            chunk.ref_count_down()

    def close(self) -> None:
        """Stop its threads."""
        self._manager.close()
        self._fsyncs.shutdown()


def fsync(path: str) -> None:
    """Make a written file durable."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def memory_ratios(name: str, chunk: int, batch: int, scale: float) -> dict[str, float]:
    """Put and get in batches, in an arena that is full, against memcpy."""
    capacity = int(1024 * MIB * max(scale, 0.25))
    batches = capacity // chunk // batch
    raw_source, source, raw_target, target = (
        aligned(batch * 4 * chunk).reshape(-1, chunk) for _ in range(4)
    )
    source[:] = np.arange(batch * 4, dtype=np.uint8)[:, None]
    arena = aligned(batches * batch * chunk).reshape(-1, chunk)
    put, get = Pairs(), Pairs()
    peer = Peer(chunk, capacity)
    for turn in range(4):
        first = turn * batches * batch
        for n in range(batches):
            at = n % 4 * batch
            ours = partial(peer.put, peer.keys(first + n * batch, batch), source[at : at + batch])
            raw = partial(copy_each, arena[n * batch :], raw_source[at:], batch)
            (put if turn else Pairs()).time(ours, raw)
        for n in np.random.default_rng(turn).permutation(batches):
            at = int(n) % 4 * batch
            keys = peer.keys(first + int(n) * batch, batch)
            if not all(map(peer.backend.contains, keys)):
                continue
            ours = partial(peer.get, keys, target[at : at + batch])
            raw = partial(copy_each, raw_target[at:], arena[n * batch :], batch)
            (get if turn else Pairs()).time(ours, raw)
            assert np.array_equal(source[at : at + batch], target[at : at + batch])
    peer.close()
    return {f"lmcache host put, {name}": put.ratio, f"lmcache host get, {name}": get.ratio}


def disk_ratios(directory: Path, scale: float) -> dict[str, float]:
    """Put with fsync and get of chunks of 2 MiB, against files of 2 MiB."""
    chunk, batch, few = 2 * MIB, 32, 16
    count = max(8, int(16 * scale)) * batch // (2 if scale < 1 else 1)
    chunks = aligned(batch * chunk).reshape(batch, chunk)
    put, get = Pairs(), Pairs()
    for turn in range(3):
        place = directory / f"peer{turn}"
        raw = RawFiles(place / "raw", count)
        peer = Peer(chunk, 512 * MIB, place / "ours")
        for first in range(0, count, batch):
            ours = partial(peer.put_durable, peer.keys(first, batch), chunks)
            put.time(ours, partial(raw.write, range(first, first + batch), chunks))
        for n in np.random.default_rng(turn).permutation(count // few):
            first = int(n) * few
            ours = partial(peer.read, peer.keys(first, few))
            get.time(ours, partial(raw.read, range(first, first + few), chunks))
        peer.close()
        shutil.rmtree(place)
    return {
        "lmcache disk put and fsync, 2 MiB, O_DIRECT": put.ratio,
        "lmcache disk get, unverified, 2 MiB, O_DIRECT (batches of 16)": get.ratio,
    }


def main() -> int:
    """Show the rows, or with `--run` measure here; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="measure in this environment")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the bytes")
    parser.add_argument("--quick", action="store_true", help="a tenth of the bytes, more noise")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="where to write")
    options = parser.parse_args()
    scale = 0.1 if options.quick else options.scale
    with tempfile.TemporaryDirectory(dir=options.directory, prefix=".bench-") as scratch:
        if not options.run:
            show(peer_rows(scale, Path(scratch)))
            return 0
        ratios = memory_ratios("2 MiB pages", 2 * MIB, 16, scale)
        ratios |= memory_ratios("64 KiB blocks", MIB // 16, 64, scale)
        ratios |= disk_ratios(Path(scratch), scale)
    print(json.dumps(ratios), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
