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
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from gpu_bytes import codes, copies, device_tier, graph, profile, relayouts, ring, side_stream
from gpu_device import arena, coherent, devices, direct_storage, sanitizer, shared_slab
from gpu_parts import CPU, Skipped, device_name
from measuring import Row, show

Check = Callable[[], str]


def main() -> int:
    """Run the checks, then the speed table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="do without a device")
    parser.add_argument("--check", action="store_true", help="exit 1 where a reach is missed")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the table for docs/gpu.md")
    parser.add_argument("--gib", type=int, default=16, help="pinned memory to register")
    parser.add_argument("--only", action="append", metavar="CHECK", help="this check, no speed")
    options = parser.parse_args()
    print(f"device: {device_name()}; torch {torch.__version__}; {platform.platform()}")
    wanted = [check for check in CHECKS if not options.only or check.__name__ in options.only]
    failed = [check.__name__ for check in wanted if not passes(check)]
    rows: list[Row] = []
    if options.only:
        return 1 if failed else 0
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
    except Skipped as reason:
        print(f"skip   {check.__name__}: {reason}")
        return True
    except Exception:  # noqa: BLE001 the others shall be seen too
        print(f"FAILED {check.__name__}")
        traceback.print_exc()
        return False
    print(f"ok     {check.__name__}: {note} ({time.monotonic() - begun:.1f} s)")
    return True


CHECKS: tuple[Check, ...] = (
    *(copies, codes, relayouts, ring, device_tier, graph, profile, side_stream),
    *(devices, arena, shared_slab, coherent, direct_storage, sanitizer),
)


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
