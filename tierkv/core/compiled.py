"""Compiled: loops over arrays that numba turns into machine code, kept beside their module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function when it is first called with arguments of some types.

    The machine code is cached where the module lies, or in NUMBA_CACHE_DIR.
    """
    return cast("F", njit(cache=True)(function))
