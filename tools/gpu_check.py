"""Everything that needs a GPU, in one call; on a CPU the same checks, so that they never rot.

    python tools/gpu_check.py [--cpu] [--json FILE] [--markdown FILE] [--gib 16]

First every kernel and the staging ring against their references, then speed, as ratios to what the
same device gives to one plain copy in the same run. It needs torch, numpy, numba, triton, cupy and
rich, and nothing else of what tierkv uses. Without a CUDA device, or with `--cpu`, kernels run in
Triton's interpreter, the ring on recorded streams, and speed is not measured. Exits 1 if a check
fails; a missed reach is shown, and fails only with `--check`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

CPU = "--cpu" in sys.argv or not Path("/dev/nvidiactl").exists()
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measuring import Row, show

from tierkv.codecs.grouped import GROUP, Int4, Int8
from tierkv.core.geometry import GIB, MIB, KVGeometry, PagePlan
from tierkv.kernels import triton_pages
from tierkv.kernels.relayout import (
    Arrangement,
    BlockShape,
    Side,
    move_blocks,
    move_by_reference,
)
from tierkv.testing.streams import RecordingStreams
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.host import HostTier
from tierkv.transfer.staging import PageMove, Staging
from tierkv.transfer.streams import CudaStreams, Event

DEVICE = torch.device("cpu" if CPU else "cuda:0")
#: Blocks of 16 KiB: frames of one hot page, so that every page goes somewhere else.
SMALL = PagePlan.of(KVGeometry(layers=4, kv_heads=1, head_dim=64))
#: Llama-3-8B: a block of 16 tokens is a warm page of 2 MiB, its frame 128 hot pages.
LLAMA = PagePlan.of(KVGeometry(layers=32, kv_heads=8, head_dim=128))
BATCH = 64 * MIB

Check = Callable[[], str]


def main() -> int:
    """Run the checks, then the speed table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="do without a device")
    parser.add_argument("--check", action="store_true", help="exit 1 where a reach is missed")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the table for docs/gpu.md")
    parser.add_argument("--gib", type=int, default=16, help="pinned memory to register")
    options = parser.parse_args()
    print(f"device: {device_name()}; torch {torch.__version__}; {platform.platform()}")
    failed = [check.__name__ for check in CHECKS if not passes(check)]
    rows = [] if CPU else list(speed_rows(options.gib))
    if CPU:
        print("speed: skipped, there is no CUDA device")
    else:
        show(rows, title="tierkv on the device, against plain copies in the same run")
    date = datetime.now(UTC).date().isoformat()
    report = {
        "device": device_name(),
        "torch": torch.__version__,
        "date": date,
        "failed": failed,
        "rows": [asdict(row) | {"holds": row.holds} for row in rows],
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(date, rows))
    missed = [row.what for row in rows if not row.holds]
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    if options.check and missed:
        sys.stderr.write(f"missed: {'; '.join(missed)}\n")
    return 1 if failed or (options.check and missed) else 0


def passes(check: Check) -> bool:
    """Run one check and say how it went."""
    begun = time.monotonic()
    try:
        note = check()
    except Exception:  # noqa: BLE001 the others shall be seen too
        print(f"FAILED {check.__name__}")
        traceback.print_exc()
        return False
    print(f"ok     {check.__name__}: {note} ({time.monotonic() - begun:.1f} s)")
    return True


def device_name() -> str:
    """The device, in words."""
    return "none" if CPU else torch.cuda.get_device_name(DEVICE)


# ---- correctness


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
                triton_pages.launch_encode(pool, numbers, found, **how)
                assert torch.equal(found.cpu(), expected), f"{codec.name} {dtype} {values}"
                back = torch.zeros_like(pool)
                triton_pages.launch_decode(back, numbers, found, **how)
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
                    Side(plain, offsets[0], source_at),
                    Side(expected, offsets[1], target_at),
                )
                move_blocks(
                    shape,
                    Side(source, offsets[0], source_at),
                    Side(target, offsets[1], target_at),
                )
                synchronize()
                same = (torch.equal(t.cpu(), e) for t, e in zip(target, expected, strict=True))
                assert all(same), f"{source_at} to {target_at}, mapped {mapped}"
                count += 1
    return f"{count} pairs" + (", by the reference: move.cu needs CUDA" if CPU else "")


def ring() -> str:
    """Blocks down and up through the staging ring, and nothing else touched."""
    for plan, frames in ((SMALL, 900), (LLAMA, 12)):
        pages = 6
        host, pool, staging, streams = staged(plan, pages, frames)
        draw = random.Random(1)
        moves = moves_of(plan, draw, pages, frames)
        host_before, pool_before = host.clone(), pool.clone()
        staging.save(moves, after=streams.computed()).synchronize()
        pool.zero_()
        synchronize()
        staging.load(moves, after=streams.computed()).synchronize()
        step = plan.block_bytes
        flat, kept = pool.view(-1).cpu(), pool_before.view(-1).cpu()
        moved = {frame for move in moves for frame in move.frames}
        for frame in range(frames):
            part = slice(frame * step, (frame + 1) * step)
            wanted = kept[part] if frame in moved else torch.zeros(step, dtype=torch.uint8)
            assert torch.equal(flat[part], wanted), f"frame {frame}"
        untouched = set(range(pages)) - {move.page for move in moves}
        assert all(torch.equal(host[page], host_before[page]) for page in untouched)
        if isinstance(streams, RecordingStreams):
            assert streams.races() == []
    return "blocks of 16 KiB and of 2 MiB"


def device_tier() -> str:
    """The device tier itself holds what was put."""
    tier = DeviceTier(SMALL, frames=64, device=DEVICE.type)
    tier.open()
    from tierkv.core.tier import Span

    data = random_bytes(SMALL.layers, 10 * SMALL.block_layer_bytes, seed=4).cpu().numpy()
    data = data.reshape(SMALL.layers, 10, SMALL.block_layer_bytes)
    spans = [Span(n, page, 0, 1) for n, page in enumerate(random.Random(2).sample(range(64), 10))]
    tier.write(spans, data)
    out = torch.zeros(data.shape, dtype=torch.uint8)
    tier.read(spans, out)
    assert torch.equal(out, torch.from_numpy(data))
    tier.close()
    return "10 blocks"


CHECKS: tuple[Check, ...] = (copies, codes, relayouts, ring, device_tier)


# ---- speed


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
            begun = time.perf_counter()
            last = staging.load(moves)
            submit_us = (time.perf_counter() - begun) * 1e6
            last.synchronize()
            yield Row("submit 4,096 pages", submit_us, 100, False, "us")
        else:
            yield gemm_row(staging, moves)
            del streams
    yield duplex_row()
    yield relayout_row()
    yield codes_row(down)
    yield register_row(gib)


def gemm_row(staging: Staging, moves: list[PageMove]) -> Row:
    """How much a loop of matrix products is slowed by loads beside it."""
    left = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    right = torch.randn_like(left)

    def products() -> None:
        for _ in range(20):
            torch.mm(left, right)

    alone = seconds(products)

    def beside() -> None:
        for _ in range(8):
            staging.load(moves)
        products()

    slowed = seconds(beside)
    return Row("matrix products slowed by loads", (slowed / alone - 1) * 100, 3, False, "%")


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
        loaded, saved = up.load(moves), down.save(moves)
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
    sides = Side([source], at.offsets(numbers), at), Side([target], ours.offsets(numbers), ours)
    everything = torch.cuda.get_device_properties(DEVICE).multi_processor_count * 2
    taken = seconds(lambda: move_blocks(shape, *sides, programs=everything))
    return Row("relayout inside the device, HND to ours", plain / taken, 0.85)


def codes_row(down: float) -> Row:
    """Int4 codes made on the device and copied down, in bytes before encoding."""
    values = 8192
    pool = torch.randn(BATCH // (2 * values), values, device=DEVICE).to(torch.bfloat16)
    numbers = torch.randperm(len(pool), device=DEVICE)
    codec = Int4()
    width = codec.encoded_bytes(values, pool.dtype)
    host = torch.empty((len(pool), width), dtype=torch.uint8).pin_memory()
    taken = seconds(lambda: host.copy_(codec.encode_pages(pool, numbers), non_blocking=True))
    return Row("int4 encode and copy down, bytes before encoding", down / taken, 3)


def register_row(gib: int) -> Row:
    """Mapping, touching and registering the host arena."""
    plan = LLAMA
    tier = HostTier(plan, pages=gib * GIB // plan.warm_page_bytes, threads=8, cuda=True)
    begun = time.monotonic()
    tier.open()
    taken = (time.monotonic() - begun) * 16 / gib
    tier.close()
    return Row("map, touch and register 16 GiB", taken, 1, False, "s", note=f"{gib} GiB")


# ---- parts


def staged(
    plan: PagePlan, pages: int, frames: int, *, seeded: bool = True
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
    streams = RecordingStreams() if CPU else CudaStreams(DEVICE)
    return host, pool, Staging(streams, plan, host, pool), streams


def moves_of(
    plan: PagePlan, draw: random.Random, pages: int, frames: int, *, whole: bool = False
) -> list[PageMove]:
    """All blocks of all pages, or some of some, to frames drawn at random."""
    free = draw.sample(range(frames), frames)
    size = plan.warm_page_blocks
    chosen = range(pages) if whole else draw.sample(range(pages), pages - 1)
    moves = []
    for page in chosen:
        offsets = list(range(size)) if whole else sorted(draw.sample(range(size), -(-size // 2)))
        moves.append(PageMove(page, offsets, [free.pop() for _ in offsets]))
    return moves


def wait_for(move: Callable[[list[PageMove]], Event], moves: list[PageMove]) -> None:
    """Move, and wait until it is done."""
    move(moves).synchronize()


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


def markdown(date: str, rows: list[Row]) -> str:
    """The table as docs/gpu.md holds it."""
    lines = [f"{device_name()}, {date}, torch {torch.__version__}.", "", "| what | seen | reach |"]
    lines.append("|---|---|---|")
    for row in rows:
        sign = ">=" if row.higher_is_better else "<="
        reach = "" if row.reach is None else f"{sign} {row.reach:g}"
        lines.append(f"| {row.what} | {row.value:.3g} {row.unit} | {reach} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
