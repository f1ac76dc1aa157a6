"""tierkv's own Parquet: a row for each request, with the columns of `Trace` and a list of blocks.

The head of the JSON lines (`jsonl.py`) is in the file's metadata under `tierkv_trace`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tierkv.core.errors import ConfigError
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.formats.jsonl import VERSION, Head, facts_read
from tierkv.sim.settings import Settings
from tierkv.sim.source import needed
from tierkv.sim.trace import ARRAYS, Stop, Trace, TraceBuilder

_KEY: Final = "tierkv_trace"
_ROWS: Final = tuple(name for name in ARRAYS if name not in ("starts", "blocks", "parents"))


class Parquet(TraceFormat):
    """Reads tierkv's Parquet."""

    name = "parquet"

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        return head.startswith(b"PAR1")

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        path = source.path
        polars = needed("polars")
        try:
            text = polars.read_parquet_metadata(path).get(_KEY)
            frame = polars.read_parquet(path, columns=[*_ROWS, "blocks"])
            columns = {name: _whole_numbers(frame[name].to_numpy()) for name in _ROWS}
            lengths = frame["blocks"].list.len().to_numpy()
            filled = frame["blocks"].filter(frame["blocks"].list.len() > 0)
            blocks = _whole_numbers(filled.explode().to_numpy())
        except (polars.exceptions.PolarsError, OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
        except BaseException as error:
            # A damaged file can make polars panic; that is no Exception, and has no public name.
            if type(error).__name__ != "PanicException":
                raise
            raise ConfigError(f"{path}: damaged: {error}") from None
        if text is None:
            raise ConfigError(f"{path}: a table, but not a trace that tierkv wrote")
        try:
            head = msgspec.json.decode(text, type=Head)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}: {error}") from None
        if head.tierkv_trace != VERSION:
            raise ConfigError(f"{path}: version {head.tierkv_trace}, not {VERSION}")
        starts = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
        builder = TraceBuilder(head.name, head.block_tokens)
        rows = zip(*(columns[name].tolist() for name in _ROWS), strict=True)
        for number, (arrival, *row) in enumerate(rows, 1):
            given, output, session, tenant, stop, pause, busy = row
            try:
                builder.add(
                    arrival,
                    blocks[starts[number - 1] : starts[number]],
                    input_tokens=given,
                    output_tokens=output,
                    session=session,
                    tenant=tenant,
                    stop=Stop(stop),
                    pause_ns=pause,
                    busy_ns=busy,
                )
            except ValueError as error:
                source.problems.add(path.name, number, str(error))
        return builder.build(facts_read(head.facts, source))


def write_parquet(trace: Trace, path: Path) -> None:
    """Write a trace, compressed with zstd."""
    polars = needed("polars")
    # A series of series is one of lists; of arrays of equal length polars would make a matrix.
    blocks = [polars.Series(trace.blocks[low:high]) for low, high in pairwise(trace.starts)]
    columns = {name: getattr(trace, name) for name in _ROWS}
    columns["blocks"] = polars.Series(blocks, dtype=polars.List(polars.Int32))
    head = msgspec.json.encode(Head(VERSION, trace.name, trace.block_tokens, trace.facts))
    polars.DataFrame(columns).write_parquet(
        path, compression="zstd", metadata={_KEY: head.decode()}
    )


def _whole_numbers(values: NDArray[np.generic]) -> NDArray[np.int64]:
    if not len(values):
        return np.empty(0, dtype=np.int64)
    if values.dtype.kind not in "iu":
        raise ValueError("a column that is not of whole numbers, or has gaps")
    return values.astype(np.int64)
