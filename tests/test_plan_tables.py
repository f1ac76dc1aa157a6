"""The planner's tables one by one: the pool, residency, the radix index, prefetches.

Their `check` is what every random test of the planner leans on, so it is shown here that it finds
what it is there to find.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tierkv.core.keys import KeyChain
from tierkv.core.stats import Stats
from tierkv.core.tier import Span
from tierkv.plan.pool import PagePool
from tierkv.plan.prefetches import Prefetches
from tierkv.plan.radix import ROOT, RadixIndex
from tierkv.plan.residency import NO_PLACE, State, TierTable

CHAIN = KeyChain(b"f" * 32, block_tokens=1)


def numbered(*cases: tuple[Callable[..., object], str]) -> list[object]:
    """Cases with names of their own."""
    return [pytest.param(*case, id=f"{n}-{case[1]}") for n, case in enumerate(cases)]


# ---- the pool


def test_places_come_from_the_open_page_then_whole_pages_then_holes() -> None:
    pool = PagePool(4, 4)

    assert pool.take(3, "a") == [Span(0, 0, 0, 3)]
    assert pool.take(6, "a") == [Span(0, 0, 3, 1), Span(1, 1, 0, 4), Span(5, 2, 0, 1)]
    assert not pool.give(1, (0, 2))
    assert pool.take(9, "a") == [
        Span(0, 2, 1, 3), Span(3, 3, 0, 4), Span(7, 1, 2, 1), Span(8, 1, 0, 1)
    ]  # fmt: skip
    assert pool.take(1, "a") == []
    pool.check()


def test_holes_of_one_namespace_are_not_given_to_another() -> None:
    pool = PagePool(1, 4)
    pool.take(4, "a")
    pool.give(0, (1,))

    assert pool.take(1, "b") == []
    assert pool.take(1, "a") == [Span(0, 0, 1, 1)]


def test_no_more_pages_are_opened_than_allowed() -> None:
    pool = PagePool(4, 2)

    assert pool.take(8, "a", pages_max=1) == [Span(0, 0, 0, 2)]
    assert pool.take(8, "a", pages_max=0) == []
    assert pool.take(8, "a", pages_max=-1) == []
    assert pool.take(3, "a", pages_max=2) == [Span(0, 1, 0, 2), Span(2, 2, 0, 1)]
    assert pool.owned["a"] == 3


def test_places_can_be_asked_for_from_the_middle_of_what_is_offered() -> None:
    pool = PagePool(4, 2)

    assert pool.take(5, "a", index=2) == [Span(2, 0, 0, 2), Span(4, 1, 0, 1)]
    assert pool.take(3, "a", index=2) == [Span(2, 1, 1, 1)]


def test_a_sealed_page_gives_out_nothing_until_it_is_unsealed() -> None:
    pool = PagePool(1, 4)
    pool.take(1, "a")
    assert pool.is_open(0)
    pool.seal(0)

    assert pool.is_sealed(0)
    assert not pool.is_open(0)
    assert pool.take(1, "a") == []
    pool.check()
    pool.unseal(0)
    assert not pool.is_sealed(0)
    assert pool.take(4, "a") == [Span(n, 0, n + 1, 1) for n in range(3)]
    pool.check()


def test_places_given_back_to_a_sealed_page_wait_for_its_end() -> None:
    pool = PagePool(1, 2)
    pool.take(2, "a")
    pool.seal(0)
    pool.give(0, (1,))

    assert pool.take(1, "a") == []
    pool.unseal(0)
    assert pool.take(1, "a") == [Span(0, 0, 1, 1)]


def test_giving_back_says_when_the_last_place_is_gone() -> None:
    pool = PagePool(2, 2)
    pool.take(2, "a")

    assert not pool.give(0, (0,))
    assert pool.give(0, (1,))
    pool.release(0)
    assert pool.free_pages == 2
    assert pool.owned["a"] == 0
    pool.check()


def test_more_places_given_back_than_were_taken_is_our_bug() -> None:
    pool = PagePool(1, 2)
    pool.take(1, "a")
    with pytest.raises(AssertionError, match="more places given back"):
        pool.give(0, (0, 1))


def test_released_pages_come_back_lowest_first() -> None:
    pool = PagePool(4, 1)
    pool.take(4, "a")
    for page in (3, 0, 2):
        pool.give(page, (0,))
        pool.release(page)

    assert pool.take_pages(5, "b") == [0, 2, 3]
    assert pool.owned == {"a": 1, "b": 3}
    pool.check()


@pytest.mark.parametrize("state", ["open", "holed", "sealed", "quarantined", "plain"])
def test_whole_pages_go_back_whatever_state_they_were_in(state: str) -> None:
    pool = PagePool(3, 2, counts_openings=True)
    pool.take(1 if state == "open" else 2, "a")
    if state == "holed":
        pool.give(0, (1,))
    elif state == "sealed":
        pool.seal(0)
    elif state == "quarantined":
        pool.quarantine(0)
    pool.release_full([0])

    assert pool.openings == {}
    assert pool.free_pages == (2 if state == "quarantined" else 3)
    pool.check()
    first = 1 if state == "quarantined" else 0
    assert pool.take(2, "a") == [Span(0, first, 0, 2)]
    assert not pool.is_sealed(first)
    pool.check()


def test_a_page_in_quarantine_is_never_given_out_again() -> None:
    pool = PagePool(3, 1)
    pool.quarantine(1)  # while it is free
    assert pool.take(3, "a") == [Span(0, 0, 0, 1), Span(1, 2, 0, 1)]
    pool.quarantine(0)  # while it is owned
    pool.give(0, (0,))
    pool.release(0)
    pool.check()

    assert pool.take(1, "a") == []
    assert pool.free_pages == 0


def test_pages_left_after_one_is_quarantined_still_come_lowest_first() -> None:
    pool = PagePool(6, 1)
    pool.take_pages(6, "a")
    for page in (5, 1, 4, 0, 3, 2):
        pool.give(page, (0,))
        pool.release(page)
    pool.quarantine(0)

    assert pool.take_pages(6, "b") == [1, 2, 3, 4, 5]


def test_withheld_pages_are_not_given_out_and_not_missed() -> None:
    pool = PagePool(3, 1)
    pool.withhold([0, 2])
    pool.check()

    assert pool.take_pages(3, "a") == [1]


def test_adopted_pages_are_owned_and_give_no_place_until_they_are_unsealed() -> None:
    pool = PagePool(3, 3)
    pool.adopt({1: ("a", [0, 2])})
    pool.check()

    assert pool.free_pages == 2
    assert (pool.used[1], pool.owned["a"], pool.owner[1]) == (2, 1, "a")
    assert pool.take_pages(3, "a") == [0, 2]
    assert pool.take(1, "a") == []
    assert not pool.give(1, (0,))
    assert pool.give(1, (2,))


def test_each_opening_has_its_own_number_until_the_page_is_released() -> None:
    pool = PagePool(3, 2, counts_openings=True)
    pool.take(1, "a")
    pool.take(1, "b")
    assert pool.openings == {0: 1, 1: 2}
    pool.give(0, (0,))
    pool.release(0)
    assert pool.openings == {1: 2}
    pool.take(1, "a")
    assert pool.openings == {0: 3, 1: 2}
    pool.take(3, "c")  # a whole page needs no zeroes; and there is none for its tail
    assert pool.openings == {0: 3, 1: 2}


def spoilt_pool() -> PagePool:
    """Page 0 is open with one place used, page 1 has a hole, page 2 is free."""
    pool = PagePool(3, 3, counts_openings=True)
    pool.take(4, "a")
    pool.give(0, (1,))
    pool.check()
    return pool


@pytest.mark.parametrize(
    ("spoil", "words"),
    numbered(
        (lambda pool: pool._free.append(2), "free twice"),
        (lambda pool: pool._free.append(0), "page 0"),
        (lambda pool: pool._free.remove(2), "page 2"),
        (lambda pool: pool._holes[0].append(1), "listed twice"),
        (lambda pool: pool._holes[0].append(0), "page 0"),
        (lambda pool: pool._holes[0].clear(), "page 0"),
        (lambda pool: pool.used.__setitem__(1, 2), "page 1"),
        (lambda pool: pool.used.__setitem__(2, 1), "page 2 is free and used"),
        (lambda pool: pool.openings.__setitem__(2, 9), "an opening of a page that nobody owns"),
        (lambda pool: pool._open.clear(), "page 1"),
    ),
)
def test_a_pool_whose_books_are_wrong_is_found(
    spoil: Callable[[PagePool], object], words: str
) -> None:
    pool = spoilt_pool()
    spoil(pool)
    with pytest.raises(AssertionError, match=words):
        pool.check()


# ---- residency


def table_with(blocks: int = 3, *, pages: int = 3, page_blocks: int = 2) -> TierTable:
    """Blocks 0.. are READY, in order."""
    table = TierTable(pages, page_blocks)
    table.grow(8)
    table.fill(range(blocks), table.pool.take(blocks, "a"))
    table.publish(range(blocks))
    table.check()
    return table


@pytest.mark.parametrize("kind", [pytest.param(lambda row: row, id="range"), list])
def test_blocks_are_filled_and_published_alike_as_a_range_and_as_a_list(
    kind: Callable[[range], range | list[int]],
) -> None:
    table = TierTable(3, 2)
    table.grow(5)
    blocks = kind(range(1, 4))
    table.fill(blocks, table.pool.take(3, "a"))
    assert [table.state(b) for b in range(5)] == [0, 1, 1, 1, 0]
    assert list(table.place) == [-1, 0, 1, 2, -1]
    assert list(table.ready) == [-1] * 5
    table.publish(blocks)

    assert [table.state(b) for b in range(5)] == [0, 2, 2, 2, 0]
    assert list(table.ready) == list(table.place)
    assert [table.blocks_in(page) for page in range(3)] == [[1, 2], [3], []]
    table.check()


def test_a_table_grows_only() -> None:
    table = table_with()
    table.grow(4)
    assert len(table.place) == len(table.ready) == 8
    table.grow(9)
    assert len(table.place) == len(table.ready) == 9
    assert table.state(8) is State.ABSENT
    assert table.place[8] == table.ready[8] == NO_PLACE


def test_a_draining_block_keeps_its_place_and_is_not_read() -> None:
    table = table_with()
    table.drain([1])

    assert table.state(1) is State.DRAINING
    assert table.ready[1] == NO_PLACE
    assert table.place[1] == 1
    table.check()
    table.drop([1])
    assert table.state(1) is State.ABSENT
    table.check()


@pytest.mark.parametrize("kind", [pytest.param(lambda row: row, id="range"), list])
def test_a_state_is_entered_only_from_where_it_may_be(
    kind: Callable[[range], range | list[int]],
) -> None:
    table = table_with()
    blocks = kind(range(2))
    with pytest.raises(AssertionError, match="READY → FILLING"):
        table.fill(blocks, [])
    table = table_with()
    with pytest.raises(AssertionError, match="READY → READY"):
        table.publish(blocks)
    with pytest.raises(AssertionError, match="ABSENT → DRAINING"):
        table.drain([5])


def test_the_last_block_frees_an_unpinned_page_and_the_last_pin_an_empty_one() -> None:
    table = table_with(4)
    table.pin(0)
    table.drop([0, 1])
    assert 0 in table.pool.owner
    table.pin(0)
    table.unpin(0)
    assert 0 in table.pool.owner
    table.unpin(0)
    assert 0 not in table.pool.owner
    table.drop([2])
    table.pin(1)
    table.unpin(1)
    assert 1 in table.pool.owner, "a block is left"
    table.drop([3])
    assert table.pool.free_pages == 3
    table.check()


def test_one_pin_too_few_is_our_bug() -> None:
    table = table_with()
    with pytest.raises(AssertionError, match="more often than pinned"):
        table.unpin(0)


def test_a_place_retired_after_a_sync_began_outlives_that_sync() -> None:
    """What the sync covers may be the older copy, if the newer was written while it ran."""
    table = table_with(2, page_blocks=1)
    table.retire(0)  # before any sync
    table.sync_begun = 1
    table.retire(1)  # while sync 1 runs

    assert table.settle(0) == []
    assert table.pool.free_pages == 1
    assert table.settle(1) == [0]
    assert table.pool.free_pages == 2
    assert table.settle(1) == []
    assert table.settle(2) == [1]
    assert table.pool.free_pages == 3
    assert table.retired == {}
    table.check()


def test_a_page_of_which_a_part_is_retired_is_freed_with_its_last_place() -> None:
    table = table_with(2)
    table.retire(0)
    table.check()
    table.sync_begun = 1
    table.retire(1)
    table.check()

    assert table.settle(1) == []
    assert table.retired == {0: [(1, 1)]}
    assert table.pool.used[0] == 1
    table.check()
    assert table.settle(2) == [0]


def test_a_pinned_page_is_not_freed_by_a_sync() -> None:
    table = table_with(1)
    table.retire(0)
    table.pin(0)

    assert table.settle(1) == []
    assert 0 in table.pool.owner
    table.unpin(0)
    assert 0 not in table.pool.owner
    table.check()


def test_clearing_pages_gives_their_blocks_and_forgets_what_was_retired() -> None:
    table = table_with(5)
    table.retire(1)
    gone = table.clear([0, 2])

    assert list(gone) == [0, 4]
    assert table.retired == {}
    assert [table.state(b) for b in range(5)] == [0, 0, 2, 2, 0]
    assert list(table.place[:5]) == list(table.ready[:5]) == [-1, -1, 2, 3, -1]
    assert table.pool.free_pages == 2
    table.check()
    assert list(table.clear([1])) == [2, 3]


def test_places_that_follow_each_other_within_a_page_are_one_span() -> None:
    table = TierTable(4, 3)

    assert table.spans_of([]) == []
    assert table.spans_of([4]) == [Span(0, 1, 1, 1)]
    assert table.spans_of([1, 2, 3, 4]) == [Span(0, 0, 1, 2), Span(2, 1, 0, 2)]
    assert table.spans_of([2, 1, 7, 8]) == [
        Span(0, 0, 2, 1), Span(1, 0, 1, 1), Span(2, 2, 1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "words"),
    numbered(
        (lambda table: table.place.__setitem__(0, NO_PLACE), "block 0 is READY"),
        (lambda table: table.place.__setitem__(5, 4), "block 5 is ABSENT"),
        (lambda table: table.ready.__setitem__(0, NO_PLACE), "^$"),
        (lambda table: table.ready.__setitem__(6, 4), "^$"),
        (lambda table: table.block_at.__setitem__(0, 1), "place 0 holds another block"),
        (lambda table: table.pins.__setitem__(2, -1), "^$"),
        (lambda table: table.block_at.__setitem__(3, 7), "fewer blocks than it has"),
        (lambda table: table.retired.__setitem__(1, [(0, 1)]), "page 1: 2 blocks"),
        (lambda table: table.pool.give(1, (0,)), "fewer blocks than it has"),
        (lambda table: table.pool.take(1, "a"), "page 1: 1 blocks"),
        (lambda table: table.pool._free.append(2), "free twice"),
    ),
)
def test_a_table_whose_books_are_wrong_is_found(
    spoil: Callable[[TierTable], object], words: str
) -> None:
    table = table_with()
    spoil(table)
    with pytest.raises(AssertionError, match=words):
        table.check()


def test_an_empty_page_that_nobody_pins_is_found() -> None:
    table = table_with(2)
    table.pin(0)
    table.drop([0, 1])
    table.check()
    table.pins[0] = 0
    with pytest.raises(AssertionError, match="page 0: 0 blocks"):
        table.check()


# ---- the radix index


def branched() -> RadixIndex:
    """0-1-2, then 3-4 and 5-6."""
    index = RadixIndex()
    index.insert(CHAIN.of_tokens([1, 2, 3, 4, 5]))
    index.insert(CHAIN.of_tokens([1, 2, 3, 8, 9]))
    index.check()
    return index


@pytest.mark.parametrize(
    ("spoil", "words"),
    numbered(
        (lambda i: setattr(i._node_of[3], "parent", i._root), "does not know its parent"),
        (lambda i: i._node_of[3].blocks.clear(), "an empty run"),
        (lambda i: i._node_of[3].keys.append(b"x"), "more keys than blocks"),
        (lambda i: i._node_of[0].children.popitem(), "two runs that should be one"),
        (lambda i: i._node_of[3].blocks.__setitem__(0, 5), "points at another|in two runs"),
        (lambda i: i._node_of.__setitem__(3, None), "points at another run"),
        (lambda i: i._position.__setitem__(4, 0), "wrong position"),
        (lambda i: i._node_of[3].keys.__setitem__(0, b"x"), "filed under a wrong key"),
        (lambda i: i._free.append(3), "ids leaked"),
    ),
)
def test_an_index_whose_books_are_wrong_is_found(
    spoil: Callable[[RadixIndex], object], words: str
) -> None:
    index = branched()
    spoil(index)
    with pytest.raises(AssertionError, match=words):
        index.check()


def test_only_a_known_block_has_a_key_and_may_be_removed() -> None:
    index = branched()
    assert index.remove(6) == 5
    with pytest.raises(AssertionError, match="block 6 is not known"):
        index.key(6)
    assert not index.is_known(6)
    assert not index.names(6, CHAIN.of_tokens([1, 2, 3, 8, 9])[-1])


def test_blocks_are_made_known_one_below_the_other() -> None:
    index = RadixIndex()
    keys = CHAIN.of_tokens([1, 2, 3])
    first = index.insert_below(ROOT, keys[0])
    second = index.insert_below(first, keys[1])
    third = index.insert_below(first, CHAIN.of_tokens([1, 9])[1])

    assert index.match(keys) == [first, second]
    assert index.parent(second) == index.parent(third) == first
    assert index.parent(first) == ROOT
    index.check()


def test_ids_that_are_free_are_given_again_newest_first() -> None:
    index = RadixIndex()
    index.insert(CHAIN.of_tokens([1, 2, 3, 4]))
    for block in (3, 2, 1):
        index.remove(block)

    assert list(index.insert(CHAIN.of_tokens([1, 7, 8]))) == [0, 1, 2]
    assert list(index.insert(CHAIN.of_tokens([9, 9]))) == [4, 5], "one free id is not enough"
    assert index.ids_end == 6
    index.check()


def test_what_is_resident_nowhere_is_forgotten_leaves_first_with_the_gaps_above() -> None:
    index = branched()
    gone = index.prune([3, 4, 5, 6], [[-1] * 7, [-1, -1, 9, -1, -1, -1, -1]])
    assert sorted(gone) == [3, 4, 5, 6], "what lies above them is still somewhere"
    index.check()
    index = branched()
    nowhere = [-1] * 7
    assert index.prune([0, 1], [nowhere]) == [], "others continue them"
    assert sorted(index.prune([3, 4], [[-1] * 5 + [7, -1]])) == [3, 4, 6]
    assert sorted(index.prune([5], [nowhere])) == [0, 1, 2, 5]
    assert len(index) == 0
    index.check()


# ---- prefetches


def test_every_prefetch_ends_once_as_timely_late_or_wasted() -> None:
    stats = Stats()
    prefetches = Prefetches(stats, block_bytes=10)
    assert not prefetches
    for page, blocks in enumerate((1, 2, 4)):
        prefetches.began(page, blocks)
    assert prefetches
    prefetches.used(0, late=False)
    prefetches.used(1, late=True)
    prefetches.gone(2)
    assert not prefetches
    for page in range(4):
        prefetches.gone(page)

    ends = {end: stats.get("tierkv_prefetch_bytes_total", end) for end in ("timely", "late")}
    assert ends == {"timely": 10, "late": 20}
    assert stats.get("tierkv_prefetch_bytes_total", "wasted") == 40
