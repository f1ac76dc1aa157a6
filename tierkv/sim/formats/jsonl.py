"""tierkv's own JSON lines: every array of a trace, readable by anything.

The first line is ``{"tierkv_trace": 1, "name": …, "block_tokens": …, "facts": {…}}``. Each other
line is a request, with the names and units of `Trace`; what is not known is left out.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
import numpy as np

from tierkv.core.errors import ConfigError
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.settings import Settings
from tierkv.sim.source import BAD_LINE, lines, needed
from tierkv.sim.trace import NS_MAX, TOKENS_MAX, Stop, Trace, TraceBuilder, TraceFacts

VERSION: Final = 1


class Head(msgspec.Struct, frozen=True):
    """The first line."""

    tierkv_trace: int
    name: str
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
    facts: TraceFacts


class _Line(msgspec.Struct, omit_defaults=True):
    arrival_ns: Annotated[int, msgspec.Meta(ge=0, le=NS_MAX)]
    input_tokens: int
    blocks: list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]]
    output_tokens: int = 0
    session: int = -1
    tenant: int = 0
    stop: Stop = Stop.UNKNOWN
    pause_ns: Annotated[int, msgspec.Meta(ge=-1, le=NS_MAX)] = -1
    busy_ns: Annotated[int, msgspec.Meta(ge=-1, le=NS_MAX)] = -1


class Jsonl(TraceFormat):
    """Reads tierkv's JSON lines."""

    name = "jsonl"

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        return b'"tierkv_trace"' in head.split(b"\n", 1)[0]

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        rows = lines(source.path, source.problems)
        try:
            head = msgspec.json.decode(next(rows, (1, b""))[1], type=Head)
        except BAD_LINE as error:
            raise ConfigError(f"{source.path}:1: not the head of a trace: {error}") from None
        if head.tierkv_trace != VERSION:
            raise ConfigError(f"{source.path}:1: version {head.tierkv_trace}, not {VERSION}")
        decode = msgspec.json.Decoder(_Line).decode
        builder = TraceBuilder(head.name, head.block_tokens)
        for number, line in rows:
            try:
                entry = decode(line)
                builder.add(
                    entry.arrival_ns,
                    np.array(entry.blocks, dtype=np.int64),
                    input_tokens=entry.input_tokens,
                    output_tokens=entry.output_tokens,
                    session=entry.session,
                    tenant=entry.tenant,
                    stop=entry.stop,
                    pause_ns=entry.pause_ns,
                    busy_ns=entry.busy_ns,
                )
            except BAD_LINE as error:
                source.problems.add(source.path.name, number, str(error))
        return builder.build(facts_read(head.facts, source))


def facts_read(facts: TraceFacts, source: TraceSource) -> TraceFacts:
    """The facts that came with a trace: what it was made of stays known, bad lines add up."""
    return replace(
        facts,
        bad_lines=facts.bad_lines + source.problems.count,
        problems=facts.problems + tuple(source.problems.first),
    )


def write_jsonl(trace: Trace, path: Path) -> None:
    """Write a trace; compressed if the name ends in .zst or .gz."""
    encode = msgspec.json.Encoder().encode
    with _created(path) as stream:
        stream.write(encode(Head(VERSION, trace.name, trace.block_tokens, trace.facts)) + b"\n")
        for i in range(trace.requests):
            entry = _Line(
                int(trace.arrival_ns[i]),
                int(trace.input_tokens[i]),
                trace.blocks[trace.starts[i] : trace.starts[i + 1]].tolist(),
                int(trace.output_tokens[i]),
                int(trace.session[i]),
                int(trace.tenant[i]),
                Stop(int(trace.stop[i])),
                int(trace.pause_ns[i]),
                int(trace.busy_ns[i]),
            )
            stream.write(encode(entry) + b"\n")


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as raw:
        if path.suffix == ".zst":
            zstandard = needed("zstandard")
            how = zstandard.ZstdCompressionParameters.from_level(9, window_log=27, enable_ldm=True)
            with zstandard.ZstdCompressor(compression_params=how).stream_writer(raw) as stream:
                yield stream
        elif path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as stream:
                yield stream  # type: ignore[misc]
        else:
            yield raw
