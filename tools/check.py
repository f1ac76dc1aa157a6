"""Everything that must hold before a change lands: `python tools/check.py [--fast] [STEP ...]`.

Every step runs even if an earlier one failed; the summary names each with its time. `--fast`
leaves the tests out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
SCRIPTS = Path(PYTHON).parent

STEPS: dict[str, list[list[str]]] = {
    "format": [[PYTHON, "-m", "ruff", "format", "--check", "."]],
    "lint": [[PYTHON, "-m", "ruff", "check", "."]],
    "types": [[PYTHON, "-m", "mypy"]],
    "layers": [[str(SCRIPTS / "lint-imports")]],
    "tidy": [[PYTHON, "tools/tidy.py"]],
    "configs": [
        [PYTHON, "-m", "tierkv.cli", "config", "check", str(path.relative_to(ROOT))]
        for path in sorted(ROOT.glob("configs/*.yaml"))
    ],
    "tests": [[PYTHON, "-m", "pytest", "-n", "2", "-q"]],
}


def main() -> int:
    """Run the steps; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--fast", action="store_true", help="leave the tests out")
    args = parser.parse_args()
    unknown = set(args.steps) - set(STEPS)
    if unknown:
        parser.error(f"unknown step {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    chosen = args.steps or [name for name in STEPS if not (args.fast and name == "tests")]
    results = [(name, *_run(name)) for name in chosen]
    print("\n" + "-" * 40)
    for name, is_good, seconds in results:
        print(f"{name:<10} {'ok' if is_good else 'FAILED':<8} {seconds:7.1f} s")
    return 0 if all(is_good for _, is_good, _ in results) else 1


def _run(name: str) -> tuple[bool, float]:
    print(f"\n== {name}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    codes = [subprocess.call(command, cwd=ROOT, env=environment) for command in STEPS[name]]
    seconds = time.monotonic() - start
    print(f"== {name}: {'ok' if not any(codes) else 'FAILED'} in {seconds:.1f} s", flush=True)
    return not any(codes), seconds


if __name__ == "__main__":
    sys.exit(main())
