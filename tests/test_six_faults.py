"""The six faults of the README, made by its own commands: each costs a recompute, nothing else.

The commands run in bash on a directory as the demo leaves one; a process of its own made it, and
another one looks at it afterwards. Root would not notice modes, so that everything here runs
without that privilege.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.demo_directories import BLOCKS, PAGES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "tierkv demo --quick --directory demo"
#: Stored before a fault: 20 pages, of which the commands hit the 14th, or all from there on.
PROMPTS = 5
WHOLE = [BLOCKS] * PROMPTS
TIMEOUT_S = 120

#: Starts another program without the privilege to pass modes over (CAP_DAC_OVERRIDE).
MEEKLY = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
    sys.exit("the privilege cannot be given up")
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Fault(NamedTuple):
    """One row of the README's table."""

    command: str
    check: list[str]
    next_run: str


def section() -> str:
    return README.split("## When something breaks\n")[1].split("\n## ")[0]


def faults() -> dict[str, Fault]:
    _, *rows = re.findall(r"^\|.*\|$", section().split("| fault |")[1], re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {
        name.split(" (")[0]: Fault(command.strip("`"), re.findall(r"`(.+?)`", check), following)
        for name, command, check, following in cells
    }


FAULTS = faults()
(SETUP,) = re.findall(r"^```sh\n(.*?)^```", section(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that nothing has happened to, with the prompts durable in `demo/kv`."""
    place = tmp_path_factory.mktemp("stored")
    done = store("put", place, PROMPTS)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def place(stored: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    shutil.copytree(stored / "demo", tmp_path / "demo")
    return tmp_path


def environment() -> dict[str, str]:
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    # Without a width, what is printed into a pipe has whole lines.
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return kept | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MEEKLY, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def bash(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    return run("bash", "-c", command, cwd=place)


def store(word: str, place: Path, prompts: int) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, "-m", "tests.demo_directories", word, "demo", prompts)
    return run(*words, cwd=place)


def break_it(name: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a fault's command as one does who has typed what stands above the table."""
    lines = SETUP.splitlines()
    assert lines.pop(0) == DEMO
    done = bash("\n".join([*lines, FAULTS[name].command]), place)
    assert done.returncode == 0, done.stderr
    return done


def expect_check(name: str, place: Path, *, damaged: bool) -> None:
    """The deep check says what the README says it does."""
    done = bash("tierkv check --deep demo/kv", place)
    assert done.returncode == (1 if damaged else 0), done.stdout + done.stderr
    assert FAULTS[name].check
    for words in FAULTS[name].check:
        assert words in done.stdout
    assert ("damaged: 1 findings" in done.stdout) == damaged


def look(place: Path, prompts: int = PROMPTS) -> tuple[list[int], int]:
    """What a new process finds, and how many damaged pages; it has stored anew what was missing."""
    done = store("look", place, prompts)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    return found["blocks"], found["damaged"]


def expect_mended(place: Path, prompts: int = PROMPTS) -> None:
    """A process later, all of it is there, and what was put after the fault as well."""
    assert look(place, prompts + 1) == ([BLOCKS] * (prompts + 1), 0)
    assert bash("tierkv check --deep demo/kv", place).returncode == 0


def state_of(place: Path) -> dict[str, str]:
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_readme_has_six_faults() -> None:
    names = ("bytes flipped", "file cut off", "file deleted", "directory read-only", "disk full")
    assert list(FAULTS) == [*names, "process killed"]


def test_a_directory_that_nothing_happened_to_is_whole(place: Path) -> None:
    assert look(place) == (WHOLE, 0)


def test_flipped_bytes_cost_their_page_and_what_is_behind_it(place: Path) -> None:
    break_it("bytes flipped", place)
    expect_check("bytes flipped", place, damaged=True)

    blocks, damaged = look(place)
    # Page 13 is the second of prompt 3: the two blocks before it are there.
    assert (blocks, damaged) == ([BLOCKS] * 3 + [2, BLOCKS], 1)
    assert "finds 1 page damaged" in FAULTS["bytes flipped"].next_run
    expect_mended(place)


def test_a_file_that_is_cut_off_gives_what_is_left_of_it(place: Path) -> None:
    break_it("file cut off", place)
    expect_check("file cut off", place, damaged=True)

    blocks, _ = look(place)
    assert blocks == [BLOCKS] * 3 + [BLOCKS * (14 - 3 * PAGES) // PAGES, 0]
    expect_mended(place)


def test_a_file_that_is_deleted_costs_all_that_was_in_it(place: Path) -> None:
    break_it("file deleted", place)
    expect_check("file deleted", place, damaged=True)

    assert look(place) == ([0] * PROMPTS, 0)
    expect_mended(place)


def test_a_read_only_directory_is_refused_at_the_start_and_left_as_it_is(place: Path) -> None:
    break_it("directory read-only", place)
    expect_check("directory read-only", place, damaged=False)

    before = state_of(place)
    done = store("look", place, PROMPTS)
    assert done.returncode == 1
    (folder,) = (place / "demo" / "kv").iterdir()
    assert done.stderr.startswith("tierkv: ")
    assert str(folder) in done.stderr
    assert "Permission denied" in done.stderr
    assert "chmod 700, or choose another directory" in done.stderr
    assert state_of(place) == before

    (cure,) = re.findall(r"cure: `(.+?)`", FAULTS["directory read-only"].next_run)
    assert bash(cure, place).returncode == 0
    assert look(place) == (WHOLE, 0)
    expect_mended(place)


def test_a_full_disk_costs_what_would_have_been_stored_and_nothing_else(place: Path) -> None:
    before = state_of(place)
    said = break_it("disk full", place).stdout
    assert re.search(r"pages served with wrong bytes +0 +0 *\n", said)
    assert "held: every fault was noticed" in said
    assert state_of(place) == before
    expect_check("disk full", place, damaged=False)

    assert look(place) == (WHOLE, 0)
    expect_mended(place)


def test_a_killed_process_leaves_what_was_durable(place: Path) -> None:
    """The demo's place is taken by a process that puts and flushes until it is killed.

    The command is the README's but for the program and the time: `timeout` starts when something
    is durable, not when Python begins to import, as cores may be busy.
    """
    limit, _, program = FAULTS["process killed"].command.partition("tierkv ")
    assert program == "demo --directory demo"
    assert re.fullmatch(r"timeout -s KILL \d+ ", limit)
    serve = f"{sys.executable} -m tests.demo_directories serve demo {PROMPTS}"
    with subprocess.Popen(
        ["bash", "-c", re.sub(r"\d+", str(TIMEOUT_S), limit) + serve],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as killed:
        assert killed.stdout is not None
        durable = [int(killed.stdout.readline()) for _ in range(3)]
        time.sleep(0.05)
        killed.send_signal(signal.SIGALRM)  # as if its time were over
        durable += [int(line) for line in killed.stdout if line.endswith("\n")]
    assert killed.returncode == -signal.SIGKILL
    assert durable == list(range(PROMPTS, PROMPTS + len(durable)))
    done = bash("tierkv check --deep demo/kv", place)
    for words in FAULTS["process killed"].check:
        assert words in done.stdout
    # A page more may be there in part: the one that was being written.
    torn = [line for line in done.stdout.splitlines() if line.startswith("damage ")]
    assert len(torn) <= PAGES, done.stdout

    prompts = PROMPTS + len(durable)
    blocks, damaged = look(place, prompts)
    assert blocks == [BLOCKS] * prompts
    assert damaged <= PAGES
    expect_mended(place, prompts)
