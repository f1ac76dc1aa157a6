"""The scheduler's side: how much of a prompt is stored, and what a step loads and saves.

It asks the planner's tables and never a disk. Prompts of which a part is on the disk are loaded
beside the steps of others; what is in memory is loaded within the step, layer by layer. At least
one token is left to compute. Single owner: the scheduler's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tierkv.core.keys import BlockKey
from tierkv.engines.vllm.step import Blocks, Step
from tierkv.store import Store


class Request(Protocol):
    """What is used of vLLM's `Request`."""

    @property
    def request_id(self) -> str:
        """Its name."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far."""

    @property
    def num_computed_tokens(self) -> int:
        """Of how many tokens K and V are in the engine's cache."""

    @property
    def block_hashes(self) -> Sequence[bytes]:
        """A hash for each whole block, of all that is before it too."""


@dataclass(slots=True)
class _Tracked:
    """A request that has blocks."""

    request: Request
    places: list[int] = field(default_factory=list)
    #: Blocks from the first that are stored, or that a step was told to save.
    saved: int = 0
    #: Whether what was found last is loaded beside the steps.
    is_async: bool = False


class SchedulerSide:
    """See the module."""

    def __init__(self, store: Store, *, block_tokens: int) -> None:
        self._store = store
        self._block_tokens = block_tokens
        self._requests: dict[str, _Tracked] = {}
        self._step = Step()
        self._failures = 0

    def matched(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """Tokens beyond `computed_tokens` that can be loaded, and whether beside the steps."""
        size = self._block_tokens
        usable = (request.num_tokens - 1) // size
        match = self._store.match_keys(self._keys(request, usable))
        blocks = match.blocks - computed_tokens // size
        if blocks <= 0:
            return 0, False
        # What is said here of a request is held to when its blocks are there.
        tracked = self._tracked(request)
        tracked.is_async = bool(match.tokens_by_tier.get("cold"))
        return blocks * size, tracked.is_async

    def allocated(self, request: Request, places: Sequence[int], loaded_tokens: int) -> None:
        """Blocks were given to a request, for what it computes and for what it loads."""
        tracked = self._tracked(request)
        tracked.places = list(places)
        if not loaded_tokens:
            return
        first = request.num_computed_tokens // self._block_tokens
        end = first + loaded_tokens // self._block_tokens
        blocks = Blocks(request.request_id, self._keys(request, end), tracked.places[first:end])
        (self._step.async_loads if tracked.is_async else self._step.loads).append(blocks)
        tracked.saved = max(tracked.saved, end)

    def scheduled(
        self, request_id: str, places: Sequence[int], computed_tokens: int, tokens: int
    ) -> None:
        """A step computes `tokens` of a request after `computed_tokens`, with these blocks."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        tracked.places = list(places)
        request = tracked.request
        computed = (computed_tokens + tokens) // self._block_tokens
        whole = min(computed, len(request.block_hashes), len(places))
        if whole > tracked.saved:
            saved = tracked.places[tracked.saved : whole]
            self._step.saves.append(Blocks(request_id, self._keys(request, whole), saved))
            tracked.saved = whole

    def places_of(self, request_id: str) -> list[int]:
        """The blocks that a request was last known to have."""
        tracked = self._requests.get(request_id)
        return [] if tracked is None else tracked.places

    def step(self, *, is_idle: bool) -> Step:
        """What was gathered since the last step. `is_idle`: it computes nothing."""
        done, self._step = self._step, Step()
        done.is_idle, done.failures = is_idle, self._failures
        self._store.step()
        return done

    def failed(self) -> None:
        """Some blocks were not loaded: vLLM computes them, and what was not saved is saved then."""
        self._failures += 1
        for tracked in self._requests.values():
            tracked.saved = 0  # nobody knows what the worker left out; what is stored it skips

    def finished(self, request_id: str) -> None:
        """A request has ended; what was gathered for it still is done."""
        self._requests.pop(request_id, None)

    def _tracked(self, request: Request) -> _Tracked:
        return self._requests.setdefault(request.request_id, _Tracked(request))

    def _keys(self, request: Request, count: int) -> list[BlockKey]:
        """Keys of the first blocks; the engine's hashes are chained, and are the keys."""
        return [BlockKey(block_hash) for block_hash in request.block_hashes[:count]]
