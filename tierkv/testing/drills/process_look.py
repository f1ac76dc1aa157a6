"""A look at what a life of the drill `processes` left: without faults, against its book.

It runs in a process of its own, as a life does, and ends it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

from tierkv.testing.drills.base import BROKEN, LEAKED, LOST
from tierkv.testing.drills.process_child import (
    FILLER,
    Book,
    Ended,
    Journal,
    Life,
    Prefix,
    Task,
    holdings,
    prefixes_of,
    root_of,
    talk_to_nobody,
)


def look(task: Task, book: Book, send: Callable[[bytes], object]) -> None:
    """Open what a life left, hold it against its book, use it; end this process."""
    journal = Journal(send)
    talk_to_nobody()
    try:
        (Path(task.top) / "cold" / FILLER).unlink(missing_ok=True)
        before = holdings()
        _look(task, book, journal)
        left = holdings() - before
        if left:
            journal.wrong(LEAKED, f"after the store was opened again there are {sorted(left)}")
        journal.say(Ended())
    except BaseException:  # noqa: BLE001 recovery must always open
        journal.wrong(BROKEN, f"afterwards: {traceback.format_exc()}")
    os._exit(0)


def _look(task: Task, book: Book, journal: Journal) -> None:
    life = Life(task, journal)
    life.offered = {prefix: set(values) for prefix, values in book.offered}
    if not life.open():
        return
    store = life.store
    assert store is not None
    life.step()
    delivered: set[Prefix] = set()
    for namespace, prompt in sorted(life.offered, key=lambda one: -len(one[1])):
        if (namespace, prompt) not in delivered:
            count = life.get(prompt, namespace)
            delivered.update(prefixes_of(prompt[:count], namespace))
    lost = set(book.durable) - delivered
    if lost:
        journal.wrong(LOST, f"{len(lost)} of {len(book.durable)}: {sorted(lost)[:3]}")
    life.put([7, 8, 9, 7, 8], "default")
    if not life.flush() or life.get([7, 8, 9, 7, 8], "default") != 5:
        journal.wrong(BROKEN, "afterwards: it does not take pages")
    life.expect_rest()
    store.close()
    names = {path.name for path in root_of(Path(task.top)).iterdir()}
    odd = {name for name in names if not name.startswith("segment-") or name.endswith(".tmp")}
    if odd != {"lock", "manifest"}:
        journal.wrong(LEAKED, f"left behind: {sorted(odd)}")
