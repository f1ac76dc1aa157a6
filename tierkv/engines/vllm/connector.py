"""What vLLM calls: its words on one side, ours on the other. See the package."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_offload.base import Medium
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from tierkv.engines.vllm.mirror import DISK, Report
from tierkv.engines.vllm.opening import (
    block_bytes_of,
    check_served,
    has_windows,
    open_stores,
)
from tierkv.engines.vllm.scheduler import SchedulerSide
from tierkv.engines.vllm.stats import TierKVMetrics, TierKVStats
from tierkv.engines.vllm.step import Step
from tierkv.engines.vllm.wishes import wishes_of
from tierkv.engines.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """A step's loads and saves, from the scheduler to the workers."""

    step: Step = field(default_factory=Step)


@dataclass
class Told(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What ranks tell the scheduler after a step."""

    reports: list[Report]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Told:
        """What both tell."""
        assert isinstance(other, Told)
        return Told(self.reports + other.reports)


@dataclass
class Inventory(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a rank has found on its disk, before the first step."""

    report: Report


class TierKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """A connector of one role: the scheduler's or a worker's."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        check_served(vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        parallel = vllm_config.parallel_config
        if role != KVConnectorRole.SCHEDULER:
            rank = parallel.rank % parallel.world_size
            self._worker = WorkerSide(open_stores(vllm_config, kv_cache_config), rank=rank)
            return
        self._block_tokens = vllm_config.cache_config.block_size
        self._scheduler = SchedulerSide(
            block_tokens=self._block_tokens,
            block_bytes=block_bytes_of(kv_cache_config),
            ranks=parallel.world_size,
            groups=len(kv_cache_config.kv_cache_groups),
            has_windows=has_windows(kv_cache_config),
        )
        told = vllm_config.kv_events_config
        self._events: list[KVCacheEvent] | None = (
            [] if told is not None and told.enable_kv_cache_events else None
        )
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            logger.warning(
                "a block that cannot be loaded will fail its request; cure: "
                '"kv_load_failure_policy": "recompute"'
            )

    # ---- the scheduler

    @property
    def scheduler(self) -> SchedulerSide:
        """The scheduler's side."""
        assert self._scheduler is not None, "this connector is a worker's"
        return self._scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """What each rank has found, before the first request."""
        for inventory in metadata.values():
            assert isinstance(inventory, Inventory)
            self._told([inventory.report])

    def on_new_request(self, request: Request) -> None:
        """A request has come, maybe with wishes."""
        hints = request.kv_hints
        actions = hints.actions if hints is not None else ()
        self.scheduler.arrived(request, wishes_of(request.kv_transfer_params, actions))

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How much more of a request can be loaded; asks no disk."""
        return self.scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """A request has its blocks."""
        self.scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """How many of these tokens come from memory, and how many from disk."""
        memory, disk = self.scheduler.sources(request)
        found = {CacheHitSource.HOST: memory, CacheHitSource.DISK: disk}
        return {source: tokens for source, tokens in found.items() if tokens}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """What the workers are to do in this step."""
        side, tokens = self.scheduler, scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            side.scheduled(
                new.req_id, new.block_ids, new.num_computed_tokens, tokens[new.req_id], is_all=True
            )
        cached = scheduler_output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            side.scheduled(
                name,
                cached.new_block_ids[number],
                cached.num_computed_tokens[number],
                tokens[name],
                is_all=name in cached.resumed_req_ids,
            )
        return StepMetadata(side.step())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers said of a step."""
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, Told):
            self._told(told.reports)
        if connector_output.invalid_block_ids:
            self.scheduler.failed(connector_output.invalid_block_ids)
        if connector_output.failed_recving:
            self.scheduler.failed_requests(connector_output.failed_recving)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; its blocks may be given to others at once."""
        self.scheduler.finished(request.request_id)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether the engine is to step on, though nothing is asked, to hear what was saved."""
        return self._scheduler is not None and self._scheduler.is_saving

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, of a model whose layers are in groups."""
        self.scheduler.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Forget all that is stored."""
        self.scheduler.clear()
        return True

    def take_events(self) -> Iterable[KVCacheEvent]:
        """What has come into the store and left it, where events are on."""
        events, self._events = self._events, None if self._events is None else []
        return events or ()

    def _told(self, reports: list[Report]) -> None:
        self.scheduler.told(reports)
        for report in reports:
            if self._events is not None and not report.rank:
                self._events += events_of(report, self._block_tokens)

    # ---- the worker

    @property
    def worker(self) -> WorkerSide:
        """The worker's side."""
        assert self._worker is not None, "this connector is the scheduler's"
        return self._worker

    def _step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.step

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The engine's cache."""
        self.worker.register(kv_caches)

    def get_handshake_metadata(self) -> Inventory:
        """What the disk held, for the scheduler."""
        return Inventory(self.worker.report())

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        self.worker.start()

    def start_load_kv(self, forward_context: object, **_: object) -> None:
        """Start this step's loads."""
        self.worker.begin(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait until one layer is loaded."""
        self.worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: object, **_: object
    ) -> None:
        """Blocks are saved whole, in `wait_for_save`."""

    def wait_for_save(self) -> None:
        """Save what was computed, behind the step."""
        self.worker.end()
        self.worker.save(self._step())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Which loads beside the steps have ended; nobody waits for saves."""
        ended, failed = self.worker.arrived(self._step())
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Which blocks the engine has to compute."""
        return self.worker.not_loaded()

    def build_connector_worker_meta(self) -> Told:
        """What this rank has now that it had not."""
        return Told([self.worker.report()])

    # ---- both

    def get_kv_connector_stats(self) -> TierKVStats | None:
        """What was counted since the last look."""
        side: SchedulerSide | WorkerSide = self._scheduler or self.worker
        counters, side.counters = side.counters, {}
        return TierKVStats(data=counters) if counters else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TierKVStats:
        """Counters that came from another process."""
        return TierKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TierKVMetrics:
        """The counters as vLLM's metrics."""
        return TierKVMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Make what is stored durable, and let it go."""
        if self._worker is not None:
            self._worker.close()


def events_of(report: Report, block_tokens: int) -> list[KVCacheEvent]:
    """A report's first group as vLLM's events: of a block its hash and tier are known here."""
    events: list[KVCacheEvent] = []
    by_tier: dict[int, list[Any]] = {}
    for key, tier in (report.changes[0] or {}).items():
        by_tier.setdefault(tier, []).append(maybe_convert_block_hash(key))
    for tier, hashes in by_tier.items():
        if not tier:
            events.append(BlockRemoved(block_hashes=hashes, medium=None))
            continue
        medium = Medium.STORAGE if tier == DISK else Medium.CPU
        events.append(
            BlockStored(
                block_hashes=hashes,
                parent_block_hash=None,
                token_ids=[],
                block_size=block_tokens,
                lora_id=None,
                lora_name=None,
                medium=medium.value,
            )
        )
    return events
