"""tools/gpu_check.py runs everywhere, with nothing but what a bare GPU machine has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

TOOL = Path(__file__).parents[1] / "tools" / "gpu_check.py"
#: What a machine with a GPU may not have.
ABSENT = ("msgspec", "pydantic", "ruamel", "ruamel.yaml", "blake3", "transformers", "hypothesis")


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"sys.path.insert(0, {str(TOOL.parent)!r})\n"
        f"sys.argv = [{str(TOOL)!r}, *{arguments!r}]\n"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_every_check_passes_on_the_cpu(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    table = tmp_path / "table.md"
    done = run_tool("--cpu", "--json", str(report), "--markdown", str(table))

    assert done.returncode == 0, done.stdout + done.stderr
    checks = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert checks == [
        *(
            "copies:",
            "codes:",
            "relayouts:",
            "ring:",
            "device_tier:",
            "graph:",
            "profile:",
            "side_stream:",
        )
    ]
    skipped = {
        line.split()[1]: line.split(": ")[1]
        for line in done.stdout.splitlines()
        if line.startswith("skip ")
    }
    assert set(skipped) == {
        *("devices:", "arena:", "shared_slab:", "coherent:", "direct_storage:", "sanitizer:")
    }
    assert all(skipped.values()), "each says why"
    assert "speed: skipped, there is no CUDA device" in done.stdout
    found = json.loads(report.read_text())
    assert (found["failed"], found["rows"]) == ([], [])
    assert table.read_text().startswith("none, 20")
