"""tierkv's own event log (`tierkv.plan.event_log`): what was asked of a live store's planner.

A request looks its chain up and acquires what is found (`Acquire`, in windows when it is long;
`Touch` at its end), then puts what it computed (`Put`). So a request begins with an `Acquire` from
the root or with a `Put` that goes on with no open chain; later windows and puts that go on with its
chain belong to it, for `join` seconds. It refers to the longest chain that it named.
Namespaces are tenants. Keys are salted hashes; tokens are whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, cast

import msgspec
import numpy as np

from tierkv.core.errors import ConfigError
from tierkv.plan.events import Acquire, AnyEvent, Put
from tierkv.plan.spec import PlanSpec
from tierkv.sim.chaining import id_of
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.settings import Seconds, Settings
from tierkv.sim.source import BAD_LINE, lines
from tierkv.sim.trace import SECOND_NS, Trace, TraceBuilder

_OPEN_MAX: Final = 4096  # chains that are looked at for having ended


class EventLogSettings(Settings, frozen=True):
    """join: a chain that goes on within so long is of the same request."""

    join: Seconds = 60.0


@dataclass(slots=True)
class _Request:
    at_ns: int
    last_ns: int
    keys: list[bytes]
    tenant: int


class EventLog(TraceFormat):
    """Reads tierkv's event log."""

    name = "tierkv"
    settings: ClassVar[type[Settings]] = EventLogSettings

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        line = head.split(b"\n", 1)[0]
        return b'"block_bytes"' in line and b'"namespaces"' in line

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        join_ns = round(cast("EventLogSettings", settings).join * SECOND_NS)
        rows = lines(source.path, source.problems)
        try:
            spec = msgspec.json.decode(next(rows, (1, b""))[1], type=PlanSpec)
        except BAD_LINE as error:
            raise ConfigError(f"{source.path}:1: not the head of an event log: {error}") from None
        joining = _Joining(source.path.name, spec, join_ns)
        decode = msgspec.json.Decoder(tuple[int, AnyEvent, int]).decode
        for number, line in rows:
            try:
                now_ns, event, _ = decode(line)
                if isinstance(event, Acquire) and event.count:
                    keys = event.keys[: event.first + event.count]
                    joining.take(now_ns, keys, event.namespace, is_put=False, first=event.first)
                elif isinstance(event, Put) and event.keys:
                    joining.take(now_ns, event.keys, event.namespace, is_put=True, first=0)
            except BAD_LINE as error:
                source.problems.add(source.path.name, number, str(error))
        builder = joining.finish()
        if not len(builder):
            raise ConfigError(f"{source.path}: no request in it: nothing was acquired or put")
        made = (f"requests: what goes on with a chain within {join_ns / SECOND_NS:g} s is one",)
        return builder.build(source.facts(self.name, settings.words(), synthesised=made))


class _Joining:
    """Puts events together that are of one request."""

    def __init__(self, name: str, spec: PlanSpec, join_ns: int) -> None:
        self._builder = TraceBuilder(name, spec.block_tokens)
        self._block_tokens = spec.block_tokens
        self._join_ns = join_ns
        self._tenants: dict[str, int] = {}
        self._open: dict[bytes, _Request] = {}  # by the last key of its chain

    def take(
        self, now_ns: int, keys: list[bytes], namespace: str, *, is_put: bool, first: int
    ) -> None:
        """One event that names a chain from its root. Raises ValueError if it cannot be one."""
        if not 0 <= now_ns < 1 << 61 or not keys:
            raise ValueError("a time or a chain that cannot be")
        request = self._going_on(now_ns, keys, is_put=is_put, first=first)
        if request is None:
            tenant = self._tenants.setdefault(namespace, len(self._tenants))
            request = _Request(now_ns, now_ns, keys, tenant)
        request.keys = max(request.keys, keys, key=len)
        request.last_ns = now_ns
        last = request.keys[-1]
        self._end(self._open.pop(last, None))
        self._open[last] = request
        if len(self._open) > _OPEN_MAX:
            for key, old in list(self._open.items()):
                if now_ns - old.last_ns > self._join_ns:
                    self._end(self._open.pop(key))

    def _going_on(
        self, now_ns: int, keys: list[bytes], *, is_put: bool, first: int
    ) -> _Request | None:
        """The open request whose chain this goes on with, the longest; it is open no more."""
        if is_put:
            found = next((key for key in reversed(keys) if key in self._open), None)
        else:
            found = keys[first - 1] if 0 < first <= len(keys) else None
        request = None if found is None else self._open.get(found)
        if found is None or request is None or now_ns - request.last_ns > self._join_ns:
            return None
        return self._open.pop(found)

    def _end(self, request: _Request | None) -> None:
        if request is not None:
            ids = np.array([id_of(key) for key in request.keys], dtype=np.int64)
            tokens = len(ids) * self._block_tokens
            tenant = request.tenant
            self._builder.add(request.at_ns, ids, input_tokens=tokens, tenant=tenant)

    def finish(self) -> TraceBuilder:
        """All requests."""
        for request in self._open.values():
            self._end(request)
        self._open.clear()
        return self._builder
