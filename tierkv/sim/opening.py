"""`open_trace`: a trace from a path, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tierkv.core.errors import ConfigError
from tierkv.sim.formats import TRACES
from tierkv.sim.formats.base import HEAD_BYTES, TraceFormat, TraceSource
from tierkv.sim.settings import settings_of
from tierkv.sim.source import opened, plain_name
from tierkv.sim.trace import Trace


def open_trace(
    spec: str,
    *,
    format: str | None = None,  # noqa: A002 - the word that a user knows
    settings: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Trace:
    """The trace at a path.

    format: by name; told from the content where it is not given. settings: of the format, as
    words. strict: the first bad line raises ConfigError, as does what cannot be read at all.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise ConfigError(f"{spec}: no such file")
    kind = _format_named(format) if format is not None else _format_of(path)
    chosen = settings_of(kind.settings, settings or {}, kind.name)
    return kind().read(TraceSource(path, strict=strict), chosen)


def _format_named(name: str) -> type[TraceFormat]:
    found = TRACES.load(name)
    if not issubclass(found, TraceFormat):
        raise ConfigError(f"traces: {name!r} is no format")
    return found


def _format_of(path: Path) -> type[TraceFormat]:
    head = b""
    if path.is_file() and not plain_name(path).endswith(".tar"):
        with opened(path) as stream:
            head = stream.read(HEAD_BYTES)
    for name in TRACES:
        kind = _format_named(name)
        if kind.matches(path, head):
            return kind
    raise ConfigError(f"{path}: no known format of traces; give one of {', '.join(TRACES)}")
