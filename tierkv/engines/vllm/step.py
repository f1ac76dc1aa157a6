"""What the scheduler tells the worker for one step: blocks to load before it, to save after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tierkv.core.keys import BlockKey


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some blocks of a request: `keys` from the root on, the last `len(places)` of them in places.

    `places` are block ids of the engine's cache.
    """

    request: str
    keys: list[BlockKey]
    places: list[int]

    @property
    def first(self) -> int:
        """The position of the first block that is meant."""
        return len(self.keys) - len(self.places)


@dataclass(slots=True)
class Step:
    """See the module."""

    #: The step waits for these, layer by layer.
    loads: list[Blocks] = field(default_factory=list)
    #: Their requests wait outside of any step.
    async_loads: list[Blocks] = field(default_factory=list)
    saves: list[Blocks] = field(default_factory=list)
    #: Nothing is computed: the engine only waits for loads beside its steps.
    is_idle: bool = False
    #: Failures that the scheduler had heard of when it made this step.
    failures: int = 0
