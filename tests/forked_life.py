"""A life in a fork of a process that has imported its engine already."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def in_a_fork(program: str, arguments: Sequence[str], log: str) -> None:
    """Run a program that lives lives in this process, which is a fork made for it.

    So the lives of an engine that is imported need not import it each. `log` gets what it says.
    """
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
