"""Mooncake's request traces: JSON lines with chained ids of prefix blocks.

`timestamp` in ms, `input_length` and `output_length` in tokens, `hash_ids` of blocks of 512 tokens
of which the last may be partial (github.com/kvcache-ai/Mooncake, FAST25-release/traces). Others
write the same lines with other block sizes (`block_tokens`) and with ids that name only a block's
content (`ids=content`). No sessions, stops or times of running.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, cast

import msgspec
import numpy as np

from tierkv.core.errors import ConfigError
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.settings import Settings
from tierkv.sim.source import BAD_LINE, lines
from tierkv.sim.trace import TOKENS_MAX, Trace, TraceBuilder

Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
Id = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Millis = Annotated[float, msgspec.Meta(ge=0, le=1e14)]


class MooncakeSettings(Settings, frozen=True):
    """block_tokens: of one id.  ids: whether an id includes what precedes the block."""

    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)] = 512
    ids: Literal["chained", "content"] = "chained"


class _Line(msgspec.Struct):
    timestamp: Millis
    input_length: Count
    output_length: Count
    hash_ids: list[Id]


class Mooncake(TraceFormat):
    """Reads Mooncake JSONL."""

    name = "mooncake"
    settings: ClassVar[type[Settings]] = MooncakeSettings

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        line = head.split(b"\n", 1)[0]
        return b'"input_length"' in line and b'"hash_ids": [' in line.replace(b":[", b": [")

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        chosen = cast("MooncakeSettings", settings)
        decode = msgspec.json.Decoder(_Line).decode
        is_chained = chosen.ids == "chained"
        builder = TraceBuilder(source.path.name, chosen.block_tokens, chained=is_chained)
        for number, line in lines(source.path, source.problems):
            try:
                entry = decode(line)
                builder.add(
                    round(entry.timestamp * 1e6),
                    np.array(entry.hash_ids, dtype=np.int64),
                    input_tokens=entry.input_length,
                    output_tokens=entry.output_length,
                )
            except BAD_LINE as error:
                source.problems.add(source.path.name, number, str(error))
        if not len(builder):
            raise ConfigError(f"{source.path}: no request in it that {self.name} can be")
        made = ("blocks of content, chained in the order of the request",)
        return builder.build(
            source.facts(self.name, chosen.words(), synthesised=() if is_chained else made)
        )
