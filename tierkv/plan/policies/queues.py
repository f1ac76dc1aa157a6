"""What policies are built from: queues that pass over pinned pages, ghosts, two base classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import ClassVar, Generic, TypeVar

from tierkv.plan.policies.base import About, Name

V = TypeVar("V")


class Ordered:
    """Pages in one order, the first to go first; the order of arrival, unless a kind moves them."""

    __slots__ = ("_order",)

    may_refuse: ClassVar[bool] = False
    wants_names: ClassVar[bool] = False

    def __init__(self, pages: int) -> None:
        self._order: OrderedDict[int, int] = OrderedDict()

    def expect(self, names: Iterable[Name]) -> None:
        pass

    def track(self, page: int, now_ns: int, about: About) -> None:
        self._order.setdefault(page, now_ns)

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        pass

    def renew(self, pages: Iterable[int], now_ns: int) -> None:
        pass

    def forget(self, page: int) -> None:
        self._order.pop(page, None)

    def evict(
        self, count: int, is_evictable: Callable[[int], bool], now_ns: int, *, must: bool = False
    ) -> list[int]:
        chosen = list(islice(filter(is_evictable, self._order), count))
        for page in chosen:
            del self._order[page]
        return chosen

    def __len__(self) -> int:
        return len(self._order)


class Queue(OrderedDict[int, V]):
    """Pages, oldest first, each with a value.

    `oldest` sets pages aside that may not go, so that an eviction looks at each of them once;
    `put_back` ends the eviction and gives them their ranks again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._aside: list[tuple[int, V]] = []

    @property
    def size(self) -> int:
        """How many pages there are, those set aside included."""
        return len(self) + len(self._aside)

    def oldest(self, is_evictable: Callable[[int], bool]) -> int | None:
        """The oldest page that may go; it stays."""
        while self:
            page = next(iter(self))
            if is_evictable(page):
                return page
            self._aside.append((page, self.pop(page)))
        return None

    def put_back(self) -> None:
        """End an eviction."""
        for page, value in reversed(self._aside):
            self[page] = value
            self.move_to_end(page, last=False)
        self._aside.clear()


class Ghosts(Generic[V]):
    """What is remembered of pages that left, oldest first: at most `names_max`.

    A name that is expected is *called*: it does not age any more, and is *claimed* when its page
    is tracked. As many can be called and never claimed.
    """

    __slots__ = ("_called", "_names", "names_max")

    def __init__(self, names_max: int) -> None:
        self.names_max = names_max
        self._names: OrderedDict[Name, V] = OrderedDict()
        self._called: OrderedDict[Name, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: Name) -> bool:
        return name in self._names

    def add(self, name: Name, value: V) -> None:
        """Remember one more; the oldest is forgotten where there are too many."""
        self._names[name] = value
        self._names.move_to_end(name)
        if len(self._names) > self.names_max:
            self.drop_oldest()

    def drop_oldest(self) -> None:
        """Forget the one that left first."""
        self._names.popitem(last=False)

    def call(self, name: Name) -> None:
        """A name of these is expected."""
        self._called[name] = self._names.pop(name)
        self._called.move_to_end(name)
        if len(self._called) > self.names_max:
            self._called.popitem(last=False)

    def claim(self, name: Name) -> V | None:
        """The page of that name is here: what was remembered, once."""
        called = self._called.pop(name, None)
        left = self._names.pop(name, None)
        return left if called is None else called


class Named(ABC):
    """A policy of several queues that knows its pages by name: the parts that all such share."""

    may_refuse: ClassVar[bool] = False
    wants_names: ClassVar[bool] = True

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._names: dict[int, Name] = {}

    def expect(self, names: Iterable[Name]) -> None:  # noqa: B027 - some have no ghosts
        pass

    def track(self, page: int, now_ns: int, about: About) -> None:
        if page in self._names:
            self._use(page)
        else:
            self._names[page] = about.name
            self._enter(page, about)

    def touch(self, pages: Iterable[int], now_ns: int) -> None:
        names, use = self._names, self._use
        for page in pages:
            if page in names:
                use(page)

    def renew(self, pages: Iterable[int], now_ns: int) -> None:
        names, move = self._names, self._renew
        for page in pages:
            if page in names:
                move(page)

    def forget(self, page: int) -> None:
        if self._names.pop(page, None) is not None:
            self._leave(page)

    def evict(
        self, count: int, is_evictable: Callable[[int], bool], now_ns: int, *, must: bool = False
    ) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < count:
            page = self._victim(is_evictable)
            if page is None:
                break
            del self._names[page]
            chosen.append(page)
        self._settle()
        return chosen

    def __len__(self) -> int:
        return len(self._names)

    @abstractmethod
    def _enter(self, page: int, about: About) -> None:
        """A page is new."""

    @abstractmethod
    def _use(self, page: int) -> None:
        """A tracked page was used."""

    def _renew(self, page: int) -> None:  # noqa: B027 - most have no recency
        """A tracked page is to be as recent as what came last, without having been used."""

    @abstractmethod
    def _leave(self, page: int) -> None:
        """A page is gone, and is not remembered."""

    @abstractmethod
    def _victim(self, is_evictable: Callable[[int], bool]) -> int | None:
        """Take the next page to go out of its queue; its name is still known."""

    @abstractmethod
    def _settle(self) -> None:
        """An eviction is over: pages that were passed over get their ranks again."""


def holder(queues: Sequence[Queue[V]], page: int) -> Queue[V]:
    """The queue that has this page; one of them must."""
    for queue in queues:
        if page in queue:
            return queue
    raise KeyError(page)
