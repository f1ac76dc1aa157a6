"""What the connector counts, for vLLM's log line and its Prometheus metrics.

Every counter is a sum since the last look, of all ranks and the scheduler; as metrics they are
`vllm:tierkv_<name>`, with vLLM's own labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter  # it comes with vLLM
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS: Final = {
    "memory_hit_tokens": "Prompt tokens that were to be loaded from tierkv's host memory.",
    "disk_hit_tokens": "Prompt tokens that were to be loaded from tierkv's disk tier.",
    "declined_tokens": "Stored prompt tokens that are sooner computed than loaded.",
    "failed_blocks": "Blocks that could not be loaded and were computed.",
    "failed_requests": "Requests that could not be loaded and were computed.",
    "hints": "Hints that requests gave.",
    "loaded_bytes": "Bytes loaded to the engine's cache.",
    "load_seconds": "Time that loads took; loads of a step overlap with computing.",
    "saved_bytes": "Bytes saved from the engine's cache.",
    "save_seconds": "Time that steps waited for saves.",
}


class TierKVStats(KVConnectorStats):  # type: ignore[misc]
    """Sums by the names in `COUNTERS`."""

    def reset(self) -> None:
        """Start again."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> TierKVStats:
        """Add another's."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """For a line of the log."""
        return {name: round(amount, 3) for name, amount in self.data.items()}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class TierKVMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """A Prometheus counter for each name."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters = {
            name: create_metric_per_engine(
                counter(name=f"vllm:tierkv_{name}", documentation=says, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, says in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted since the last look."""
        for name, amount in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(amount)
