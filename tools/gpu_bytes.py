"""Correctness for tools/gpu_check.py: kernels, ring and tier against their references.

On the CPU kernels run in Triton's interpreter, and the ring on recorded streams.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from gpu_parts import (
    CPU,
    DEVICE,
    LLAMA,
    SMALL,
    moves_of,
    random_bytes,
    staged,
    streams_of,
    synchronize,
)

from tierkv.codecs.grouped import GROUP, Int4, Int8
from tierkv.core.geometry import PagePlan
from tierkv.core.tier import Span
from tierkv.engines.vllm.side_stream import SideStream
from tierkv.kernels import triton_pages
from tierkv.kernels.pages import CodedRows
from tierkv.kernels.relayout import (
    Arrangement,
    BlockShape,
    FixedMove,
    Pool,
    Side,
    move_blocks,
    move_by_reference,
)
from tierkv.testing.streams import RecordingStreams
from tierkv.tiers.device import DeviceTier
from tierkv.transfer.link_profile import SIZES, Direction, LinkProfile, measure_device
from tierkv.transfer.staging import Route


def copies() -> str:
    """Gather and scatter of pages of odd and usual sizes."""
    count = 0
    for page_bytes in (4, 60, 4096, 16384, 16400):
        for programs in (1, 16):
            pool = random_bytes(33, page_bytes, seed=1)
            numbers = torch.randperm(33, device=DEVICE)[:9]
            rows = torch.zeros(9, page_bytes, dtype=torch.uint8, device=DEVICE)
            triton_pages.launch_copy(pool, numbers, rows, gather=True, programs=programs)
            assert torch.equal(rows, pool[numbers]), f"gather of {page_bytes}"
            goal, expected = (random_bytes(33, page_bytes, seed=2) for _ in range(2))
            expected[numbers] = rows
            triton_pages.launch_copy(goal, numbers, rows, gather=False, programs=programs)
            assert torch.equal(goal, expected), f"scatter of {page_bytes}"
            count += 2
    return f"{count} cases, byte for byte"


def codes() -> str:
    """Fused int8 and int4 against the codec on the host."""
    count = 0
    for codec in (Int8(), Int4()):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for values in (GROUP, 5 * GROUP, 8192):
                draw = torch.Generator().manual_seed(values)
                host = (torch.randn(6, values, generator=draw) * 20).to(dtype)
                pool, numbers = host.to(DEVICE), torch.tensor([5, 0, 3], device=DEVICE)
                expected = codec.encode(host[[5, 0, 3]])
                found = torch.zeros(expected.shape, dtype=torch.uint8, device=DEVICE)
                how = {"group": GROUP, "bits": codec.code_bits}
                places = torch.arange(3, device=DEVICE) * expected.shape[1]
                rows = CodedRows(pool, numbers, found.view(-1), places)
                triton_pages.launch_encode(rows, **how)
                assert torch.equal(found.cpu(), expected), f"{codec.name} {dtype} {values}"
                back = torch.zeros_like(pool)
                triton_pages.launch_decode(rows._replace(rows=back), **how)
                wanted = codec.decode(expected, values, dtype)
                assert torch.equal(back.cpu()[[5, 0, 3]], wanted), f"{codec.name} {dtype}"
                count += 1
    return f"{count} cases, bit for bit"


def relayouts() -> str:
    """Every pair of arrangements, on the device and from mapped host memory."""
    shape, blocks, count = BlockShape(2, 16, 4, 128), 12, 0
    ways = [Arrangement.canonical(shape)] + [
        Arrangement.paged(shape, blocks=blocks, heads_first=heads, planes_first=planes)
        for heads in (False, True)
        for planes in (False, True)
    ]
    size = blocks * 2 * 16 * 4 * 128
    reads = torch.tensor([3, 0, 11, 5])
    writes = torch.tensor([7, 1, 2, 10])
    for source_at in ways:
        for target_at in ways:
            for mapped in (False,) if CPU else (False, True):
                source = [random_bytes(1, size, seed=n).view(-1) for n in range(3)]
                if mapped:
                    source = [layer.cpu().pin_memory() for layer in source]
                target = [random_bytes(1, size, seed=n + 9).view(-1) for n in range(3)]
                expected = [layer.cpu().clone() for layer in target]
                plain = [layer.cpu() for layer in source]
                offsets = source_at.offsets(reads), target_at.offsets(writes)
                move_by_reference(
                    shape,
                    Side(Pool(tuple(plain), source_at), offsets[0]),
                    Side(Pool(tuple(expected), target_at), offsets[1]),
                )
                move_blocks(
                    shape,
                    Side(Pool(tuple(source), source_at), offsets[0]),
                    Side(Pool(tuple(target), target_at), offsets[1]),
                )
                synchronize()
                same = (torch.equal(t.cpu(), e) for t, e in zip(target, expected, strict=True))
                assert all(same), f"{source_at} to {target_at}, mapped {mapped}"
                count += 1
    return f"{count} pairs" + (", by the reference: move.cu needs CUDA" if CPU else "")


def ring() -> str:
    """Blocks down and up through the staging ring, by every route, and nothing else touched."""
    taken: set[Route] = set()
    for plan, frames in ((SMALL, 900), (LLAMA, 12)):
        for by_kernel in (False, True):
            taken |= round_trip(plan, frames, by_kernel=by_kernel)
    assert taken == set(Route), f"only {taken}"
    return "blocks of 16 KiB, and of 2 MiB layer by layer; whole pages, runs and mapped"


def round_trip(plan: PagePlan, frames: int, *, by_kernel: bool) -> set[Route]:
    """Save, clear and load; the routes that were taken."""
    pages = 6
    # A copy engine that is as fast for small pieces, so that parts of pages are copied as runs.
    way = Direction(tuple(1e15 / size for size in SIZES), 1e20 if by_kernel else 1.0)
    host, pool, staging, streams = staged(
        plan, pages, frames, profile=LinkProfile(way, way, "made up")
    )
    draw = random.Random(1)
    moves = moves_of(plan, draw, pages, frames)
    host_before, pool_before = host.clone(), pool.clone()
    synchronize()
    staging.save(*moves).synchronize()
    pool.zero_()
    synchronize()
    if plan is LLAMA and not by_kernel:
        staging.load_layers(*moves)[-1].synchronize()
    else:
        staging.load(*moves).synchronize()
    step = plan.block_bytes
    flat, kept = pool.view(-1).cpu(), pool_before.view(-1).cpu()
    moved = set(moves.frames.tolist())
    for frame in range(frames):
        part = slice(frame * step, (frame + 1) * step)
        wanted = kept[part] if frame in moved else torch.zeros(step, dtype=torch.uint8)
        assert torch.equal(flat[part], wanted), f"frame {frame}"
    untouched = set(range(pages)) - set((moves.places // plan.warm_page_blocks).tolist())
    assert all(torch.equal(host[page], host_before[page]) for page in untouched)
    if isinstance(streams, RecordingStreams):
        assert streams.races() == []
    return {route for route, size in staging.moved_bytes.items() if size}


def device_tier() -> str:
    """The device tier holds what was put, also where writer and reader have own streams."""
    tier = DeviceTier(SMALL, frames=64, device=DEVICE.type)
    tier.open()
    draw = random.Random(2)
    shape = (SMALL.layers, 10, SMALL.block_layer_bytes)
    for turn in range(20):
        data = random_bytes(SMALL.layers, 10 * SMALL.block_layer_bytes, seed=turn).view(shape)
        spans = [Span(n, page, 0, 1) for n, page in enumerate(draw.sample(range(64), 10))]
        if CPU:
            tier.write(spans, data)
        else:
            synchronize()
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                busy = torch.randn(4096, 4096, device=DEVICE)
                for _ in range(5):
                    busy = busy @ busy  # the write is queued behind this, and the read must wait
                tier.write(spans, data)
        out = torch.zeros(shape, dtype=torch.uint8)
        tier.read(spans, out)
        assert torch.equal(out, data.cpu()), f"turn {turn}"
    synchronize()
    tier.close()
    return "20 turns of 10 blocks"


def graph() -> str:
    """A move captured in a CUDA graph moves what was chosen before each replay."""
    shape, blocks = BlockShape(2, 16, 4, 128), 64
    at = Arrangement.canonical(shape)
    source, target = (random_bytes(1, blocks * at.block, seed=n).view(-1) for n in (1, 2))
    move = FixedMove(shape, Pool((source,), at), Pool((target,), at), blocks=16)
    replay = move.launch
    if not CPU:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            move.launch()
        replay = captured.replay
    draw = np.random.default_rng(3)
    expected = target.clone()
    for count in (16, 3, 0, 9):
        reads, writes = (torch.from_numpy(draw.permutation(blocks)[:count]) for _ in range(2))
        move.choose(at.offsets(reads), at.offsets(writes))
        replay()
        rows = expected.view(blocks, -1)
        rows[writes.to(DEVICE)] = source.view(blocks, -1)[reads.to(DEVICE)]
        assert torch.equal(target, expected), f"{count} blocks"
    return "4 replays" if not CPU else "4 launches; capturing needs CUDA"


def profile() -> str:
    """Measuring the link ends, with figures that can be used."""
    found = measure_device(streams_of(), DEVICE)
    words = []
    for name, way in (("up", found.up), ("down", found.down)):
        assert all(0 < rate < 1e13 for rate in (*way.copy, way.kernel)), name
        copies = ", ".join(
            f"{size >> 10}K {rate / 1e9:.1f}" for size, rate in zip(SIZES, way.copy, strict=True)
        )
        words.append(
            f"{name}: copies {copies}, kernel {way.kernel / 1e9:.1f} GB/s,"
            f" crossover {way.crossover_bytes >> 10} KiB"
        )
    return "; ".join(words) if not CPU else "figures are of memory, not of a link"


def side_stream() -> str:
    """Blocks gathered beside an engine's stream are those of then; what comes back is waited for.

    The engine writes over all of its cache right after each step, and reads right after a load.
    """
    layers, places, size = 8, 256, 1 << 16
    cache = random_bytes(layers, places * size, seed=1).view(layers, places, size)
    saving, loading = SideStream(DEVICE), SideStream(DEVICE)
    draw = random.Random(4)
    rounds = 4 if CPU else 100
    for number in range(rounds):
        chosen, others = (draw.sample(range(places), 32) for _ in range(2))
        cache.random_(0, 256)
        expected = cache[:, chosen].clone()
        saving.follow()
        with saving.queue():
            index = saving.index(chosen)
            rows = torch.stack([layer.index_select(0, index) for layer in cache])
        saving.mark().hold()
        with saving.queue():
            host = saving.to_host(rows)
        copied = saving.mark()
        cache.zero_()
        copied.wait()
        loading.follow()
        with loading.queue():
            index = loading.index(others)
            for layer, source in zip(cache, host, strict=True):
                layer.index_copy_(0, index, source.to(DEVICE, non_blocking=True))
        loading.mark().hold()
        assert torch.equal(cache[:, others], expected), f"round {number}"
    return f"{rounds} rounds of {layers} layers, 32 blocks of {size >> 10} KiB"
