"""Allocations fail, one after the other, in an operation of a store: the loop of CPython's tests.

`_testcapi.set_nomemory(first, stop)` makes the allocations of the interpreter with those numbers
fail, on every thread, until it is taken back. The caller may get a MemoryError. With memory back
the store is as good as before, or it says that it gave up: then it is a miss, without a hang, and
as good as before once it was closed and opened again. Nothing that was durable is lost, no thread,
transfer, pin, lease or lock is left over, and it takes and gives pages.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from tierkv.testing.drills.process_child import (
    Durable,
    Life,
    Offered,
    block_bytes,
    prefixes_of,
    script,
    tokens_of,
)

#: Operations in one life, each with other allocations failing.
TURNS: Final = 12
#: What numpy and threading raise where they mean MemoryError.
_OTHER_WORDS: Final = ("error return without exception set", "can't allocate lock")


class _Turn(NamedTuple):
    """An operation, prepared so that only the store allocates in it; and what is made of it."""

    run: Callable[[], object]
    then: Callable[[], None] = lambda: None


def starve(life: Life, plan: tuple[str, int, int, int]) -> int:
    """Live, and starve an operation again and again; gives how often it raised MemoryError."""
    name, first, width, stride = plan
    rng = random.Random(f"{life.task.seed}/0")
    life.open()
    for step in script(rng, alone=False):
        step(life)
    life.flush()
    raised = 0
    for number in range(TURNS):
        begin = first + number * stride
        turn = _TURNS[name](life, rng, number)
        error = _starved(turn.run, begin, begin + width)
        if error is None:
            turn.then()
        elif isinstance(error, MemoryError) or str(error) in _OTHER_WORDS:
            raised += 1
        else:
            raise error
        try:
            _expect_well(life)
        except Exception as error:
            words = f"{name} with allocations {begin} to {begin + width - 1} failing"
            raise AssertionError(words) from error
    return raised


def _starved(run: Callable[[], object], first: int, stop: int) -> BaseException | None:
    """What an operation raises while allocations fail."""
    # It has no types, and some builds of Python leave it out.
    from _testcapi import remove_mem_hooks, set_nomemory  # type: ignore[import-not-found]

    try:
        set_nomemory(first, stop)
        run()
    except BaseException as error:  # noqa: BLE001 it is looked at with memory back
        remove_mem_hooks()
        return error
    finally:
        remove_mem_hooks()
    return None


def _put(life: Life, _rng: random.Random, number: int) -> _Turn:
    """A prompt that nobody knows."""
    prompt, space = [4, number, 5, number], "default"
    chosen = prefixes_of(prompt, space)
    for prefix in chosen:
        life.offered.setdefault(prefix, set()).add(number)
    life.journal.say(Offered(chosen, number))
    data = np.stack([block_bytes(prefix, number) for prefix in chosen], axis=1)
    tokens, store = tokens_of(prompt), life.opened
    return _Turn(lambda: store.put(tokens, data, namespace=space))


def _get(life: Life, rng: random.Random, _number: int) -> _Turn:
    """A prompt that is stored; with few pages in memory, much of it comes from the disk."""
    space, prompt = rng.choice(sorted(life.offered))
    tokens, store = tokens_of(prompt), life.opened
    out = np.full((2, len(prompt), 1024), 0xAA, np.uint8)
    counts: list[int] = [0]

    def run() -> None:
        counts[0] = store.get(store.match(tokens, namespace=space), out)

    return _Turn(run, lambda: life.verify(out, prompt[: counts[0]], space))


def _match(life: Life, rng: random.Random, _number: int) -> _Turn:
    space, prompt = rng.choice(sorted(life.offered))
    tokens, store = tokens_of(prompt), life.opened
    return _Turn(lambda: store.match(tokens, namespace=space))


def _flush(life: Life, _rng: random.Random, number: int) -> _Turn:
    """Pages that are not on the disk yet."""
    life.put([5, number, 4], "b")
    covered = life.found(life.stored)
    store, durable = life.opened, [False]

    def run() -> None:
        durable[0] = store.flush()

    def then() -> None:
        if durable[0]:
            life.journal.say(Durable(sorted(covered & life.found(covered))))

    return _Turn(run, then)


_TURNS: Final = {"put": _put, "get": _get, "match": _match, "flush": _flush}


def _expect_well(life: Life) -> None:
    """With memory back the store is as good as before, or it says that it gave up.

    Then all is a miss, and closing and opening it makes it as good as before.
    """
    store = life.opened
    if store.snapshot()["tiers"]["gave_up"]:
        space, known = min(life.offered)
        assert life.get(known, space) == 0, "it gave up and has bytes"
        assert not store.flush(), "it gave up and calls pages durable"
        life.reopen()
    life.expect_rest()
    prompt, space = [6, 5, 6], "b"
    life.put(prompt, space)
    assert life.flush(), "a flush with memory back returned False"
    assert life.get(prompt, space) == len(prompt)
