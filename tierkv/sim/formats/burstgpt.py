"""BurstGPT: CSV with the time, model and lengths of each request.

Columns `Timestamp` (s), `Model`, `Request tokens`, `Response tokens`, and in later versions
`Session ID` and `Elapsed time` (s) (github.com/HPMLL/BurstGPT). A model is a tenant. Requests
without input tokens, which failed, count as bad lines. Blocks are made up; see `lengths.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final, cast

from tierkv.core.errors import ConfigError
from tierkv.sim.formats.azure import table, whole_number
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.formats.lengths import LengthModel, LengthSettings
from tierkv.sim.settings import Settings
from tierkv.sim.trace import SECOND_NS, Trace

_COLUMNS: Final = ("Timestamp", "Model", "Request tokens", "Response tokens")
_SECONDS_MAX: Final = 1e9


class BurstGpt(TraceFormat):
    """Reads BurstGPT's CSV."""

    name = "burstgpt"
    settings: ClassVar[type[Settings]] = LengthSettings

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        return b"Request tokens" in head.split(b"\n", 1)[0]

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        model = LengthModel(source.path.name, cast("LengthSettings", settings))
        for number, row in table(source, _COLUMNS):
            try:
                elapsed = row.get("Elapsed time", "").strip()
                model.add(
                    _seconds_ns(row["Timestamp"]),
                    whole_number(row["Request tokens"]),
                    whole_number(row["Response tokens"]),
                    tenant=row["Model"].strip(),
                    session=row.get("Session ID", "").strip(),
                    busy_ns=_seconds_ns(elapsed) if elapsed else -1,
                )
            except ValueError as error:
                source.problems.add(source.path.name, number, str(error))
        if not len(model):
            raise ConfigError(f"{source.path}: no request in it that {self.name} can be")
        return model.build(source, self.name)


def _seconds_ns(text: str) -> int:
    value = float(text)
    if not 0 <= value <= _SECONDS_MAX:
        raise ValueError(f"{text[:40]!r} is no time in seconds")
    return round(value * SECOND_NS)
