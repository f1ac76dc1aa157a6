"""What vLLM calls: its words on one side, ours on the other. See the package."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from tierkv.engines.vllm.scheduler import SchedulerSide
from tierkv.engines.vllm.shared import release_shared, shared_store
from tierkv.engines.vllm.step import Step
from tierkv.engines.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """A step's loads and saves, from the scheduler to the worker."""

    step: Step = field(default_factory=Step)


class TierKVConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """A connector of one role: the scheduler's or the worker's."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._store = shared_store(vllm_config, kv_cache_config)
        self._is_closed = False
        is_scheduler = role == KVConnectorRole.SCHEDULER
        size = self._store.plan.block_tokens
        self._scheduler = SchedulerSide(self._store, block_tokens=size) if is_scheduler else None
        self._worker = None if is_scheduler else WorkerSide(self._store)
        if is_scheduler and self._kv_transfer_config.kv_load_failure_policy != "recompute":
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

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How much more of a request can be loaded; asks no disk."""
        return self.scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """A request has its blocks."""
        self.scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """What the worker is to do in this step."""
        side, tokens = self.scheduler, scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            side.scheduled(
                new.req_id, new.block_ids[0], new.num_computed_tokens, tokens[new.req_id]
            )
        cached = scheduler_output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            added = cached.new_block_ids[number]
            places = [] if name in cached.resumed_req_ids else side.places_of(name)
            if added:
                places = [*places, *added[0]]
            side.scheduled(name, places, cached.num_computed_tokens[number], tokens[name])
        return StepMetadata(side.step(is_idle=not scheduler_output.total_num_scheduled_tokens))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the worker said of a step."""
        if connector_output.invalid_block_ids:
            self.scheduler.failed()

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; its blocks may be given to others at once."""
        self.scheduler.finished(request.request_id)
        return False, None

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
        """Copy what was computed to host memory; the disk is written behind."""
        self.worker.end()
        self.worker.save(self._step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Which loads beside the steps have ended; saves never outlive a step."""
        return None, self.worker.arrived(is_idle=self._step().is_idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Which blocks the engine has to compute."""
        return self.worker.not_loaded()

    def shutdown(self) -> None:
        """Give the store back; the last one makes it durable."""
        if self._worker is not None:
            self._worker.close()
        if not self._is_closed:
            self._is_closed = True
            release_shared(self._store)
