"""Residency: for each block and tier, where it lies and in which state.

The state of a block in one tier moves only along `TRANSITIONS`; anything else is our bug and
asserts. A page is *pinned* while somebody reads it or a transfer uses it: a pinned page is
neither evicted nor reused. `ready[block]` is the block's place while it may be read, else -1,
so that a whole prefix is checked and located by one table look-up per block.

Invariants (`TierTable.check`): a block has a place exactly when it is not ABSENT; `block_at` is
the inverse of `place`; a page's used places are its blocks; pins are never negative.
Single owner (the planner).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Final

from tierkv.core.tier import Span
from tierkv.plan.pool import PagePool

NO_PLACE: Final = -1


class State(IntEnum):
    """What a tier knows of a block's bytes."""

    ABSENT = 0
    FILLING = 1  # being written; not readable
    READY = 2  # complete; may be read and pinned
    DRAINING = 3  # being moved away; not handed to new readers


TRANSITIONS: Final = frozenset(
    {
        (State.ABSENT, State.FILLING),
        (State.FILLING, State.READY),
        (State.FILLING, State.ABSENT),  # the write failed or was cancelled
        (State.READY, State.DRAINING),
        (State.READY, State.ABSENT),  # dropped at once: another copy exists or is not wanted
        (State.DRAINING, State.ABSENT),
    }
)
#: For each state, the states it may be entered from, as bytes.
_BEFORE: Final = {
    after: bytes(before for before, then in TRANSITIONS if then is after) for after in State
}


class TierTable:
    """Places, states and pins of one tier."""

    def __init__(self, pages: int, page_blocks: int, *, counts_openings: bool = False) -> None:
        self.pool = PagePool(pages, page_blocks, counts_openings=counts_openings)
        self.page_blocks = page_blocks
        self.pins: list[int] = [0] * pages
        # Arrays, not lists: an int object a block would cost a cache miss a block to let go.
        self.block_at = array("q", [NO_PLACE]) * (pages * page_blocks)
        self.place = array("q")
        self.ready = array("q")
        self.retired: dict[int, list[tuple[int, int]]] = {}  # page -> (sync begun, offset)
        self.sync_begun = 0
        #: Blocks whose state has changed, where somebody asks for them.
        self.changed: set[int] | None = None
        self._state = bytearray()

    def grow(self, ids_end: int) -> None:
        """Make room for block ids below `ids_end`."""
        extra = ids_end - len(self.place)
        if extra > 0:
            self.place += array("q", [NO_PLACE]) * extra
            self.ready += array("q", [NO_PLACE]) * extra
            self._state += bytes(extra)  # ABSENT

    def state(self, block: int) -> State:
        """The state of one block here."""
        return State(self._state[block])

    def fill(self, blocks: Sequence[int], spans: Iterable[Span]) -> None:
        """ABSENT → FILLING: blocks get the places of the spans."""
        place, block_at, size = self.place, self.block_at, self.page_blocks
        self._move(blocks, State.FILLING)
        for index, page, offset, count in spans:
            start = page * size + offset
            run = blocks[index : index + count]
            block_at[start : start + count] = array("q", run)
            if isinstance(run, range):
                place[run.start : run.stop] = array("q", range(start, start + count))
            else:
                for at, block in enumerate(run, start):
                    place[block] = at

    def publish(self, blocks: Sequence[int]) -> None:
        """FILLING → READY: the bytes are complete."""
        self._move(blocks, State.READY)
        place, ready = self.place, self.ready
        if isinstance(blocks, range):
            ready[blocks.start : blocks.stop] = place[blocks.start : blocks.stop]
        else:
            for block in blocks:
                ready[block] = place[block]

    def drain(self, blocks: Sequence[int]) -> None:
        """READY → DRAINING: no new reader gets these bytes."""
        self._move(blocks, State.DRAINING)
        for block in blocks:
            self.ready[block] = NO_PLACE

    def drop(self, blocks: Sequence[int]) -> None:
        """Any state → ABSENT: places are given back; an empty, unpinned page becomes free."""
        self._move(blocks, State.ABSENT)
        size = self.page_blocks
        for block in blocks:
            at = self.place[block]
            self.place[block] = self.ready[block] = self.block_at[at] = NO_PLACE
            page = at // size
            if self.pool.give(page, (at - page * size,)) and not self.pins[page]:
                self.pool.release(page)

    def retire(self, block: int) -> None:
        """READY → ABSENT, but keep the place from being reused until `settle`.

        A newer copy has been written, but only a sync makes it durable; until then the older copy
        is what a crash would leave.
        """
        at = self.place[block]
        self._move((block,), State.ABSENT)
        self.place[block] = self.ready[block] = self.block_at[at] = NO_PLACE
        page, offset = divmod(at, self.page_blocks)
        self.retired.setdefault(page, []).append((self.sync_begun, offset))

    def settle(self, sync: int) -> list[int]:
        """Sync number `sync` is done: give back places retired before it began.

        Gives the pages that this has freed.
        """
        freed: list[int] = []
        for page, entries in list(self.retired.items()):
            offsets = [offset for begun, offset in entries if begun < sync]
            left = [entry for entry in entries if entry[0] >= sync]
            if left:
                self.retired[page] = left
            else:
                del self.retired[page]
            if self.pool.give(page, offsets) and not self.pins[page]:
                self.pool.release(page)
                freed.append(page)
        return freed

    def clear(self, pages: Sequence[int]) -> Sequence[int]:
        """Any state → ABSENT for all blocks of unpinned pages, which become free; gives them."""
        gone = array("q")
        place, ready, block_at, size = self.place, self.ready, self.block_at, self.page_blocks
        blank = array("q", [NO_PLACE]) * size
        for page in pages:
            start = page * size
            gone += block_at[start : start + size]
            block_at[start : start + size] = blank
            if self.retired:
                self.retired.pop(page, None)
        if NO_PLACE in gone:
            gone = array("q", [block for block in gone if block != NO_PLACE])
        self.pool.release_full(pages)
        self._move(gone, State.ABSENT)
        for block in gone:
            place[block] = ready[block] = NO_PLACE
        return gone

    def pin(self, page: int) -> None:
        """Keep a page where it is."""
        self.pins[page] += 1

    def unpin(self, page: int) -> None:
        """Undo one `pin`; an empty page whose last pin goes becomes free."""
        self.pins[page] -= 1
        assert self.pins[page] >= 0, f"page {page} was unpinned more often than pinned"
        if not self.pins[page] and not self.pool.used[page] and page in self.pool.owner:
            self.pool.release(page)

    def blocks_in(self, page: int) -> list[int]:
        """The blocks of one page, whatever their state."""
        start = page * self.page_blocks
        return [b for b in self.block_at[start : start + self.page_blocks] if b != NO_PLACE]

    def pages_of(self, blocks: Iterable[int]) -> dict[int, None]:
        """The pages of these blocks, each once, in this order; -1 for those that have none."""
        size, place = self.page_blocks, self.place
        return dict.fromkeys([place[block] // size for block in blocks])

    def spans_of(self, places: Sequence[int]) -> list[Span]:
        """Join places that are consecutive within a page."""
        size = self.page_blocks
        spans: list[Span] = []
        first, start, want = 0, NO_PLACE, NO_PLACE
        for index, at in enumerate(places):
            if at != want or at % size == 0:
                if start != NO_PLACE:
                    spans.append(Span(first, start // size, start % size, index - first))
                first, start = index, at
            want = at + 1
        if start != NO_PLACE:
            spans.append(Span(first, start // size, start % size, len(places) - first))
        return spans

    def check(self) -> None:
        """Assert the invariants; O(places)."""
        self.pool.check()
        for block, at in enumerate(self.place):
            state = self.state(block)
            assert (at == NO_PLACE) == (state is State.ABSENT), f"block {block} is {state.name}"
            assert self.ready[block] == (at if state is State.READY else NO_PLACE)
            if at != NO_PLACE:
                assert self.block_at[at] == block, f"place {at} holds another block"
        for page in range(self.pool.pages):
            held = len(self.blocks_in(page))
            assert self.pins[page] >= 0
            if page in self.pool.owner:
                assert self.pool.used[page] >= held, f"page {page} counts fewer blocks than it has"
                if not self.pins[page]:
                    held += len(self.retired.get(page, ()))
                    assert self.pool.used[page] == held > 0, f"page {page}: {held} blocks"

    def _move(self, blocks: Sequence[int], after: State) -> None:
        state = self._state
        if isinstance(blocks, range):
            at = slice(blocks.start, blocks.stop)
            wrong = state[at].strip(_BEFORE[after])
            state[at] = bytes((after,)) * len(blocks)
        else:
            wrong = bytearray(map(state.__getitem__, blocks)).strip(_BEFORE[after])
            for block in blocks:
                state[block] = after
        assert not wrong, f"{State(wrong[0]).name} → {after.name}"
        if self.changed is not None:
            self.changed.update(blocks)
