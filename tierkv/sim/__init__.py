"""The offline simulator: traces of requests, and what caches of several tiers make of them."""

from __future__ import annotations

from tierkv.sim.opening import open_trace
from tierkv.sim.trace import Stop, Trace, TraceBuilder, TraceFacts
from tierkv.sim.writing import write_trace

__all__ = ["Stop", "Trace", "TraceBuilder", "TraceFacts", "open_trace", "write_trace"]
