"""LMCache's log of lookups: JSON lines with the hashes of each request's chunks.

`timestamp` (s), `model_name`, `chunk_size`, `seq_len` and `chunk_hashes` ("0x…", chained, whole
chunks only), as its subscriber `lookup_hash` writes them (LMCache 0.5,
`lmcache/v1/mp_observability/subscribers/logging/lookup_hash.py`); a directory of
`lookup_hashes_*.jsonl` is one log. A model is a tenant. What was stored or answered is not in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from tierkv.core.errors import ConfigError
from tierkv.sim.chaining import id_of
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.settings import Settings
from tierkv.sim.source import BAD_LINE, lines, plain_name
from tierkv.sim.trace import SECOND_NS, TOKENS_MAX, Trace, TraceBuilder

_Hash = Annotated[str, msgspec.Meta(max_length=256)]


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    chunk_size: Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
    seq_len: Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
    chunk_hashes: list[_Hash]
    model_name: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class LMCache(TraceFormat):
    """Reads LMCache's lookup hashes."""

    name = "lmcache"

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        if path.is_dir():
            return bool(_files(path))
        return b'"chunk_hashes"' in head.split(b"\n", 1)[0]

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        files = _files(source.path) if source.path.is_dir() else [source.path]
        source.files = [file.name for file in files]
        builder: TraceBuilder | None = None
        decode = msgspec.json.Decoder(_Line).decode
        models: dict[str, int] = {}
        chunk_size = 0
        for file in files:
            for number, line in lines(file, source.problems):
                try:
                    entry = decode(line)
                    if builder is None:
                        chunk_size = entry.chunk_size
                        builder = TraceBuilder(source.path.name, chunk_size)
                    if entry.chunk_size != chunk_size:
                        raise ValueError(f"chunks of {entry.chunk_size}, before of {chunk_size}")
                    model = entry.model_name.encode()
                    ids = [id_of(model + b"\0" + text.encode()) for text in entry.chunk_hashes]
                    builder.add(
                        round(entry.timestamp * SECOND_NS),
                        np.array(ids, dtype=np.int64),
                        input_tokens=entry.seq_len,
                        tenant=models.setdefault(entry.model_name, len(models)),
                    )
                except BAD_LINE as error:
                    source.problems.add(file.name, number, str(error))
        if builder is None or not len(builder):
            raise ConfigError(f"{source.path}: no request in it that {self.name} can be")
        return builder.build(source.facts(self.name, settings.words()))


def _files(folder: Path) -> list[Path]:
    found = folder.glob("lookup_hashes_*.jsonl*")
    return sorted(file for file in found if plain_name(file).endswith(".jsonl"))
