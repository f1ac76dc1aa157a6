"""Formats of traces: one file and one line here for each."""

from __future__ import annotations

from typing import Final

from tierkv.core.registry import Registry

TRACES: Final = Registry(
    "traces",
    {
        "jsonl": "tierkv.sim.formats.jsonl:Jsonl",
        "parquet": "tierkv.sim.formats.parquet:Parquet",
        "mooncake": "tierkv.sim.formats.mooncake:Mooncake",
        "agents": "tierkv.sim.formats.agents:Agents",
    },
)
