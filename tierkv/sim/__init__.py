"""The offline simulator: traces of requests, and what caches of several tiers make of them."""

from __future__ import annotations

from tierkv.sim.costs import Costs
from tierkv.sim.engine import EngineSettings, simulate
from tierkv.sim.opening import open_trace
from tierkv.sim.outcome import Outcome
from tierkv.sim.stack import Tiers
from tierkv.sim.trace import Stop, Trace, TraceBuilder, TraceFacts
from tierkv.sim.writing import write_trace

__all__ = [
    "Costs",
    "EngineSettings",
    "Outcome",
    "Stop",
    "Tiers",
    "Trace",
    "TraceBuilder",
    "TraceFacts",
    "open_trace",
    "simulate",
    "write_trace",
]
