"""`TierKVSecondaryTier`: tierkv's verified, persistent tier under vLLM's own CPU tier.

::

    "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 68719476736,
        "secondary_tiers": [{"type": "TierKVSecondaryTier",
                             "module_path": "tierkv.engines.vllm.secondary_tier",
                             "host": "1GiB", "cold": "512GiB", "directory": "kv"}]}

vLLM decides what is in its CPU tier and copies between it and the device; what it gives to lower
tiers is kept here, and read back with a checksum when it is asked for again, also after a restart.
`host` is a way station here and can be small. On the CPU backend vLLM's own spec copies nothing:
`offloading_spec` does there.

Names are vLLM's block hashes with the number of their group. A layout says what their bytes mean,
as far as vLLM tells a tier: the model and its weights, groups, sizes, parallelism and version. It
does not tell of `--hf-overrides` and `--quantization`: who changes those for the same checkpoint
gives another `revision` as well. A model that is not a directory needs a `revision` for the same
reason: which one was loaded is not told.

A fault of a load is a miss, for its request for good. Threads: see `chunks`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from tierkv.core.errors import ConfigError
from tierkv.core.geometry import Layout, PageTargets
from tierkv.engines.options import config_of
from tierkv.engines.vllm.chunks import Chunks, Rows, chunk_layout
from tierkv.engines.vllm.opening import host_identity
from tierkv.engines.weights import weights_identity
from tierkv.store import Store

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import (
        OffloadingSpec,
        OffloadKey,
        ReqContext,
        ScheduleEndContext,
    )
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
    from vllm.v1.kv_offload.tiering.base import TransferJob

_PLACE = "secondary_tiers"


class TierKVSecondaryTier(SecondaryTierManager):  # type: ignore[misc]
    """See the module. All methods are called by the scheduler's thread."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        *,
        revision: str | None = None,
        **options: Any,  # noqa: ANN401 vLLM passes on what its user wrote
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        config = config_of(options, place=_PLACE, block_tokens=1, more=["revision"])
        layout = layout_of(
            offloading_spec.config,
            chunk_bytes=self.block_size_bytes,
            revision=revision,
            targets=config.pages.targets,
        )
        self._chunks = Chunks(Store.open(config, layout))
        self._rows: Rows | None = np.asarray(primary_kv_view).view(np.uint8)
        self._jobs: dict[int, TransferJob] = {}
        #: What could not be loaded, by living request: it is not promised to it again.
        self._lost: dict[str, set[bytes]] = {}

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a chunk can be loaded; asks no disk."""
        if key in self._lost.get(req_context.req_id, ()):
            return LookupResult.MISS
        return LookupResult.HIT if self._chunks.has(bytes(key)) else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Start storing chunks of the CPU tier, which vLLM keeps in place."""
        names = self._begin(job_metadata)
        self._chunks.save(job_metadata.job_id, names, self._rows_of(job_metadata))

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Start loading chunks into the CPU tier."""
        names = self._begin(job_metadata)
        self._chunks.load(job_metadata.job_id, names, self._rows_of(job_metadata))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """What has ended since this was last asked."""
        results = []
        for ended in self._chunks.ended():
            job = self._jobs.pop(ended.job)
            keys = list(job.keys)
            moved = [key for key, is_moved in zip(keys, ended.moved, strict=True) if is_moved]
            lost = self._lost.get(job.req_context.req_id)
            if ended.is_load and lost is not None:
                lost.update(set(keys) - set(moved))
            results.append(
                JobResult(
                    job_id=ended.job,
                    success=len(moved) == len(keys),
                    successful_keys=moved or None if ended.is_load else None,
                    transfer_time=ended.seconds,
                    transfer_bytes=len(moved) * self.block_size_bytes,
                )
            )
        return results

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Chunks are enough; whole requests are not asked for."""
        self._lost[req_context.req_id] = set()
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Another request may try again what this one could not load."""
        self._lost.pop(req_context.req_id, None)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Once per step."""
        self._chunks.step()

    def drain_jobs(self) -> None:
        """Wait until nothing here touches the CPU tier."""
        self._chunks.drain()

    def shutdown(self) -> None:
        """Make everything durable, and let go of the CPU tier's memory."""
        if self._rows is not None:
            self._chunks.close()
            self._rows = None

    def _begin(self, job: TransferJob) -> list[bytes]:
        self._jobs[job.job_id] = job
        return [bytes(key) for key in job.keys]

    def _rows_of(self, job: TransferJob) -> list[Rows]:
        assert self._rows is not None, "the tier is shut down"
        return [self._rows[int(chunk)] for chunk in job.chunk_ids]


def layout_of(
    config: OffloadingConfig, *, chunk_bytes: int, revision: str | None, targets: PageTargets
) -> Layout:
    """What the bytes of a chunk mean, by all that vLLM tells a tier. Raises ConfigError."""
    name = str(config.model.name)
    place = Path(name)
    if place.is_dir():
        weights = weights_identity(place, more=revision or "")
    elif revision is not None:
        weights = revision
    else:
        raise ConfigError(
            f"{_PLACE}: {name} is no directory, and vLLM does not tell a tier which revision of it "
            'was loaded; cure: "revision": "its commit", or serve a directory'
        )
    parallel = asdict(config.parallel)
    for one_of_several in ("rank", "data_parallel_index", "data_parallel_rank_local"):
        del parallel[one_of_several]
    kind = {
        "chunks": 1,
        "groups": [asdict(group) for group in config.groups],
        "cache": asdict(config.cache),
        "dtype": str(config.model.dtype),
        "parallel": parallel,
        "replicated": config.replicated_layout,
        "canonical": config.canonical_layout,
        "layout": config.kv_cache_layout,
        "host": host_identity(),
    }
    return chunk_layout(
        chunk_bytes,
        targets=targets,
        model=name.rstrip("/").rpartition("/")[2],
        revision=weights,
        engine_layout=json.dumps(kind, sort_keys=True),
    )
