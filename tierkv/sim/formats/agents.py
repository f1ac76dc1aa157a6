"""Agent sessions of kv-cache-tester: one JSON document a session, ids of blocks local to it.

Each of `requests` has `t` (s from the session's start), `in`, `out`, `hash_ids` of whole blocks of
`block_size` tokens, `stop`, `api_time`, `think_time` (s between the last answer and this request);
one of type `subagent` holds requests of its own, whose `t` counts from it
(github.com/callanjfox/kv-cache-tester, traces/). Documents lie in a directory or a tar archive.

The format has no absolute times and no ids across sessions. What is made up here, and said in the
facts: starts uniform over `spread` (and that shortened by `rate`), and the blocks of tools and
system prompt shared by sessions that agree in the sizes of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from tierkv.core.errors import ConfigError
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.settings import Seconds, Seed, Settings
from tierkv.sim.source import BAD_LINE, documents, plain_name
from tierkv.sim.trace import SECOND_NS, TOKENS_MAX, Stop, Trace, TraceBuilder

Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
LocalId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
Time = Annotated[float, msgspec.Meta(ge=0, le=1e9)]

_DEPTH_MAX: Final = 8
_SHARED: Final = 1 << 62  # local ids are below: (session + 1) << 32 | id
_STOPS: Final = {
    "tool_use": Stop.TOOL,
    "end_turn": Stop.END,
    "stop_sequence": Stop.END,
    "max_tokens": Stop.LENGTH,
}


class AgentSettings(Settings, frozen=True):
    """How sessions that have no absolute times are laid side by side.

    spread: sessions start uniformly over so long.  rate: so many times as densely.  cut: requests
    that would be sent later than that are left out; 0 for none.  every: `N,K` keeps session K of
    each N, starts unchanged.  copies: sessions equal in all lengths are read once, or all.
    share: `prompt` shares blocks of tools and system prompt between sessions, `none` nothing.
    """

    seed: Seed = 7
    spread: Seconds = 12 * 3600.0
    cut: Seconds = 24 * 3600.0
    rate: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    every: Annotated[str, msgspec.Meta(pattern=r"^\d{1,6},\d{1,6}$")] = "1,0"
    copies: Literal["drop", "keep"] = "drop"
    share: Literal["prompt", "none"] = "prompt"


class _Entry(msgspec.Struct):
    t: Time
    type: str = ""
    input: Count = msgspec.field(default=0, name="in")
    output: Count = msgspec.field(default=0, name="out")
    hash_ids: list[LocalId] = []
    stop: str = ""
    api_time: Time | None = None
    think_time: float | None = None
    requests: list[_Entry] = []


class _Session(msgspec.Struct):
    block_size: Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
    requests: list[_Entry]
    tool_tokens: Count = 0
    system_tokens: Count = 0
    hash_id_scope: str = "local"


@dataclass(slots=True)
class _Thread:
    """A sequence of turns with one history: a session, or a sub-agent in it."""

    start: float
    turns: list[_Entry] = field(default_factory=list)


class Agents(TraceFormat):
    """Reads sessions of kv-cache-tester."""

    name = "agents"
    settings: ClassVar[type[Settings]] = AgentSettings

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        if path.is_dir():
            return any(plain_name(file).endswith(".json") for file in path.rglob("*.json*"))
        return plain_name(path).endswith(".tar") or b'"hash_id_scope"' in head

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        chosen = cast("AgentSettings", settings)
        reading = _Reading(source, chosen)
        for name, data in documents(source.path, ".json", source.problems):
            try:
                session = msgspec.json.decode(data, type=_Session)
            except BAD_LINE as error:
                source.problems.add(name, 1, str(error))
                continue
            reading.take(name, session)
        if reading.builder is None or not len(reading.builder):
            raise ConfigError(f"{source.path}: no request of an agent session in it")
        facts = source.facts(self.name, chosen.words(), synthesised=_made_up(chosen))
        return reading.builder.build(facts)


class _Reading:
    """What goes on from session to session while an archive is read."""

    def __init__(self, source: TraceSource, chosen: AgentSettings) -> None:
        self._problems = source.problems
        self._name = source.path.name
        self._chosen = chosen
        self._rng = np.random.default_rng(chosen.seed)
        self._seen: set[tuple[tuple[int, int, int], ...]] = set()
        self._prompts: dict[tuple[int, int], int] = {}
        self._every, self._which = (int(word) for word in chosen.every.split(","))
        if not self._which < self._every:
            raise ConfigError(f"agents: every={chosen.every}: N,K needs K < N")
        self._kept = 0
        self._threads = 0
        self.builder: TraceBuilder | None = None

    def take(self, name: str, session: _Session) -> None:
        """One session, unless it is a copy or not selected."""
        try:
            threads = list(_threads(session.requests, 0.0, 0))
        except ValueError as error:
            self._problems.add(name, 1, str(error))
            return
        if self.builder is None:
            self.builder = TraceBuilder(self._name, session.block_size)
            self._block_tokens = session.block_size
        if session.block_size != self._block_tokens or session.hash_id_scope != "local":
            self._problems.add(name, 1, "another block_size or hash_id_scope than those before")
            return
        lengths = tuple(
            (turn.input, turn.output, len(turn.hash_ids))
            for thread in threads
            for turn in thread.turns
        )
        if self._chosen.copies == "drop":
            if lengths in self._seen:
                return
            self._seen.add(lengths)
        number = self._kept
        self._kept += 1
        start = float(self._rng.random()) * self._chosen.spread / self._chosen.rate
        if number % self._every != self._which:
            return
        prompt = self._prompt(session)
        for thread in threads:
            self._take_thread(name, number, thread, start, prompt)

    def _prompt(self, session: _Session) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Local ids of the blocks of tools and system prompt, and what they become."""
        base = (self._kept << 32) & (_SHARED - 1)
        sizes = (session.tool_tokens, session.system_tokens)
        first = next((e.hash_ids for e in session.requests if e.hash_ids), [])
        count = sum(sizes) // session.block_size if self._chosen.share == "prompt" else 0
        local = np.array(first[:count], dtype=np.int64) | base
        number = self._prompts.setdefault(sizes, len(self._prompts))
        return local, np.arange(len(local), dtype=np.int64) | _SHARED | (number << 32)

    def _take_thread(
        self,
        name: str,
        number: int,
        thread: _Thread,
        start: float,
        prompt: tuple[NDArray[np.int64], NDArray[np.int64]],
    ) -> None:
        assert self.builder is not None
        local, shared = prompt
        base = ((number + 1) << 32) & (_SHARED - 1)
        label = self._threads
        self._threads += 1
        cut = self._chosen.cut or float("inf")
        for place, turn in enumerate(thread.turns):
            at = start + thread.start + turn.t
            if at >= cut:
                continue
            ids = np.array(turn.hash_ids, dtype=np.int64) | base
            same = ids[: len(local)] == local[: len(ids)]
            count = len(same) if same.all() else int(same.argmin())
            ids[:count] = shared[:count]
            following = thread.turns[place + 1] if place + 1 < len(thread.turns) else None
            try:
                self.builder.add(
                    round(at * SECOND_NS),
                    ids,
                    input_tokens=turn.input,
                    output_tokens=turn.output,
                    session=label,
                    stop=_STOPS.get(turn.stop, Stop.UNKNOWN),
                    pause_ns=_pause_ns(turn, following),
                    busy_ns=-1 if turn.api_time is None else round(turn.api_time * SECOND_NS),
                )
            except ValueError as error:
                self._problems.add(name, 1, f"t={turn.t}: {error}")


def _threads(entries: list[_Entry], start: float, depth: int) -> Iterator[_Thread]:
    if depth > _DEPTH_MAX:
        raise ValueError(f"sub-agents nested deeper than {_DEPTH_MAX}")
    own = _Thread(start)
    inner: list[_Thread] = []
    for entry in entries:
        if entry.requests or entry.type == "subagent":
            inner += _threads(entry.requests, start + entry.t, depth + 1)
        else:
            own.turns.append(entry)
    own.turns.sort(key=lambda turn: turn.t)
    yield own
    yield from inner


def _pause_ns(turn: _Entry, following: _Entry | None) -> int:
    """From the end of this answer to the next request, as the trace says or as its times do."""
    if following is None:
        return -1
    if following.think_time is not None and following.think_time >= 0:
        return round(min(following.think_time, 1e9) * SECOND_NS)
    if turn.api_time is None:
        return -1
    return round(max(following.t - turn.t - turn.api_time, 0.0) * SECOND_NS)


def _made_up(chosen: AgentSettings) -> tuple[str, ...]:
    spread = f"{chosen.spread / chosen.rate:g} s"
    made = [f"arrival: sessions start uniformly over {spread} (seed {chosen.seed})"]
    if chosen.share == "prompt":
        made.append(
            "sharing: sessions of equal tool_tokens and system_tokens have those blocks in common"
        )
    if chosen.copies == "drop":
        made.append("selection: of sessions equal in all lengths one is kept")
    return tuple(made)
