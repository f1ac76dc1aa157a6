"""A limit on time for drills: what hangs is told of, and the drill goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from tierkv.testing.drills.base import BROKEN, Wrong

T = TypeVar("T")


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` gives or raises, on a thread of its own; `Wrong` if it takes longer."""
    done: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 it is raised again by who waits
            raised.append(error)

    thread = threading.Thread(target=run, name="drill", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise Wrong(BROKEN, f"it hung for {limit_s:g} s")
    if raised:
        raise raised[0]
    return done[0]
