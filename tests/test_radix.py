"""The radix index: prefixes, splits, merges, leaf-first removal."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.core.keys import BlockKey, KeyChain
from tierkv.plan.radix import ROOT, RadixIndex

CHAIN = KeyChain(b"f" * 32, block_tokens=1)

chains = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12)


def keys_of(tokens: list[int]) -> list[BlockKey]:
    return CHAIN.of_tokens(tokens)


def test_match_gives_the_longest_known_prefix() -> None:
    index = RadixIndex()
    known = list(index.insert(keys_of([1, 2, 3, 4])))

    assert index.match(keys_of([1, 2, 9])) == known[:2]
    assert index.match(keys_of([9])) == []
    assert index.match([]) == []


def test_a_branch_in_the_middle_splits_the_run() -> None:
    index = RadixIndex()
    a = list(index.insert(keys_of([1, 2, 3, 4])))
    b = list(index.insert(keys_of([1, 2, 7])))

    assert sorted(map(tuple, index.runs())) == sorted([tuple(a[:2]), tuple(a[2:]), (b[2],)])
    index.check()


def test_removing_a_branch_merges_equal_runs() -> None:
    index = RadixIndex()
    a = list(index.insert(keys_of([1, 2, 3, 4])))
    b = list(index.insert(keys_of([1, 2, 7])))
    index.remove(b[2])

    assert list(index.runs()) == [a]
    index.check()


def test_a_block_with_children_is_not_removed() -> None:
    index = RadixIndex()
    a = list(index.insert(keys_of([1, 2])))

    with pytest.raises(AssertionError, match="has children"):
        index.remove(a[0])


def test_ids_are_reused_after_removal() -> None:
    index = RadixIndex()
    (a,) = index.insert(keys_of([1]))
    assert index.remove(a) == ROOT
    (b,) = index.insert(keys_of([2]))

    assert a == b
    assert index.match(keys_of([1])) == []


@settings(max_examples=150)
@given(chains, st.randoms(use_true_random=False))
def test_the_index_agrees_with_a_set_of_prefixes(inserts: list[list[int]], rng: Random) -> None:
    index = RadixIndex()
    model: set[tuple[int, ...]] = set()
    for tokens in inserts:
        index.insert(keys_of(tokens))
        model |= {tuple(tokens[:n]) for n in range(1, len(tokens) + 1)}
        index.check()
    for tokens in inserts:
        probe = [*tokens, 0, 1]
        longest = max((n for n in range(len(probe) + 1) if tuple(probe[:n]) in model), default=0)
        assert len(index.match(keys_of(probe))) == longest
    while model:
        leaves = [p for p in model if not any(q[: len(p)] == p and q != p for q in model)]
        gone = rng.choice(sorted(leaves))
        block = index.match(keys_of(list(gone)))[-1]
        assert index.key(block) == keys_of(list(gone))[-1]
        assert index.is_leaf(block)
        index.remove(block)
        model.remove(gone)
        index.check()
    assert len(index) == 0


def test_a_blocks_chain_and_depth_lead_through_all_runs_above_it() -> None:
    index = RadixIndex()
    a = list(index.insert(keys_of([1, 2, 3, 4])))
    b = list(index.insert(keys_of([1, 2, 7])))

    assert index.chain(a[3]) == a
    assert index.chain(b[2]) == [*a[:2], b[2]]
    assert [index.depth(block) for block in a] == [0, 1, 2, 3]
    assert index.depth(b[2]) == 2
