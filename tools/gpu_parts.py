"""What the GPU checks share: the device, two page plans, a ring with memory on both of its sides.

Import it before anything that imports triton: without a device it chooses the interpreter.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CPU = "--cpu" in sys.argv or not Path("/dev/nvidiactl").exists()
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch

from tierkv.core.geometry import MIB, KVGeometry, PagePlan
from tierkv.kernels.driver import Driver
from tierkv.kernels.relayout import BlockShape, PagePool
from tierkv.testing.streams import RecordingStreams
from tierkv.transfer.link_profile import PUBLISHED, LinkProfile
from tierkv.transfer.spread import PlainSpread
from tierkv.transfer.staging import Staging
from tierkv.transfer.streams import CudaStreams

DEVICE = torch.device("cpu" if CPU else "cuda:0")
#: Blocks of 16 KiB: frames of one hot page, so that every page goes somewhere else.
SMALL = PagePlan.of(KVGeometry(layers=4, kv_heads=1, head_dim=64))
#: Llama-3-8B: a block of 16 tokens is a warm page of 2 MiB, its frame 128 hot pages.
LLAMA = PagePlan.of(KVGeometry(layers=32, kv_heads=8, head_dim=128))
BATCH = 64 * MIB


class Skipped(Exception):
    """A check that this machine cannot make; the text says why."""


def device_name() -> str:
    """The device, in words."""
    return "none" if CPU else torch.cuda.get_device_name(DEVICE)


def staged(
    plan: PagePlan,
    pages: int,
    frames: int,
    *,
    seeded: bool = True,
    profile: LinkProfile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Staging, CudaStreams | RecordingStreams]:
    """An arena, a slab of hot pages, and a ring between them."""
    shape = (frames * plan.hot_pages_per_block, plan.hot_page_bytes)
    if seeded:
        host = random_bytes(pages, plan.warm_page_bytes, seed=5).cpu()
        pool = random_bytes(*shape, seed=6)
    else:
        host = torch.zeros(pages, plan.warm_page_bytes, dtype=torch.uint8)
        pool = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
    host = host if CPU else host.pin_memory()
    streams = streams_of()
    row = BlockShape(1, 1, 1, plan.block_layer_bytes)
    blocks = PagePool(
        pool.view(-1), row, layers=plan.layers, page_blocks=1, page_bytes=plan.block_bytes
    )
    spread = PlainSpread(streams, plan, blocks)
    staging = Staging(streams, host, spread, profile=profile or PUBLISHED)
    return host, pool, staging, streams


class Moves(NamedTuple):
    """Blocks on their way: places in the arena, and frames, pairwise."""

    places: npt.NDArray[np.int64]
    frames: npt.NDArray[np.int64]


def moves_of(
    plan: PagePlan, draw: random.Random, pages: int, frames: int, *, whole: bool = False
) -> Moves:
    """All blocks of all pages, or some of some, to frames drawn at random."""
    free = draw.sample(range(frames), frames)
    size = plan.warm_page_blocks
    chosen = range(pages) if whole else draw.sample(range(pages), pages - 1)
    pairs = []
    for page in chosen:
        offsets = list(range(size)) if whole else sorted(draw.sample(range(size), -(-size // 2)))
        pairs += [(page * size + offset, free.pop()) for offset in offsets]
    places, targets = np.array(pairs, np.int64).T
    return Moves(places, targets)


def streams_of() -> CudaStreams | RecordingStreams:
    """The device's queues, or recorded ones."""
    if CPU:
        return RecordingStreams()
    driver = Driver.load()
    assert driver is not None, "torch sees CUDA, but libcuda.so.1 cannot be loaded"
    return CudaStreams(driver, DEVICE)


def random_bytes(rows: int, columns: int, *, seed: int) -> torch.Tensor:
    """Uint8 on the device, the same for a seed on every device."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=draw).to(DEVICE)


def synchronize() -> None:
    """Wait for the device."""
    if not CPU:
        torch.cuda.synchronize(DEVICE)


def seconds(run: Callable[[], object], times: int = 15) -> float:
    """Median seconds of a call, the device idle before and after."""
    run()
    taken = []
    for _ in range(times):
        synchronize()
        begun = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[times // 2]
