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
        "ragpulse": "tierkv.sim.formats.ragpulse:RagPulse",
        "azure": "tierkv.sim.formats.azure:Azure",
        "burstgpt": "tierkv.sim.formats.burstgpt:BurstGpt",
        "lmcache": "tierkv.sim.formats.lmcache:LMCache",
        "vllm": "tierkv.sim.formats.vllm:VLLM",
        "sglang": "tierkv.sim.formats.sglang:SGLang",
        "tierkv": "tierkv.sim.formats.tierkv:EventLog",
        "agents": "tierkv.sim.formats.agents:Agents",
    },
)
