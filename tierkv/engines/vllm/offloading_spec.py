"""`TierKVOffloadingSpec`: vLLM's own tiers with tierkv beneath them, on a GPU and on the CPU.

::

    "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TierKVOffloadingSpec",
        "spec_module_path": "tierkv.engines.vllm.offloading_spec",
        "cpu_bytes_to_use": 68719476736,
        "tierkv": {"host": "1GiB", "cold": "512GiB", "directory": "kv"}}

It is vLLM's `TieringOffloadingSpec`, and two things more: what stands under `tierkv` becomes a
`TierKVSecondaryTier`, before all other `secondary_tiers`; and on the CPU backend, for which vLLM
has no worker, a worker that copies by memcpy. `cpu_bytes_to_use` may be a size such as "64GiB".
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from tierkv.core.errors import ConfigError
from tierkv.core.units import parse_size

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import (
        BlockIDsLoadStoreSpec,
        CanonicalKVCaches,
        GPULoadStoreSpec,
        OffloadingMetricMetadata,
    )
    from vllm.v1.kv_offload.config import OffloadingConfig

_OURS: Final = "tierkv"
_SIZE: Final = "cpu_bytes_to_use"


class TierKVOffloadingSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """See the module."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """Those of vLLM's tiers, ours among them."""
        found: dict[str, OffloadingMetricMetadata]
        found = super().build_metric_definitions(with_our_tier(extra_config))
        return found

    def __init__(self, config: OffloadingConfig) -> None:
        self._worker: OffloadingWorker | None = None
        super().__init__(replace(config, extra_config=with_our_tier(config.extra_config)))

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """A worker of vLLM where it has one for the device, else ours for caches in memory."""
        if current_platform.is_cuda_alike() or current_platform.is_xpu():
            return super().get_worker(kv_caches)
        if self._worker is None:
            if self.config.canonical_layout:
                raise ConfigError("canonical_layout: not on the CPU; cure: leave it out")
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            try:
                self._worker = MemoryWorker(kv_caches, region, self.blocks_per_chunk)
            except BaseException:
                region.cleanup()
                raise
        return self._worker


def with_our_tier(extra_config: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM's own spec is to read. Raises ConfigError."""
    found = dict(extra_config)
    ours = found.pop(_OURS, None)
    if ours is not None:
        if not isinstance(ours, Mapping):
            raise ConfigError(f'{_OURS}: must be a mapping such as {{"directory": "kv"}}')
        tier = {
            "type": "TierKVSecondaryTier",
            "module_path": "tierkv.engines.vllm.secondary_tier",
            **ours,
        }
        found["secondary_tiers"] = [tier, *found.get("secondary_tiers", [])]
    if _SIZE in found:
        try:
            found[_SIZE] = parse_size(found[_SIZE])
        except ValueError as error:
            raise ConfigError(f"{_SIZE}: {error}") from None
    return found


class MemoryWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies between an engine's cache in memory and vLLM's CPU tier, at once.

    vLLM keeps the blocks of a job in place until the job has ended, so that copying when it is
    submitted is right, and keeps their order. Owns `region`. Single owner: the worker's thread.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int
    ) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._caches: list[torch.Tensor] = []
        self._tiers: list[torch.Tensor] = []
        for cache in kv_caches.tensors:
            size = cache.page_size_bytes
            self._caches.append(cache.tensor.view(torch.int8).view(-1, size))
            view = region.create_next_worker_view(size * blocks_per_chunk)
            # (chunks, blocks of a chunk, bytes): the last two are contiguous.
            self._tiers.append(view.unflatten(1, (blocks_per_chunk, size)))
        self._ended: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec
    ) -> bool:
        """Copy blocks of the cache into chunks."""
        self._copy(job_id, src_spec, dst_spec, is_store=True)
        return True

    def submit_load(
        self, job_id: int, src_spec: BlockIDsLoadStoreSpec, dst_spec: GPULoadStoreSpec
    ) -> bool:
        """Copy chunks into blocks of the cache."""
        self._copy(job_id, dst_spec, src_spec, is_store=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        """All that was submitted since this was last asked."""
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        """Let go of the tier's memory."""
        self._tiers.clear()
        self._caches.clear()
        self._region.cleanup()

    def _copy(
        self, job: int, cache: GPULoadStoreSpec, tier: BlockIDsLoadStoreSpec, *, is_store: bool
    ) -> None:
        begun, copied = time.perf_counter(), 0
        for group, blocks, chunks, inside in self._groups(cache, tier):
            for ref in self._refs[group]:
                size = ref.page_size_bytes
                ours = self._caches[ref.tensor_idx]
                theirs = self._tiers[ref.tensor_idx]
                if is_store:
                    theirs[chunks, inside, :size] = ours[blocks, :size]
                else:
                    ours[blocks, :size] = theirs[chunks, inside, :size]
                copied += len(blocks) * size
        seconds = time.perf_counter() - begun
        self._ended.append(TransferResult(job, True, copied, seconds))

    def _groups(
        self, cache: GPULoadStoreSpec, tier: BlockIDsLoadStoreSpec
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each group: blocks of the cache, their chunks, and which block of its chunk each is.

        The first block of a group may lie within its chunk, and the last one too.
        """
        per_chunk, first_block, first_chunk = self._blocks_per_chunk, 0, 0
        blocks = torch.from_numpy(cache.block_ids).long()
        chunks = torch.from_numpy(tier.block_ids).long()
        for group, size in enumerate(cache.group_sizes):
            if not size:
                continue
            places = torch.arange(size) + cache.block_indices[group] % per_chunk
            ids = chunks[first_chunk + places // per_chunk]
            yield group, blocks[first_block : first_block + size], ids, places % per_chunk
            first_block += size
            first_chunk += int(places[-1]) // per_chunk + 1
        assert first_chunk == len(chunks), "chunks are left over"
