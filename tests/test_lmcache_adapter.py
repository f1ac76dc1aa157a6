"""`TierKVL2Adapter` inside of a real `lmcache server` on the CPU, and beside LMCache's own adapter.

`make engines-lmcache` installs LMCache beside the project and runs these. What needs LMCache's own
classes is in `lmcache_l2.py`, which runs where LMCache is, one process for each part.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tierkv.testing.engines import EngineTests

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("TIERKV_LMCACHE_PYTHON", str(ROOT / ".venv-lmcache" / "bin" / "python"))


class TestLMCache(EngineTests):
    """The engine is played, LMCache and its server are real: see the program.

    LMCache knows a model's weights by the model's name alone, so "another model" has another name.
    """

    small_host = "32MiB"  # a document is 20 MiB

    @property
    def program(self) -> Sequence[str | Path]:
        return [PYTHON, ROOT / "tools" / "lmcache_life.py"]


@pytest.mark.parametrize(
    "part",
    ["beside", "interface", "settings_of", "forms_apart", "serialized", "locks",
     "deleted_while_moved", "faults", "killed_server"],
)  # fmt: skip
def test_the_adapter_keeps_what_lmcache_asks_of_one(part: str, tmp_path: Path) -> None:
    """See the functions of `lmcache_l2.py`, which have the parts' names."""
    said = run(ROOT / "tests" / "lmcache_l2.py", part, tmp_path)
    assert said.splitlines()[-1] == "done"


def test_lmcache_s_own_benchmark_of_adapters_verifies_what_it_stored(tmp_path: Path) -> None:
    params = f'"adapter_params": {{"directory": "{tmp_path}/kv", "cold": "1GiB"}}'
    adapter = f"""{{"type": "plugin", "module_path": "tierkv.engines.lmcache",
        "class_name": "TierKVL2Adapter", {params}}}"""
    said = run("-m", "lmcache.cli.main", "bench", "l2", "--l2-adapter", adapter,
               "--num-keys", "8", "--data-size-kb", "1024", "--no-skip-verify")  # fmt: skip
    assert "All 8 keys data verified OK" in said


def run(*command: str | Path) -> str:
    """What a program says in LMCache's environment."""
    done = subprocess.run(
        [PYTHON, *map(str, command)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LMCACHE_TRACK_USAGE": "false"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
