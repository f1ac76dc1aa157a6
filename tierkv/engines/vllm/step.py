"""What the scheduler tells the workers for one step: blocks to load before it, to save after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tierkv.core.keys import BlockKey
from tierkv.store import HintKind


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some blocks of a request: `keys` from the root on, the last `len(places)` of them in places.

    `places` are block ids of the engine's cache.
    """

    request: str
    keys: list[BlockKey]
    places: list[int]
    #: Of the engine's groups of layers, which have blocks of their own.
    group: int = 0
    #: Whether a part of it is on disk.
    is_cold: bool = False
    #: Loads beside the steps begin with the least.
    priority: int = 0

    @property
    def first(self) -> int:
        """The position of the first block that is meant."""
        return len(self.keys) - len(self.places)


@dataclass(frozen=True, slots=True)
class Wish:
    """A hint for the store, in `in_s` seconds where it names a time."""

    kind: HintKind
    keys: Sequence[BlockKey]
    in_s: float = 0.0


@dataclass(slots=True)
class Step:
    """See the module."""

    #: From 1; steps are in order.
    number: int = 0
    #: The step waits for these, layer by layer.
    loads: list[Blocks] = field(default_factory=list)
    #: Their requests wait outside of any step; the blocks of one in all groups belong together.
    async_loads: list[list[Blocks]] = field(default_factory=list)
    saves: list[Blocks] = field(default_factory=list)
    wishes: list[Wish] = field(default_factory=list)
    #: Chains that the engine still had itself: used, and not loaded.
    used: list[list[BlockKey]] = field(default_factory=list)
    #: Tokens that are computed; none where the engine only waits for loads beside its steps.
    tokens: int = 0
    #: Steps with a missing load that the scheduler had heard of when it made this one.
    failed_steps: int = 0
    #: Nothing that is stored is wanted any more.
    clears: bool = False
