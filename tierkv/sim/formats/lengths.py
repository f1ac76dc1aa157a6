"""Traces that have lengths only: blocks are made up, by a model that is stated.

All requests of a tenant begin with one system prompt of `prompt` tokens. With the chance `returns`
a request goes on with an earlier one of its tenant: among those that ended at most `within` ago,
with the one whose input and answer together are the longest that fit into its input. All else is
new. Where the trace names a session, that decides instead. Nothing here is measured: hits of such
a trace are those of the model.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from tierkv.sim.chaining import History
from tierkv.sim.formats.base import TraceSource
from tierkv.sim.settings import Seconds, Seed, Settings
from tierkv.sim.trace import SECOND_NS, TOKENS_MAX, Stop, Trace, TraceBuilder

#: Requests whose continuation is looked for, of each tenant; the oldest are forgotten.
_OPEN_MAX = 100_000


class LengthSettings(Settings, frozen=True):
    """The model; `returns` as in Mooncake's conversation trace, 39 of 100."""

    seed: Seed = 7
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    returns: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.39
    within: Seconds = 600.0
    prompt: Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)] = 0


class LengthModel:
    """Makes blocks for requests that come in order of arrival. Single owner."""

    def __init__(self, name: str, settings: LengthSettings) -> None:
        self._settings = settings
        self._builder = TraceBuilder(name, settings.block_tokens)
        self._rng = np.random.Generator(np.random.PCG64(settings.seed))
        self._next_block = 0
        self._tenants: dict[str, _Tenant] = {}
        self._sessions: dict[tuple[str, str], _Open] = {}
        self._threads = 0
        self.block_tokens = settings.block_tokens

    def __len__(self) -> int:
        return len(self._builder)

    def new_blocks(self, count: int) -> NDArray[np.int64]:
        """Ids that were never given out."""
        first = self._next_block
        self._next_block += count
        return np.arange(first, first + count, dtype=np.int64)

    def add(
        self,
        at_ns: int,
        input_tokens: int,
        output_tokens: int,
        *,
        tenant: str = "",
        session: str = "",
        busy_ns: int = -1,
    ) -> None:
        """One request. Raises ValueError if it cannot be one."""
        if not 0 < input_tokens <= TOKENS_MAX or not 0 <= output_tokens <= TOKENS_MAX:
            raise ValueError(f"{input_tokens} tokens in, {output_tokens} out")
        place = self._tenants.get(tenant)
        if place is None:
            place = self._tenants[tenant] = _Tenant(len(self._tenants), History())
            place.prompt.grow(self, self._settings.prompt)
        before = self._continued(place, at_ns, input_tokens, tenant, session)
        history = History()
        known = place.prompt if before is None else before.history
        kept = min(known.tokens, input_tokens)
        history.set_ids(known.ids(), known.tokens)
        history.keep(self, kept // self.block_tokens)
        history.grow(self, input_tokens - history.tokens)
        thread = self._threads if before is None else before.thread
        self._threads += before is None
        self._builder.add(
            at_ns,
            history.ids(),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            session=thread,
            tenant=place.number,
            stop=Stop.UNKNOWN,
            busy_ns=busy_ns,
        )
        history.grow(self, output_tokens)
        opened = _Open(history, thread, at_ns + max(busy_ns, 0))
        if session:
            self._sessions[tenant, session] = opened
        else:
            place.put(opened)

    def _continued(
        self, place: _Tenant, at_ns: int, tokens: int, tenant: str, session: str
    ) -> _Open | None:
        if session:
            return self._sessions.get((tenant, session))
        if self._rng.random() >= self._settings.returns:
            return None
        return place.take(tokens, at_ns - round(self._settings.within * SECOND_NS))

    def build(self, source: TraceSource, form: str) -> Trace:
        """The trace of all requests."""
        s = self._settings
        model = (
            f"blocks: a tenant's requests share {s.prompt} tokens; {s.returns:.0%} go on with the "
            f"longest history of the last {s.within:g} s that fits (seed {s.seed}), where the "
            "trace names no session"
        )
        return self._builder.build(source.facts(form, s.words(), synthesised=(model,)))


class _Open:
    """A request that another may go on with."""

    __slots__ = ("ended_ns", "history", "thread")

    def __init__(self, history: History, thread: int, ended_ns: int) -> None:
        self.history = history
        self.thread = thread
        self.ended_ns = ended_ns


class _Tenant:
    """Requests of one tenant that may be gone on with, by the length of their history."""

    __slots__ = ("_count", "_open", "number", "prompt")

    def __init__(self, number: int, prompt: History) -> None:
        self.number = number
        self.prompt = prompt
        self._open: list[tuple[int, int, _Open]] = []
        self._count = 0

    def put(self, opened: _Open) -> None:
        self._count += 1
        insort(self._open, (opened.history.tokens, self._count, opened))
        if len(self._open) > _OPEN_MAX:
            cut = sorted(entry[1] for entry in self._open)[_OPEN_MAX // 2]
            self._open = [entry for entry in self._open if entry[1] >= cut]

    def take(self, tokens: int, since_ns: int) -> _Open | None:
        """The longest that is shorter than `tokens` and not too old; those too old are dropped."""
        at = bisect_right(self._open, (tokens - 1, 1 << 62)) - 1
        while at >= 0:
            _, _, opened = self._open.pop(at)
            if opened.ended_ns >= since_ns:
                return opened
            at -= 1
        return None
