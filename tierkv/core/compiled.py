"""Compiled: loops over arrays that numba turns into machine code, kept beside their module.

numba keeps the code of a function until the function's own file changes, though it holds the code
of what it calls in other files too. Here it is kept until any file changes that may be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])

#: Packages that have compiled functions.
_PACKAGES = ("core", "plan", "sim")


def compiled(function: F) -> F:
    """Compile a function when it is first called with arguments of some types.

    The machine code is kept where the module lies, or in NUMBA_CACHE_DIR.
    """
    dispatcher = njit(cache=True)(function)
    # numba has no public way to say what a cached function depends on.
    dispatcher._cache._cache_file._source_stamp = _stamp()
    return cast("F", dispatcher)


@cache
def _stamp() -> tuple[int, int]:
    """When any of the files changed last, and how large all of them are."""
    root = Path(__file__).resolve().parents[1]
    found = [path.stat() for name in _PACKAGES for path in (root / name).rglob("*.py")]
    return max(file.st_mtime_ns for file in found), sum(file.st_size for file in found)
