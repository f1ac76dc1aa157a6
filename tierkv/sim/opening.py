"""`open_trace`: a trace from a path or from a built-in generator, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from tierkv.core.errors import ConfigError
from tierkv.sim import cache
from tierkv.sim.formats import TRACES
from tierkv.sim.formats.base import HEAD_BYTES, TraceFormat, TraceSource
from tierkv.sim.generator import generate
from tierkv.sim.settings import settings_of
from tierkv.sim.source import digest_of, opened, plain_name
from tierkv.sim.trace import Trace

BUILTIN: Final = "builtin:"


def open_trace(
    spec: str,
    *,
    format: str | None = None,  # noqa: A002 - the word that a user knows
    settings: Mapping[str, str] | None = None,
    strict: bool = False,
    keep: bool = True,
) -> Trace:
    """The trace at a path, or made by a generator: `builtin:NAME?seed=1&hours=2`.

    format: by name; told from the content where it is not given. settings: of the format or the
    generator, as words. strict: the first bad line raises ConfigError, as does what cannot be
    read at all. keep: large traces are kept as arrays beside the path (or in the user's cache
    directory) and found there the next time.
    """
    if spec.startswith(BUILTIN):
        if format is not None:
            raise ConfigError(f"{spec}: a generator has no format")
        return _generated(spec, settings or {})
    path = Path(spec).expanduser()
    if not path.exists():
        raise ConfigError(f"{spec}: no such file")
    kind = format_named(format) if format is not None else format_of(path)
    chosen = settings_of(kind.settings, settings or {}, kind.name)
    words, path = chosen.words(), kind.whole(path)
    digest = digest_of(path)
    key = cache.cache_key(
        digest, kind.name, str(kind.version), *(f"{name}={word}" for name, word in words.items())
    )
    kept = cache.TraceCache(path, key)
    found = kept.load() if keep else None
    if found is not None and not (strict and found.facts.bad_lines):
        return found
    trace = kind().read(TraceSource(path, strict=strict, digest=digest), chosen)
    if keep and trace.references >= cache.KEPT_REFERENCES_MIN:
        kept.save(trace)
    return trace


def format_named(name: str) -> type[TraceFormat]:
    """The format of that name. Raises ConfigError for an unknown one."""
    found = TRACES.load(name)
    if not issubclass(found, TraceFormat):
        raise ConfigError(f"traces: {name!r} is no format")
    return found


def format_of(path: Path) -> type[TraceFormat]:
    """The format that a path's name and first bytes look like. Raises ConfigError for none."""
    head = b""
    if path.is_file() and not plain_name(path).endswith(".tar"):
        with opened(path) as stream:
            head = stream.read(HEAD_BYTES)
    for name in TRACES:
        kind = format_named(name)
        if kind.matches(path, head):
            return kind
    raise ConfigError(f"{path}: no known format of traces; give one of {', '.join(TRACES)}")


def _generated(spec: str, settings: Mapping[str, str]) -> Trace:
    name, _, query = spec.removeprefix(BUILTIN).partition("?")
    try:
        asked = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"{spec}: {error}; like builtin:chat?seed=1&hours=2") from None
    return generate(name, {**dict(asked), **settings})
