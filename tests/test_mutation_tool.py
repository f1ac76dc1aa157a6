"""tools/mutation.py tells a mutant that a test notices from one that none does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut")

TOOL = Path(__file__).parents[1] / "tools" / "mutation.py"

ONE = '''\
"""A bound that is tested on both sides."""


def is_full(count: int) -> bool:
    return count >= 18
'''
TWO = '''\
"""A bound that is tested far from it."""

import logging
from typing import Final

logger = logging.getLogger(__name__)
MOST: Final = 3


def is_large(count: int) -> bool:
    """Never "equal"."""
    assert count >= 0, "a count is not negative"
    if count > 100:
        logger.warning("large count=%d", count)
        raise ValueError(f"{count} is too large")
    return count > MOST
'''
TESTS = """\
import pytest
from tiny.one import is_full
from tiny.two import is_large


def test_one():
    assert is_full(18)
    assert not is_full(17)


def test_two():
    assert is_large(10)
    assert not is_large(0)
    assert is_large(100)
    for count in (101, -1):
        with pytest.raises((ValueError, AssertionError)):
            is_large(count)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "tiny/__init__.py": "",
        "tiny/one.py": ONE,
        "tiny/two.py": TWO,
        "tests/test_tiny.py": TESTS,
    }.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_text(text)
    return tmp_path / "repository"


def run_tool(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--root", str(root), "--tests", '{"tiny/": "tiny"}']
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_mutant_that_no_test_notices_is_shown_and_one_that_a_test_notices_is_killed(
    root: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    before = files_of(root)
    done = run_tool(root, "--sample", "1000", "--json", str(report))

    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of(root) == before, "only copies are changed"
    found = json.loads(report.read_text())
    fates = {(one["file"], one["diff"].split("\n+")[1].strip()): one["killed"] for one in found}
    assert fates["tiny/one.py", "return count > 18"]
    assert fates["tiny/one.py", "return count >= 19"]
    assert not fates["tiny/two.py", "return count >= MOST"]
    assert not fates["tiny/two.py", "MOST: Final = 4"]
    assert fates["tiny/two.py", "MOST: Final = None"]
    assert (
        "tiny/two.py:16: swap_op\n-    return count > MOST\n+    return count >= MOST"
        in done.stdout
    )
    changed = [one["diff"] for one in found]
    for left_out in ("XX", "None, count", "NEGATIVE", "EQUAL"):
        assert not [diff for diff in changed if left_out in diff], "texts are no mutants"

    again = run_tool(root, "--again", str(report), "--check")
    assert again.returncode == 1, "all survive again, which is less than the reach"
    survived = sum(not one["killed"] for one in found)
    assert f"{survived} of" in again.stdout


@pytest.mark.slow
def test_a_sample_is_drawn_by_its_seed(root: Path, tmp_path: Path) -> None:
    samples = []
    for number, seed in enumerate((1, 1, 2)):
        report = tmp_path / f"{number}.json"
        run_tool(root, "--sample", "2", "--seed", str(seed), "--json", str(report))
        samples.append([(one["file"], one["diff"]) for one in json.loads(report.read_text())])
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 2


def test_tests_that_fail_without_a_mutant_end_the_run(root: Path) -> None:
    (root / "tests" / "test_tiny.py").write_text("def test_it():\n    assert False\n")
    done = run_tool(root, "--sample", "1")
    assert done.returncode == 1
    assert "unchanged code fails: FAILED tests/test_tiny.py::test_it" in done.stderr
