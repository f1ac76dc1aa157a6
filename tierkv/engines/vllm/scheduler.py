"""The scheduler's side: how much of a prompt is stored, and what a step loads and saves.

It asks its copy of what the workers have, and neither a disk nor a process. Prompts of which a part
is on disk are loaded beside the steps of others; what is in memory is loaded within the step, layer
by layer. With several ranks all is loaded beside: of a load within a step a rank would know only
its own failures, and save what it computed from another's. At least one token is left to compute.

Where layers are in groups (sliding windows), each has its own blocks, and what is behind a window
has none: its places are `NO_PLACE`. Such groups are loaded beside the steps too, as vLLM hears of
their failures by request. Single owner: the scheduler's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from tierkv.core.keys import BlockKey
from tierkv.engines.vllm.mirror import DISK, Mirror, Report
from tierkv.engines.vllm.split import BlockSeconds
from tierkv.engines.vllm.step import Blocks, Step, Wish
from tierkv.engines.vllm.wishes import Wishes
from tierkv.store import HintKind

#: The place of a block that a window has left behind: vLLM's null block.
NO_PLACE: Final = 0
#: A prefix that was not loaded as the disk was slow makes the next look so much less slow.
_DOUBT: Final = 0.9


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

    @property
    def priority(self) -> int:
        """The least is served first."""


@dataclass(slots=True)
class _Tracked:
    """A request that has been asked about."""

    request: Request
    wishes: Wishes = field(default_factory=Wishes)
    #: The blocks that it has, by group.
    places: list[list[int]] = field(default_factory=list)
    #: Blocks from the first that are stored, or that a step was told to save, in all groups.
    saved: int = 0
    #: Whether `places` are as vLLM told, or windows may have left some behind since.
    is_known: bool = True
    #: Blocks that the engine had itself when it last asked. vLLM's request does not say so yet.
    first: int = 0
    #: The tiers of what was found then, beyond these.
    tiers: list[int] = field(default_factory=list)
    #: Whether vLLM was told that it is loaded beside the steps, and waits for that.
    is_beside: bool = False


class SchedulerSide:
    """See the module. `counters` are for `stats`, and start again whenever they are taken."""

    def __init__(
        self,
        *,
        block_tokens: int,
        block_bytes: int,
        ranks: int = 1,
        groups: int = 1,
        has_windows: bool = False,
    ) -> None:
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._ranks = ranks
        self._groups = groups
        self._has_windows = has_windows
        self._mirror = Mirror(ranks, groups)
        self._costs = BlockSeconds()
        self._doubt = 1.0
        self._requests: dict[str, _Tracked] = {}
        self._step = Step()
        self._failed_steps = 0
        self._steps = self._saving_step = 0
        self.counters: dict[str, float] = {}

    def told(self, reports: Iterable[Report]) -> None:
        """Ranks have told what they have, and how fast they are."""
        for report in reports:
            self._mirror.take(report)
            self._failed_steps = max(self._failed_steps, report.failed_steps)
        costs = BlockSeconds.of(
            self._mirror.reports.values(),
            block_bytes=self._block_bytes,
            block_tokens=self._block_tokens,
        )
        if costs.disk != self._costs.disk:
            self._doubt = 1.0
        self._costs = costs

    def arrived(self, request: Request, wishes: Wishes) -> None:
        """A request is new."""
        self._tracked(request).wishes = wishes
        keys = self._keys(request, len(request.block_hashes))
        for kind, seconds in wishes.at_start:
            self._wish(kind, keys, seconds)

    def matched(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """Tokens beyond `computed_tokens` that can be loaded, and whether beside the steps."""
        size = self._block_tokens
        tracked = self._requests.get(request.request_id)
        if tracked is not None and not tracked.wishes.may_load:
            return 0, False
        usable, first = (request.num_tokens - 1) // size, computed_tokens // size
        tiers = self._mirror.match(request.block_hashes[:usable])[first:]
        costs = BlockSeconds(
            self._costs.memory, self._costs.disk * self._doubt, self._costs.compute
        )
        loaded = costs.split(tiers)
        # What is said here of a request is held to when its blocks are there.
        tracked = self._tracked(request)
        if loaded < len(tiers):
            self._doubt *= _DOUBT
            self._count("declined_tokens", (len(tiers) - loaded) * size)
        tracked.first, tracked.tiers = first, tiers[:loaded]
        is_apart = self._ranks > 1 or self._groups > 1
        tracked.is_beside = bool(loaded) and (is_apart or DISK in tracked.tiers)
        return loaded * size, tracked.is_beside

    def allocated(
        self, request: Request, places: Sequence[Sequence[int]], loaded_tokens: int
    ) -> None:
        """Blocks were given to a request, for what it computes and for what it loads; by group."""
        tracked = self._tracked(request)
        tracked.places = [list(group) for group in places]
        first = tracked.first
        if first:
            self._step.used.append(self._keys(request, first))
        loaded = loaded_tokens // self._block_tokens
        del tracked.tiers[loaded:]
        if not loaded:
            return
        end = first + loaded
        keys, is_cold = self._keys(request, end), DISK in tracked.tiers
        parts = []
        for group, held in enumerate(tracked.places):
            start = _behind_windows(held, first, end)
            if start < end:
                parts.append(
                    Blocks(
                        request.request_id,
                        keys,
                        held[start:end],
                        group=group,
                        is_cold=is_cold,
                        priority=request.priority,
                    )
                )
        if tracked.is_beside:
            self._step.async_loads.append(parts)
        else:
            self._step.loads += parts
        tracked.saved = max(tracked.saved, end)

    def sources(self, request: Request) -> tuple[int, int]:
        """Of what was said to be loaded of a request, tokens from memory and from disk."""
        tiers = self._tracked(request).tiers
        disk = tiers.count(DISK)
        found = (len(tiers) - disk) * self._block_tokens, disk * self._block_tokens
        self._count("memory_hit_tokens", found[0])
        self._count("disk_hit_tokens", found[1])
        return found

    def scheduled(
        self,
        request_id: str,
        added: Sequence[Sequence[int]] | None,
        computed_tokens: int,
        tokens: int,
        *,
        is_all: bool = False,
    ) -> None:
        """A step computes `tokens` of a request after `computed_tokens`.

        `added` are blocks that it got for that, by group; `is_all`: all that it has.
        """
        self._step.tokens += tokens
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        if is_all:
            tracked.places, tracked.is_known = [], True
        if added is not None:
            before = tracked.places or [[] for _ in added]
            tracked.places = [[*had, *got] for had, got in zip(before, added, strict=True)]
        request = tracked.request
        computed = (computed_tokens + tokens) // self._block_tokens
        whole = min(computed, len(request.block_hashes), *map(len, tracked.places))
        if whole <= tracked.saved or not tracked.wishes.may_save or not tracked.is_known:
            return
        keys = self._keys(request, whole)
        for group, held in enumerate(tracked.places):
            start = _behind_windows(held, tracked.saved, whole)
            if start < whole:
                saved = Blocks(request_id, keys, held[start:whole], group=group)
                self._step.saves.append(saved)
        tracked.saved = whole

    def step(self) -> Step:
        """What was gathered since the last step."""
        done, self._step = self._step, Step()
        done.failed_steps = self._failed_steps
        self._steps += 1
        done.number = self._steps
        if done.saves:
            self._saving_step = self._steps
        return done

    @property
    def is_saving(self) -> bool:
        """Whether a rank has not told yet that all of the steps so far is saved."""
        return self._saving_step > self._mirror.saved_step

    def failed(self, places: set[int]) -> None:
        """Nothing was loaded to these places: vLLM computes that, and what was not saved is then.

        Their requests are not loaded again, or one that nobody can load would be tried forever.
        """
        self._count("failed_blocks", len(places))
        for tracked in self._requests.values():
            self._save_again(tracked)
            if any(not places.isdisjoint(held) for held in tracked.places):
                tracked.wishes.may_load = False

    def failed_requests(self, names: Iterable[str]) -> None:
        """As `failed`, of requests whose layers are in groups; all of them is computed."""
        for name in names:
            self._count("failed_requests", 1)
            if name in self._requests:
                self._requests[name].wishes.may_load = False
        for tracked in self._requests.values():
            self._save_again(tracked)

    def _save_again(self, tracked: _Tracked) -> None:
        """Nobody knows what a worker left out; what is stored it skips."""
        tracked.saved = 0
        # A window may have left places of before behind, and others have them by now.
        tracked.is_known = not self._has_windows

    def finished(self, request_id: str) -> None:
        """A request has ended; what was gathered for it still is done."""
        tracked = self._requests.pop(request_id, None)
        if tracked is not None and tracked.saved:
            keys = self._keys(tracked.request, tracked.saved)
            for kind, seconds in tracked.wishes.at_end:
                self._wish(kind, keys, seconds)

    def clear(self) -> None:
        """Nothing that is stored is wanted any more."""
        self._mirror = Mirror(self._ranks, self._groups)
        self._step.clears = True
        self.failed(set())

    def _wish(self, kind: HintKind, keys: list[BlockKey], seconds: float) -> None:
        self._step.wishes.append(Wish(kind, keys, seconds))
        self._count("hints", 1)

    def _count(self, name: str, amount: float) -> None:
        if amount:
            self.counters[name] = self.counters.get(name, 0) + amount

    def _tracked(self, request: Request) -> _Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = self._requests[request.request_id] = _Tracked(request)
        return tracked

    def _keys(self, request: Request, count: int) -> list[BlockKey]:
        """Keys of the first blocks; the engine's hashes are chained, and are the keys."""
        return list(request.block_hashes[:count])  # type: ignore[arg-type]


def _behind_windows(places: Sequence[int], first: int, end: int) -> int:
    """The first block from which on all have a place."""
    if NO_PLACE not in places[first:end]:
        return first
    for number in range(end - 1, first - 1, -1):
        if places[number] == NO_PLACE:
            return number + 1
    return first
