"""Writing traces for others: Parquet, or JSON lines plain or compressed, by the file's name."""

from __future__ import annotations

from pathlib import Path

from tierkv.core.errors import ConfigError
from tierkv.sim.formats.jsonl import write_jsonl
from tierkv.sim.formats.parquet import write_parquet
from tierkv.sim.source import plain_name
from tierkv.sim.trace import Trace


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace in the format that the name asks for, whole or not at all.

    Raises ConfigError for another name, or if it cannot be written.
    """
    if path.suffix == ".parquet":
        write = write_parquet
    elif plain_name(path).endswith(".jsonl"):
        write = write_jsonl
    else:
        raise ConfigError(f"{path}: write .parquet, .jsonl, .jsonl.zst or .jsonl.gz")
    partial = path.with_name(f".tmp-{path.name}")
    try:
        write(trace, partial)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
