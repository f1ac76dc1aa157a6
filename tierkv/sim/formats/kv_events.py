"""KV events of engines, as JSON lines: which blocks were stored, removed, cleared.

vLLM and SGLang publish batches ``[ts, events, …]`` of `BlockStored` (block_hashes,
parent_block_hash, token_ids, block_size, lora_id, medium, …), `BlockRemoved` and
`AllBlocksCleared` over ZeroMQ in msgpack. A line here is one batch, or one event with a `ts`; each
may be an object or an array, and hashes are numbers or text.

The log tells of blocks that were stored, not of those found in the cache. A request is therefore
made of events: it begins with a stored run and refers to the whole chain from the root to its end;
runs that go on at the end of a chain within `join` seconds belong to the same request, so that
prefill in chunks and generated blocks do not count again. A request that found everything is not
in the log. Removals are the engine's doing and no one's wish: they are counted, not replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, TypeAlias, cast

import msgspec
import numpy as np

from tierkv.core.errors import ConfigError
from tierkv.sim.chaining import id_of
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.settings import Seconds, Settings
from tierkv.sim.source import BAD_LINE, lines
from tierkv.sim.trace import SECOND_NS, TOKENS_MAX, Trace, TraceBuilder

_KINDS: Final = ("BlockStored", "BlockRemoved", "AllBlocksCleared")
_STORED_FIELDS: Final = (
    *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    *("lora_name", "extra_keys", "group_idx"),
)
_OPEN_MAX: Final = 4096  # chains that are looked at for having ended
_DEPTH_MAX: Final = 1 << 20  # blocks in a chain

Raw: TypeAlias = dict[str, object] | list[object]


class KvEventSettings(Settings, frozen=True):
    """join: stores that go on with a chain within so long are of the same request."""

    join: Seconds = 5.0


class _Stored(msgspec.Struct):
    block_hashes: Annotated[list[int | str], msgspec.Meta(max_length=1 << 20)]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
    parent_block_hash: int | str | None = None
    medium: str | None = None
    group_idx: int | None = None


@dataclass(slots=True)
class _Request:
    """What a request has stored so far."""

    at_ns: int
    last_ns: int
    chain: list[int]


class KvEvents(TraceFormat):
    """Reads KV events; what the engines share."""

    settings: ClassVar[type[Settings]] = KvEventSettings

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        replay = _Replay(source.path.name, cast("KvEventSettings", settings))
        for number, line in lines(source.path, source.problems):
            try:
                for at_ns, event in _events(msgspec.json.decode(line)):
                    replay.take(at_ns, event)
            except BAD_LINE as error:
                source.problems.add(source.path.name, number, str(error))
        builder = replay.finish()
        if builder is None:
            raise ConfigError(f"{source.path}: no event in it that {self.name} can have stored")
        seconds = replay.join_ns / SECOND_NS
        requests = f"requests: stores that go on with a chain within {seconds:g} s are one, which "
        requests += "refers to the chain from its root; hits without a store are not in the log"
        ignored = f"ignored: {replay.removed} removals, {replay.cleared} clearings, "
        ignored += f"{replay.elsewhere} stores of other tiers or groups"
        roots = f"roots: {replay.orphans} stores whose parent the log does not know begin a chain"
        made = (requests, ignored, roots)
        return builder.build(source.facts(self.name, settings.words(), synthesised=made))


class _Replay:
    """Chains and open requests while a log is read."""

    def __init__(self, name: str, settings: KvEventSettings) -> None:
        self._name = name
        self.join_ns = round(settings.join * SECOND_NS)
        self._parents: dict[int, int | None] = {}
        self._open: dict[int, _Request] = {}  # by the last block of its chain
        self._builder: TraceBuilder | None = None
        self._block_tokens = 0
        self.removed = self.cleared = self.elsewhere = self.orphans = 0

    def take(self, at_ns: int, event: tuple[str, Raw]) -> None:
        """One event. Raises ValueError if it cannot be one."""
        kind, body = event
        if kind == "BlockRemoved":
            self.removed += 1
        elif kind == "AllBlocksCleared":
            self.cleared += 1
        else:
            stored = _stored(body)
            if (stored.medium or "GPU").upper() != "GPU" or stored.group_idx:
                self.elsewhere += 1
            elif stored.block_hashes:
                self._store(at_ns, stored)

    def _store(self, at_ns: int, stored: _Stored) -> None:
        if self._builder is None:
            self._block_tokens = stored.block_size
            self._builder = TraceBuilder(self._name, stored.block_size)
        if stored.block_size != self._block_tokens:
            raise ValueError(
                f"blocks of {stored.block_size}, before of {self._block_tokens} tokens"
            )
        parent = None if stored.parent_block_hash is None else _hash(stored.parent_block_hash)
        if parent is not None and parent not in self._parents:
            self._parents[parent] = None
            self.orphans += 1
        request = None if parent is None else self._open.pop(parent, None)
        if request is None or at_ns - request.last_ns > self.join_ns:
            self._end(request)
            request = _Request(at_ns, at_ns, self._chain(parent))
        for block in map(_hash, stored.block_hashes):
            known = self._parents.setdefault(block, parent)
            if known != parent:  # an orphan whose parent is known now keeps its place as a root
                request.chain = self._chain(known)
            request.chain.append(block)
            parent = block
        request.last_ns = at_ns
        last = request.chain[-1]
        self._end(self._open.pop(last, None))
        self._open[last] = request
        if len(self._open) > _OPEN_MAX:
            for key, old in list(self._open.items()):
                if at_ns - old.last_ns > self.join_ns:
                    self._end(self._open.pop(key))

    def _chain(self, block: int | None) -> list[int]:
        chain: list[int] = []
        while block is not None:
            chain.append(block)
            if len(chain) > _DEPTH_MAX:
                raise ValueError(f"a chain of more than {_DEPTH_MAX} blocks")
            block = self._parents[block]
        return chain[::-1]

    def _end(self, request: _Request | None) -> None:
        if request is None:
            return
        assert self._builder is not None
        ids = np.array(request.chain, dtype=np.int64)
        self._builder.add(request.at_ns, ids, input_tokens=len(ids) * self._block_tokens)

    def finish(self) -> TraceBuilder | None:
        """All requests; None if there are none."""
        for request in self._open.values():
            self._end(request)
        self._open.clear()
        return self._builder


def _events(line: object) -> Iterator[tuple[int, tuple[str, Raw]]]:
    """(time, (kind, body)) of a line's events; a batch, or one event with its time."""
    if isinstance(line, list) and len(line) >= 2 and isinstance(line[1], list):
        at, events = line[0], line[1]
    elif isinstance(line, dict) and isinstance(line.get("events"), list):
        at, events = line.get("ts"), line["events"]
    elif isinstance(line, dict):
        at, events = line.get("ts", line.get("timestamp")), [line]
    else:
        raise ValueError("neither a batch of events nor an event")
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= 1e11:
        raise ValueError("no time in seconds")
    for event in events:
        yield round(at * SECOND_NS), _kind(event)


def _kind(event: object) -> tuple[str, Raw]:
    if isinstance(event, list) and event and event[0] in _KINDS:
        return str(event[0]), event[1:]
    if isinstance(event, dict):
        kind = event.get("type", event.get("event", event.get("event_type")))
        if kind in _KINDS:
            return str(kind), event
    raise ValueError(f"an event that is none of {', '.join(_KINDS)}")


def _stored(body: Raw) -> _Stored:
    if isinstance(body, list):
        body = dict(zip(_STORED_FIELDS, body))  # noqa: B905 - later fields may be absent or new
    return msgspec.convert(body, _Stored)


def _hash(value: int | str) -> int:
    if isinstance(value, str):
        return id_of(value.encode())
    return id_of(value.to_bytes(32, "little", signed=True)) if abs(value) < 1 << 200 else _refuse()


def _refuse() -> int:
    raise ValueError("a hash of more than 200 bits")
