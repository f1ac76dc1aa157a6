"""What one register that may forget can have done, and what it cannot."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.testing.history import History, Span


class Op(NamedTuple):
    """A write of a value, or a read that got it."""

    is_write: bool
    value: int
    begun: int
    ended: int


def unexplained(ops: list[Op], copies: int = 1) -> list[str]:
    history = History(copies)
    for op in sorted(ops, key=lambda op: not op.is_write):
        if op.is_write:
            history.writes("k", op.value, op.begun)
            history.wrote("k", op.value, op.ended)
        else:
            history.read("k", op.value, Span(op.begun, op.ended))
    return history.unexplained()


def can_be_explained(ops: list[Op]) -> bool:
    """By trying: an order of the operations in which a forgetful register does just that."""
    seen = {op.value for op in ops if not op.is_write}
    ops = [op for op in ops if op.value in seen]  # a write that nobody saw did nothing
    for order in itertools.permutations(ops):
        late = any(
            later.ended < earlier.begun
            for number, earlier in enumerate(order)
            for later in order[number + 1 :]
        )
        holds: int | None = None
        for op in () if late else order:
            if op.is_write:
                holds = op.value
            elif holds != op.value:
                break
        else:
            if not late:
                return True
    return not ops


ORDERS = [
    ("a read of a value that was written", [Op(True, 1, 0, 1), Op(False, 1, 2, 3)], True),
    ("a read before its write", [Op(False, 1, 0, 1), Op(True, 1, 2, 3)], False),
    ("a read beside its write", [Op(True, 1, 0, 3), Op(False, 1, 1, 2)], True),
    (
        "an old value after a new one",
        [Op(True, 1, 0, 1), Op(True, 2, 2, 3), Op(False, 2, 4, 5), Op(False, 1, 6, 7)],
        False,
    ),
    (
        "a second write that did nothing",
        [Op(True, 1, 0, 1), Op(True, 2, 2, 3), Op(False, 1, 4, 5)],
        True,
    ),
    (
        "a value between two reads of another",
        [Op(True, 1, 0, 1), Op(False, 1, 2, 3), Op(True, 2, 4, 5), Op(False, 2, 6, 7),
         Op(False, 1, 8, 9)],
        False,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "ops", "is_fine"), ORDERS, ids=[o[0] for o in ORDERS])
def test_a_register_explains(words: str, ops: list[Op], is_fine: bool) -> None:
    assert (unexplained(ops) == []) is is_fine, words
    assert can_be_explained(ops) is is_fine, words


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 9), st.integers(1, 6)),
        max_size=3,
    ),
    st.randoms(use_true_random=False),
)
def test_it_agrees_with_trying_every_order(
    reads: list[tuple[bool, int, int, int]], rng: random.Random
) -> None:
    """Three values are written once each; any reads of them; times that nobody shares."""
    spans = [(True, v, rng.randrange(10), rng.randint(1, 6)) for v in range(3)]
    spans += [(False, value, begun, length) for _, value, begun, length in reads]
    ticks = [(begun * 100 + n, (begun + length) * 100 + n) for n, (_, _, begun, length) in
             enumerate(spans)]  # fmt: skip
    ops = [Op(span[0], span[1], *tick) for span, tick in zip(spans, ticks, strict=True)]

    assert (unexplained(ops) == []) is can_be_explained(ops), ops


def test_two_registers_may_hold_two_values_and_not_three() -> None:
    values = [1, 2, 3]
    ops = [Op(True, value, value, 10 + value) for value in values]
    ops += [Op(False, value, 20 + 2 * value, 21 + 2 * value) for value in values]
    ops += [Op(False, value, 40 + 2 * value, 41 + 2 * value) for value in values]

    assert unexplained(ops, copies=2)
    assert not unexplained(ops, copies=3)


def test_what_was_written_before_a_flush_and_read_after_it_was_there_meanwhile() -> None:
    history = History()
    for value in (1, 2):
        history.writes("k", value, value)
    history.wrote("k", 1, 3)
    history.read("k", 1, Span(10, 11))
    history.read("k", 2, Span(12, 13))

    assert list(history.settled_before(5, 6)) == [("k", 1)]
    assert list(history.settled_before(2, 6)) == []
    assert list(history.settled_before(5, 10)) == []
