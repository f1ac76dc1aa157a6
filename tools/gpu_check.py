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
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from gpu_parts import (
    CPU,
    DEVICE,
    LLAMA,
    SMALL,
    device_name,
    moves_of,
    random_bytes,
    staged,
    synchronize,
)
from measuring import Row, show

from tierkv.codecs.grouped import GROUP, Int4, Int8
from tierkv.core.tier import Span
from tierkv.kernels import triton_pages
from tierkv.kernels.relayout import (
    Arrangement,
    BlockShape,
    Pool,
    Side,
    move_blocks,
    move_by_reference,
)
from tierkv.testing.streams import RecordingStreams
from tierkv.tiers.device import DeviceTier

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
    rows: list[Row] = []
    if not CPU:
        from gpu_speed import speed_rows

        rows = list(speed_rows(options.gib))
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
    """Blocks down and up through the staging ring, and nothing else touched."""
    for plan, frames in ((SMALL, 900), (LLAMA, 12)):
        pages = 6
        host, pool, staging, streams = staged(plan, pages, frames)
        draw = random.Random(1)
        moves = moves_of(plan, draw, pages, frames)
        host_before, pool_before = host.clone(), pool.clone()
        synchronize()
        staging.save(*moves).synchronize()
        pool.zero_()
        synchronize()
        if plan is LLAMA:
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
    return "blocks of 16 KiB, and of 2 MiB layer by layer"


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


CHECKS: tuple[Check, ...] = (copies, codes, relayouts, ring, device_tier)


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
