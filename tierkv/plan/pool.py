"""Page pool: which places of a tier are free.

A **place** is room for one block: ``page * page_blocks + offset``. Blocks of one namespace fill
its *open page* front to back, so that prompts of any length pack without gaps between them; two
namespaces never share a page. Freed places of a page that is not open are *holes*, given out when
no whole page is left. A *sealed* page gives out nothing (its bytes are being copied away).

Free whole pages come back lowest number first, so that consecutive pages are usual and files
stay short. Single owner (the planner).

A page that is opened for a tail is written bit by bit, and keeps what its last owner left in the
rest. With `counts_openings` each opening has a number, until the page is released: whoever writes
into the page has it zeroed first, once an opening (`HostTier.clear`).

Invariants (`check`): every page is exactly one of free, quarantined, owned; an owned page's
places are used, or holes, or (open page) ahead of the fill mark; counts agree; only owned pages
have an opening.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping

from tierkv.core.tier import Span


class PagePool:
    """Free and used places of one tier."""

    def __init__(self, pages: int, page_blocks: int, *, counts_openings: bool = False) -> None:
        self.pages = pages
        self.page_blocks = page_blocks
        self.openings: dict[int, int] = {}  # page -> number of its opening
        self._counts_openings = counts_openings
        self._opened = 0
        self.owner: dict[int, str] = {}
        self.owned: Counter[str] = Counter()
        self.used: list[int] = [0] * pages
        self.quarantined: set[int] = set()
        self._free: list[int] = list(range(pages))
        self._open: dict[str, list[int]] = {}  # namespace -> [page, fill mark]
        self._holes: dict[int, list[int]] = {}
        self._holed: dict[str, dict[int, None]] = {}
        self._sealed: set[int] = set()

    @property
    def free_pages(self) -> int:
        """Whole pages that nobody owns."""
        return len(self._free)

    def is_open(self, page: int) -> bool:
        """Whether new blocks may still be placed behind the fill mark of this page."""
        mark = self._open.get(self.owner.get(page, ""))
        return mark is not None and mark[0] == page

    def is_sealed(self, page: int) -> bool:
        """Whether the page is closed to new blocks while its bytes are copied."""
        return page in self._sealed

    def take(
        self, count: int, namespace: str, *, pages_max: int | None = None, index: int = 0
    ) -> list[Span]:
        """Take places for blocks ``index .. count``: the open page, then whole pages, then holes.

        `pages_max` bounds how many further whole pages may be opened. Fewer places than asked
        for are returned when there are no more.
        """
        spans: list[Span] = []
        size = self.page_blocks
        mark = self._open.get(namespace)
        if mark is not None:
            index = self._advance(mark, count, index, spans, namespace)
        fresh = min(-(-(count - index) // size), len(self._free))
        if pages_max is not None:
            fresh = min(fresh, max(0, pages_max))
        if fresh > 0:
            free, owner, used, pop = self._free, self.owner, self.used, heapq.heappop
            whole = min(fresh, (count - index) // size)
            for _ in range(whole):
                page = pop(free)
                owner[page] = namespace
                used[page] = size
                spans.append(Span(index, page, 0, size))
                index += size
            self.owned[namespace] += whole
            if fresh > whole:
                mark = self._open[namespace] = [self._own(namespace), 0]
                if self._counts_openings:
                    self._opened += 1
                    self.openings[mark[0]] = self._opened
                index = self._advance(mark, count, index, spans, namespace)
        return spans if index == count else spans + self._take_holes(index, count, namespace)

    def _advance(
        self, mark: list[int], count: int, index: int, spans: list[Span], namespace: str
    ) -> int:
        """Take from the open page behind its fill mark; gives the places taken so far."""
        page, offset = mark
        room = min(self.page_blocks - offset, count - index)
        spans.append(Span(index, page, offset, room))
        self.used[page] += room
        mark[1] = offset + room
        if mark[1] == self.page_blocks:
            del self._open[namespace]
        return index + room

    def take_pages(self, count: int, namespace: str) -> list[int]:
        """Take up to `count` whole pages, all their places used."""
        pages = [self._own(namespace) for _ in range(min(count, len(self._free)))]
        for page in pages:
            self.used[page] = self.page_blocks
        return pages

    def give(self, page: int, offsets: Iterable[int]) -> bool:
        """Give places back; True if the page has none in use any more (see `release`)."""
        holes = self._holes.setdefault(page, [])
        before = len(holes)
        holes.extend(offsets)
        self.used[page] -= len(holes) - before
        assert self.used[page] >= 0, f"page {page}: more places given back than taken"
        if page not in self._sealed and not self.is_open(page):
            self._holed.setdefault(self.owner[page], {})[page] = None
        return self.used[page] == 0

    def release(self, page: int) -> None:
        """Give a whole page back; none of its places may be in use."""
        assert self.used[page] == 0, f"page {page} still holds blocks"
        namespace = self.owner.pop(page)
        self.owned[namespace] -= 1
        mark = self._open.get(namespace)
        if mark is not None and mark[0] == page:
            del self._open[namespace]
        self._sealed.discard(page)
        self.openings.pop(page, None)
        if self._holes.pop(page, None) is not None:
            self._holed.get(namespace, {}).pop(page, None)
        if page not in self.quarantined:
            heapq.heappush(self._free, page)

    def release_full(self, pages: Iterable[int]) -> None:
        """Give whole pages back with everything that was in them."""
        owner, used, owned, free = self.owner, self.used, self.owned, self._free
        holes, sealed, quarantined = self._holes, self._sealed, self.quarantined
        opened = {mark[0] for mark in self._open.values()}
        if self.openings:
            opened |= self.openings.keys()
        for page in pages:
            used[page] = 0
            if page in opened or page in holes or page in sealed or page in quarantined:
                self.release(page)
            else:
                owned[owner.pop(page)] -= 1
                heapq.heappush(free, page)

    def seal(self, page: int) -> None:
        """Give out no more places of this page until `unseal`."""
        namespace = self.owner[page]
        if self.is_open(page):
            _, offset = self._open.pop(namespace)
            self._holes.setdefault(page, []).extend(range(self.page_blocks - 1, offset - 1, -1))
        self._holed.get(namespace, {}).pop(page, None)
        self._sealed.add(page)

    def unseal(self, page: int) -> None:
        """Let the page's holes be used again."""
        self._sealed.discard(page)
        if page in self.owner and self._holes.get(page):
            self._holed.setdefault(self.owner[page], {})[page] = None

    def adopt(self, pages: Mapping[int, tuple[str, list[int]]]) -> None:
        """Own pages that already hold blocks: page -> (namespace, offsets in use). Recovery."""
        for page, (namespace, offsets) in pages.items():
            self.owner[page] = namespace
            self.owned[namespace] += 1
            self.used[page] = len(offsets)
            taken = set(offsets)
            self._holes[page] = [o for o in range(self.page_blocks) if o not in taken]
        self._free = [page for page in self._free if page not in pages]

    def withhold(self, pages: Iterable[int]) -> None:
        """Never give these pages out; nobody owns them yet."""
        self.quarantined.update(pages)
        self._free = [page for page in self._free if page not in self.quarantined]

    def quarantine(self, page: int) -> None:
        """Never give this page out again once it is released."""
        self.quarantined.add(page)
        if page in self._free:
            self._free.remove(page)
            heapq.heapify(self._free)

    def check(self) -> None:
        """Assert the invariants; O(places)."""
        free = set(self._free)
        assert self.openings.keys() <= self.owner.keys(), "an opening of a page that nobody owns"
        assert len(free) == len(self._free), "a page is free twice"
        for page in range(self.pages):
            states = (page in free) + (page in self.owner)
            assert states == 1 or (states == 0 and page in self.quarantined), f"page {page}"
            if page in self.owner:
                ahead = 0
                if self.is_open(page):
                    ahead = self.page_blocks - self._open[self.owner[page]][1]
                holes = self._holes.get(page, [])
                assert len(set(holes)) == len(holes), f"page {page}: a hole is listed twice"
                assert self.used[page] + len(holes) + ahead == self.page_blocks, f"page {page}"
            else:
                assert self.used[page] == 0, f"page {page} is free and used"

    def _own(self, namespace: str) -> int:
        page = heapq.heappop(self._free)
        self.owner[page] = namespace
        self.owned[namespace] += 1
        return page

    def _take_holes(self, index: int, count: int, namespace: str) -> list[Span]:
        spans: list[Span] = []
        holed = self._holed.get(namespace, {})
        while index < count and holed:
            page = next(iter(holed))
            holes = self._holes[page]
            offset = holes.pop()
            self.used[page] += 1
            spans.append(Span(index, page, offset, 1))
            index += 1
            if not holes:
                del holed[page]
        return spans
