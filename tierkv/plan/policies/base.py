"""What an eviction policy promises.

A policy ranks **pages**, because a page is what is really freed. It is told of every page that
gains blocks, is used, or is gone, and is asked for the pages to give up. It knows nothing of
pins: the planner says which pages it may take. Page numbers are used again for other contents,
so what is to be remembered of a page when it has left is remembered by its **name**.

One arrival is `expect`, then, where the tier is full, `evict`, then `track` when the bytes are
there. Several may be under way at a time, and one that was expected may never come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

#: Who a page is, whatever page it lies in: the key of its first block, or a simulator's block id.
Name: TypeAlias = int | bytes


class About(NamedTuple):
    """What is known of a page that arrives."""

    name: Name
    #: Prefill seconds, or anything that grows with them, that a byte of it saves.
    cost: float = 1.0
    #: How many blocks its chain has before it.
    depth: int = 0


#: What a policy is told that does not want names.
UNNAMED = About(b"")


class EvictionPolicy(Protocol):
    """Ranks the pages of one tier. Single owner (the planner); deterministic.

    Made with the tier's capacity in pages. It remembers at most a small multiple of that.
    """

    #: Whether `evict` may give less than it could, where nobody waits.
    may_refuse: ClassVar[bool]
    #: Whether it reads `expect` and `about`; to others the planner says nothing and `UNNAMED`.
    wants_names: ClassVar[bool]

    def __init__(self, pages: int) -> None: ...

    def expect(self, names: Iterable[Name]) -> None:
        """These are wanted, absent, and about to be stored, a chain's first before its last.

        Called before room is made for them. They may be more, and others, than those by which
        pages are tracked later, as a page is named by its first block only.
        """
        ...

    def track(self, page: int, now_ns: int, about: About) -> None:
        """A page was filled: it is the most recent. Tracking it again is a touch."""
        ...

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        """Pages were used, in this order. Pages that are not tracked are ignored.

        The planner passes the pages of a prefix last page first, so that recency alone evicts
        leaves before their parents.
        """
        ...

    def renew(self, pages: Iterable[int], now_ns: int) -> None:
        """The chain of these pages has grown: they are as recent as its new pages, in this order.

        Last page first, as in `touch`; but it is no further use of them. Pages that are not
        tracked are ignored.
        """
        ...

    def forget(self, page: int) -> None:
        """A page is gone. Forgetting an unknown page does nothing."""
        ...

    def evict(
        self, count: int, is_evictable: Callable[[int], bool], now_ns: int, *, must: bool = False
    ) -> list[int]:
        """Choose and stop tracking up to `count` evictable pages, least valuable first.

        Fewer are returned when fewer are evictable, or, where `may_refuse`, as the policy likes;
        `must` forbids that, because a reader waits. `count == 0` gives []. Pages that are not
        evictable keep their rank.
        """
        ...

    def __len__(self) -> int:
        """How many pages are tracked."""
        ...
