"""Live estimate of what a link gives: bytes per second and fixed cost per batch.

A batch of `n` bytes on an otherwise idle link takes about ``latency + n / bandwidth``. Both are
exponentially weighted means over finished batches: large batches teach bandwidth, small ones
latency. Any thread may read; the lane's workers write under the engine's lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.core.geometry import MIB

_WEIGHT = 0.2


@dataclass(slots=True)
class LinkEstimate:
    """One direction between two tiers."""

    bytes_per_second: float = 0.0
    latency_ns: float = 0.0
    batches: int = 0

    def observe(self, size_bytes: int, elapsed_ns: int) -> None:
        """A batch of `size_bytes` took `elapsed_ns` from its start to its end."""
        if elapsed_ns <= 0 or size_bytes <= 0:
            return
        self.batches += 1
        if size_bytes >= MIB or not self.bytes_per_second:
            moving = max(1.0, elapsed_ns - self.latency_ns)
            self.bytes_per_second = self._mean(self.bytes_per_second, size_bytes * 1e9 / moving)
        else:
            fixed = max(0.0, elapsed_ns - size_bytes * 1e9 / self.bytes_per_second)
            self.latency_ns = self._mean(self.latency_ns, fixed)

    def expected_ns(self, size_bytes: int) -> int | None:
        """How long a batch would take; None before anything was seen."""
        if not self.bytes_per_second:
            return None
        return int(self.latency_ns + size_bytes * 1e9 / self.bytes_per_second)

    def _mean(self, old: float, new: float) -> float:
        return new if not old else old + _WEIGHT * (new - old)
