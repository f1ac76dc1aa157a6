"""The speed table of tools/gpu_check.py: ratios to one plain copy of the same bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from gpu_parts import BATCH, DEVICE, LLAMA, SMALL, Moves, moves_of, seconds, staged
from measuring import Row

from tierkv.codecs.grouped import Int4
from tierkv.core.geometry import GIB
from tierkv.kernels.driver import Copies, Driver
from tierkv.kernels.relayout import Arrangement, BlockShape, Pool, Side, move_blocks
from tierkv.tiers.host import HostTier
from tierkv.transfer.link_profile import measure_device
from tierkv.transfer.spread import CodedSpread
from tierkv.transfer.staging import Staging
from tierkv.transfer.streams import CudaStreams, Event


def speed_rows(gib: int) -> Iterator[Row]:
    """The table; every ratio is of a plain copy of the same bytes, in the same run."""
    host = torch.empty(BATCH, dtype=torch.uint8).pin_memory()
    slab = torch.empty(BATCH, dtype=torch.uint8, device=DEVICE)
    up = seconds(lambda: slab.copy_(host, non_blocking=True))
    down = seconds(lambda: host.copy_(slab, non_blocking=True))
    yield Row("one pinned copy up, 64 MiB", BATCH / up / 1e9, None, unit="GB/s")
    yield Row("one pinned copy down, 64 MiB", BATCH / down / 1e9, None, unit="GB/s")
    for name, plan, reach in (("16 KiB pages", SMALL, 0.95), ("2 MiB warm pages", LLAMA, 0.97)):
        pages = BATCH // plan.warm_page_bytes
        frames = pages * plan.warm_page_blocks
        _, _, staging, streams = staged(plan, pages, frames, seeded=False)
        moves = moves_of(plan, random.Random(0), pages, frames, whole=True)
        load = seconds(partial(wait_for, staging.load, moves))
        save = seconds(partial(wait_for, staging.save, moves))
        yield Row(f"up, {name} into hot pages", up / load, reach)
        yield Row(f"down, {name} from hot pages", down / save, reach if plan is SMALL else None)
        if plan is SMALL:
            yield Row("submit 4,096 pages", submit_us(staging, moves), 100, False, "us")
        else:
            yield gemm_row(staging, moves)
            assert isinstance(streams, CudaStreams)
            yield overlap_row(streams, staging, moves, load)
    yield sparse_row()
    yield duplex_row()
    yield relayout_row()
    yield codes_row(down)
    yield from register_rows(gib)
    yield memory_row()


def submit_us(staging: Staging, moves: Moves) -> float:
    """Median microseconds until `load` returns, the device idle before."""
    taken = []
    for _ in range(15):
        begun = time.perf_counter()
        event = staging.load(*moves)
        taken.append(time.perf_counter() - begun)
        event.synchronize()
    return sorted(taken)[7] * 1e6


def gemm_row(staging: Staging, moves: Moves) -> Row:
    """How much a loop of matrix products is slowed by loads beside it."""
    left = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    right = torch.randn_like(left)

    def products() -> None:
        for _ in range(20):
            torch.mm(left, right)

    alone = seconds(products)

    def beside() -> None:
        for _ in range(8):
            staging.load(*moves)
        products()

    slowed = seconds(beside)
    return Row("matrix products slowed by loads", (slowed / alone - 1) * 100, 3, False, "%")


def overlap_row(streams: CudaStreams, staging: Staging, moves: Moves, load: float) -> Row:
    """Attention of 32 layers that waits for each layer's load: what the load adds to it."""
    heads, new, past, dim = 32, 512, 8192, 128
    query = torch.randn(1, heads, new, dim, dtype=torch.bfloat16, device=DEVICE)
    key, value = (
        torch.randn(1, heads, past, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
    )

    def attend(events: list[Event] | None) -> None:
        for layer in range(LLAMA.layers):
            if events is not None:
                streams.hold(torch.cuda.current_stream().cuda_stream, events[layer])
            torch.nn.functional.scaled_dot_product_attention(query, key, value)

    alone = seconds(partial(attend, None))
    together = seconds(lambda: attend(staging.load_layers(*moves)))
    exposed = max(0.0, together - alone) / load * 100
    return Row("layerwise load beside attention, exposed part", exposed, 10, False, "%")


def duplex_row() -> Row:
    """Loads and saves at once, against plain copies both ways at once."""
    pages = BATCH // SMALL.warm_page_bytes
    frames = pages * SMALL.warm_page_blocks
    (_, _, up, _), (_, _, down, _) = (staged(SMALL, pages, frames, seeded=False) for _ in range(2))
    moves = moves_of(SMALL, random.Random(0), pages, frames, whole=True)
    hosts = [torch.empty(BATCH, dtype=torch.uint8).pin_memory() for _ in range(2)]
    slabs = [torch.empty(BATCH, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]

    def plain() -> None:
        with torch.cuda.stream(streams[0]):
            slabs[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(slabs[1], non_blocking=True)

    def ours() -> None:
        loaded, saved = up.load(*moves), down.save(*moves)
        loaded.synchronize()
        saved.synchronize()

    return Row("both directions at once, 16 KiB pages", seconds(plain) / seconds(ours), 0.9)


def relayout_row() -> Row:
    """HND to ours inside the device, bytes read and written, against a device copy."""
    shape, blocks = BlockShape(2, 16, 8, 256), 4096
    size = blocks * 2 * 16 * 8 * 256
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    plain = seconds(lambda: target.copy_(source))
    at = Arrangement.paged(shape, blocks=blocks, heads_first=True)
    ours = Arrangement.canonical(shape)
    numbers = torch.randperm(blocks, device=DEVICE)
    sides = (
        Side(Pool((source,), at), at.offsets(numbers)),
        Side(Pool((target,), ours), ours.offsets(numbers)),
    )
    everything = torch.cuda.get_device_properties(DEVICE).multi_processor_count * 2
    taken = seconds(lambda: move_blocks(shape, *sides, programs=everything))
    return Row("relayout inside the device, HND to ours", plain / taken, 0.85)


def codes_row(down: float) -> Row:
    """Int4 codes made on the device and copied down, in bytes before encoding."""
    frames = BATCH // LLAMA.block_bytes
    slab = torch.randn(BATCH // 2, device=DEVICE).to(torch.bfloat16).view(torch.uint8)
    driver = Driver.load()
    assert driver is not None
    streams = CudaStreams(driver, DEVICE)
    spread = CodedSpread(streams, LLAMA, slab, Int4(), torch.bfloat16)
    pages = -(-frames // spread.plan.warm_page_blocks)
    host = torch.empty((pages, spread.plan.warm_page_bytes), dtype=torch.uint8).pin_memory()
    staging = Staging(streams, host, spread)
    order = np.random.default_rng(0).permutation(frames)
    moves = Moves(np.arange(frames, dtype=np.int64), order)
    taken = seconds(partial(wait_for, staging.save, moves))
    return Row("int4 encode and copy down, bytes before encoding", down / taken, 3)


def sparse_row() -> Row:
    """Single blocks of 16 KiB all over the arena, by the route that the measured profile takes.

    Against the slowest way there is, a copy engine that is given them one by one.
    """
    driver = Driver.load()
    assert driver is not None
    profile = measure_device(CudaStreams(driver, DEVICE), DEVICE)
    pages = 512
    host, pool, staging, _ = staged(SMALL, pages, pages * 8, seeded=False, profile=profile)
    draw = random.Random(7)
    size = SMALL.warm_page_blocks
    places = [page * size + place for page in range(pages) for place in draw.sample(range(size), 8)]
    moves = Moves(np.array(places), np.array(draw.sample(range(pages * 8), pages * 8)))
    loaded = seconds(partial(wait_for, staging.load, moves))
    step = SMALL.block_layer_bytes
    layers = np.arange(SMALL.layers)[:, None]
    within = moves.places % size * step
    sources = moves.places // size * SMALL.warm_page_bytes + layers * size * step + within
    targets = moves.frames * SMALL.block_bytes + layers * step
    copies = Copies(
        pool.data_ptr() + targets.ravel(),
        host.data_ptr() + sources.ravel(),
        np.full(targets.size, step),
    )
    stream = torch.cuda.Stream(DEVICE).cuda_stream
    batch = seconds(lambda: driver.copy(copies, stream))
    route = max(staging.moved_bytes, key=lambda route: staging.moved_bytes[route]).name.lower()
    return Row(f"sparse picks by {route}, against a batch copy", batch / loaded, None)


def register_rows(gib: int) -> Iterator[Row]:
    """Mapping, touching and registering the host arena, and how long others wait meanwhile."""
    plan = LLAMA
    driver = Driver.load()
    assert driver is not None
    pages = gib * GIB // plan.warm_page_bytes
    for threads, reach in ((8, 1.0), (1, None)):
        tier = HostTier(
            plan,
            pages=pages,
            threads=8,
            registrar=driver.registrar(0),
            register_threads=threads,
        )
        begun = time.monotonic()
        tier.open()
        stall = longest_stall(tier)
        taken = (time.monotonic() - begun) * 16 / gib
        assert tier.pinned_pages == tier.page_count, "not all of it could be pinned"
        tier.close()
        what = f"map, touch and register 16 GiB, {threads} threads"
        yield Row(what, taken, reach, False, "s", note=f"{gib} GiB")
        reach_ms = 50 if threads == 1 else None
        yield Row(f"longest stall meanwhile, {threads} threads", stall, reach_ms, False, "ms")


def longest_stall(tier: HostTier) -> float:
    """Milliseconds of the slowest small copy while the arena is registered."""
    host = torch.empty(1 << 16, dtype=torch.uint8).pin_memory()
    device = torch.empty(1 << 16, dtype=torch.uint8, device=DEVICE)
    longest = 0.0
    while tier.pinned_pages < tier.page_count:
        begun = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize(DEVICE)
        longest = max(longest, time.perf_counter() - begun)
        time.sleep(0.0005)
    return longest * 1e3


def memory_row() -> Row:
    """Device memory that the ring takes beside the slab, as told in the configuration."""
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(DEVICE)[0]
    frames = BATCH // SMALL.block_bytes
    host, pool, staging, streams = staged(
        SMALL, BATCH // SMALL.warm_page_bytes, frames, seeded=False
    )
    moves = moves_of(SMALL, random.Random(0), len(host), frames, whole=True)
    for _ in range(4):
        staging.load(*moves)
    staging.save(*moves).synchronize()
    beside = before - torch.cuda.mem_get_info(DEVICE)[0] - pool.numel()
    del streams
    return Row(
        "device memory beside the slab, of transfer.staging", beside / (64 << 20), 1.1, False, "x"
    )


def wait_for(move: Callable[..., Event], moves: Moves) -> None:
    """Move, and wait until it is done."""
    move(*moves).synchronize()
