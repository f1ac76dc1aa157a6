"""tools/bench_reliability.py measures every row, and its exit status says whether all hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tierkv.tiers.files.direct import DirectFiles

TOOL = Path(__file__).parents[1] / "tools" / "bench_reliability.py"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False
    )


def test_each_row_is_measured_and_a_missed_reach_is_named(tmp_path: Path) -> None:
    reason = DirectFiles.probe(tmp_path / "probe")
    if reason is not None:
        pytest.skip(reason)
    report = tmp_path / "report.json"
    place = ("--directory", str(tmp_path / "disk"))
    done = run_tool("--quick", "--check", "--json", str(report), *place)

    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert report.exists(), done.stderr
    rows = json.loads(report.read_text())
    missed = [row["what"] for row in rows if not row["holds"]]
    assert done.returncode == bool(missed), done.stdout + done.stderr
    assert done.stderr == (f"missed: {'; '.join(missed)}\n" if missed else "")
    assert [row["what"].split(",")[0] for row in rows if row["reach"]] == [
        "cold get",
        "cold get",
        "opening 1.56 GiB after a clean stop",
        "opening 1.56 GiB after a crash",
        "p99 of reading 2 MiB",
        "p99 of reading 2 MiB",
        "p99 of reading 32 MiB",
        "p99 of reading 32 MiB",
    ]
    assert all(row["value"] > 0 for row in rows)
    assert list((tmp_path / "disk").iterdir()) == [], "what was written is removed"


def test_a_row_that_is_not_known_is_refused(tmp_path: Path) -> None:
    done = run_tool("--rows", "verify,nothing", "--directory", str(tmp_path / "disk"))
    assert done.returncode == 2
    assert "nothing" in done.stderr
