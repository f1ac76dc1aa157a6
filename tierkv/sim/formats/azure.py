"""Azure's inference traces: CSV with the time and the lengths of each request.

Columns `TIMESTAMP, ContextTokens, GeneratedTokens` (github.com/Azure/AzurePublicDataset, 2023 and
2024). Blocks are made up; see `lengths.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final, cast

from tierkv.core.errors import ConfigError
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.formats.lengths import LengthModel, LengthSettings
from tierkv.sim.settings import Settings
from tierkv.sim.source import BAD_LINE, lines
from tierkv.sim.trace import Trace

_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Azure(TraceFormat):
    """Reads Azure's CSV."""

    name = "azure"
    settings: ClassVar[type[Settings]] = LengthSettings

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        return b"ContextTokens" in head.split(b"\n", 1)[0]

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        model = LengthModel(source.path.name, cast("LengthSettings", settings))
        for number, row in table(source, _COLUMNS):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"])
                at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
                model.add(
                    round(at.timestamp() * 1e6) * 1000,
                    whole_number(row["ContextTokens"]),
                    whole_number(row["GeneratedTokens"]),
                )
            except BAD_LINE as error:
                source.problems.add(source.path.name, number, str(error))
        if not len(model):
            raise ConfigError(f"{source.path}: no request in it that {self.name} can be")
        return model.build(source, self.name)


def table(source: TraceSource, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows by column, with their line. Raises ConfigError if a column is not there."""
    names: list[str] | None = None
    for number, line in lines(source.path, source.problems):
        try:
            values = next(csv.reader([line.decode("utf-8-sig")]))
        except (UnicodeDecodeError, csv.Error) as error:
            source.problems.add(source.path.name, number, str(error))
            continue
        if names is None:
            names = [value.strip() for value in values]
            missing = [column for column in columns if column not in names]
            if missing:
                raise ConfigError(f"{source.path}:{number}: no column {', '.join(missing)}")
        elif len(values) != len(names):
            reason = f"{len(values)} values for {len(names)} columns"
            source.problems.add(source.path.name, number, reason)
        else:
            yield number, dict(zip(names, values, strict=True))


def whole_number(text: str) -> int:
    """A count as a table has it; also `12.0`. Raises ValueError for anything else."""
    value = float(text)
    if not value.is_integer() or abs(value) > 1 << 53:
        raise ValueError(f"{text[:40]!r} is no whole number")
    return int(value)
