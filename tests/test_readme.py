"""What the README tells a newcomer to type works."""

from __future__ import annotations

import ast
import os
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


SHELL = [line for block in blocks("sh") for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith(("tierkv config ", "tierkv doctor"))]
SIMULATIONS = [line for line in SHELL if line.startswith("tierkv sim")]
TARGETS = [line.split()[1] for line in SHELL if line.startswith("make ")]
PYTHON = blocks("python")
STORE_EXAMPLES = [example for example in PYTHON if "Store.open" in example]


def run(arguments: list[str], home: Path, folder: Path = ROOT, timeout_s: int = 60) -> None:
    # An empty home: what a developer's own cache directory looks like is not tested here.
    environment = os.environ | {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PYTHONUSERBASE": site.getuserbase(),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def public_names(module: str) -> set[str]:
    """`__all__` of a module, read without importing it: an engine need not be installed here."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_the_readme_shows_commands_targets_and_examples() -> None:
    assert COMMANDS
    assert SIMULATIONS
    assert TARGETS
    assert len(STORE_EXAMPLES) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_ends_well(command: str, tmp_path: Path) -> None:
    run(["-m", "tierkv.cli", *command.split()[1:]], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", SIMULATIONS)
def test_a_simulation_of_the_readme_ends_well(command: str, tmp_path: Path) -> None:
    # What it writes lies in a folder of its own; the first one may have to compile.
    run(["-m", "tierkv.cli", *command.split()[1:]], tmp_path, tmp_path, timeout_s=240)


@pytest.mark.parametrize("example", STORE_EXAMPLES)
def test_the_store_example_of_the_readme_runs(example: str, tmp_path: Path) -> None:
    run(["-c", example], tmp_path)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_what_an_example_imports_from_tierkv_is_public(number: int) -> None:
    for node in ast.walk(ast.parse(PYTHON[number])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tierkv"):
            assert {alias.name for alias in node.names} <= public_names(node.module or "")


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_of_the_readme_exists(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
