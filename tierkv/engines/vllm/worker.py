"""The worker's side: moves whole blocks between the engine's cache and the store.

Loads of a step run on a thread of their own, layer by layer, so that the first layer computes while
the last one is still being copied; `wait_for_layer` waits for its layer only. Loads beside the
steps run on another. What did not arrive is told by its places and computed again; nothing is ever
written to a place after it was told, and nothing that was computed on it is saved. Saves copy into
host memory before the step ends, as the engine may then write to the places again; the disk is
written behind.

The engine's cache is bytes here: `(blocks, bytes of a block)` for each layer, on any device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final

import torch

from tierkv.core.errors import GeometryMismatch
from tierkv.engines.vllm.step import Blocks, Step
from tierkv.store import Lease, Match, Store

logger = logging.getLogger(__name__)

#: An engine that has nothing to compute steps on and on, and would keep the loader from its core.
_IDLE_S: Final = 5e-3


class WorkerSide:
    """See the module. Its methods are called by the worker's thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._layers: list[torch.Tensor] = []
        self._numbers: dict[str, int] = {}
        self._loading: _Loading | None = None
        self._pool = ThreadPoolExecutor(1, "tierkv-load")
        self._beside = ThreadPoolExecutor(1, "tierkv-load-beside")
        self._under_way: dict[str, Future[list[int]]] = {}
        self._not_loaded: set[int] = set()
        self._failures = 0
        self.saved_blocks = 0

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """The engine's cache, a tensor for each layer in the order of layers."""
        self._layers = [bytes_of(name, cache) for name, cache in caches.items()]
        self._numbers = {name: number for number, name in enumerate(caches)}
        plan = self._store.plan
        wanted = (plan.layers, plan.block_layer_bytes)
        found = (len(self._layers), self._layers[0].shape[1])
        if found != wanted:
            raise GeometryMismatch(f"the engine's cache is {found} layers and bytes, not {wanted}")

    def begin(self, step: Step) -> None:
        """Start the loads of a step, and those beside it."""
        if step.loads:
            self._loading = _Loading(self._store, self._layers, step.loads)
            self._pool.submit(self._loading.run)
        for blocks in step.async_loads:
            loading = _Loading(self._store, self._layers, [blocks])
            self._under_way[blocks.request] = self._beside.submit(loading.run)

    def wait_for_layer(self, name: str) -> None:
        """Return when a layer holds what the step loads, as far as that arrived.

        It has no deadline but the store's: a step that went on before would compute on bytes that
        arrive later, and save what it computed.
        """
        if self._loading is not None:
            self._loading.done[self._numbers[name]].wait()

    def save(self, step: Step) -> None:
        """Put what the step computed; nothing of a step that may have computed on what is missing.

        That is the step itself, and those that were made before the scheduler heard of it.
        """
        if self._not_loaded or step.failures != self._failures:
            return
        for blocks in step.saves:
            try:
                self.saved_blocks += self._put(blocks)
            except Exception:  # whatever it was, it is no reason to stop an engine
                logger.exception("not saved request=%s", blocks.request)

    def end(self) -> None:
        """The step has ended: note what its loads did not bring."""
        loading, self._loading = self._loading, None
        if loading is not None:
            self._note(loading.result())

    def arrived(self, *, is_idle: bool) -> set[str]:
        """Requests whose loads beside the steps have ended since this was last asked.

        `is_idle`: it may wait a little, as nothing else is to be done.
        """
        if is_idle and self._under_way:
            wait(self._under_way.values(), _IDLE_S, FIRST_COMPLETED)
        ended = {name for name, future in self._under_way.items() if future.done()}
        for name in ended:
            self._note(self._under_way.pop(name).result())
        return ended

    def not_loaded(self) -> set[int]:
        """Places that hold nothing, since this was last asked."""
        places, self._not_loaded = self._not_loaded, set()
        self._failures += bool(places)
        return places

    def close(self) -> None:
        """Let what is under way end."""
        self._pool.shutdown()
        self._beside.shutdown()
        self._layers = []

    def _note(self, places: list[int]) -> None:
        self._not_loaded.update(places)

    def _put(self, blocks: Blocks) -> int:
        """Put those of some blocks that are not stored yet; how many were offered."""
        known = max(blocks.first, self._store.match_keys(blocks.keys).blocks)
        places = blocks.places[known - blocks.first :]
        if not places:
            return 0
        index = torch.tensor(places, device=self._layers[0].device)
        rows = torch.stack([layer.index_select(0, index) for layer in self._layers])
        self._store.put_keys(blocks.keys, rows, first_block=known)
        return len(places)


class _Loading:
    """Some loads that go on together; `done` has an event for each layer."""

    def __init__(self, store: Store, layers: list[torch.Tensor], loads: Sequence[Blocks]) -> None:
        self._store = store
        self._layers = layers
        self._loads = loads
        self.done = [threading.Event() for _ in layers]
        self._not_loaded: list[int] = []

    def run(self) -> list[int]:
        """Load; gives the places that hold nothing."""
        leases: list[tuple[Blocks, Lease]] = []
        try:
            for blocks in self._loads:
                match = Match(blocks.keys, self._store.plan.block_tokens, "default", {})
                lease = self._store.lease(match, first_block=blocks.first)
                leases.append((blocks, lease))
                self._not_loaded += blocks.places[lease.blocks :]
            for number, layer in enumerate(self._layers):
                for blocks, lease in leases:
                    _fill(layer, blocks.places, lease.layer(number))
                self.done[number].set()
        except Exception:  # whatever it was, these blocks are computed
            logger.exception("not loaded requests=%s", [blocks.request for blocks in self._loads])
            self._not_loaded = [place for blocks in self._loads for place in blocks.places]
        finally:
            for _, lease in leases:
                lease.release()
            for event in self.done:
                event.set()
        return self._not_loaded

    def result(self) -> list[int]:
        """As `run` gave, when it has ended."""
        for event in self.done:
            event.wait()
        return self._not_loaded


def bytes_of(name: str, cache: torch.Tensor) -> torch.Tensor:
    """A layer's cache as uint8 (blocks, bytes of a block), the same memory."""
    if cache.dim() < 2 or not cache[0].is_contiguous():
        raise GeometryMismatch(
            f"{name}: a block of the engine's cache is not one run of bytes, its shape is "
            f"{tuple(cache.shape)} and its strides {cache.stride()}"
        )
    blocks = cache.view(torch.uint8) if cache.dtype != torch.uint8 else cache
    return blocks.as_strided(
        (blocks.shape[0], blocks[0].numel()), (blocks.stride(0), 1), blocks.storage_offset()
    )


def _fill(layer: torch.Tensor, places: Sequence[int], views: Sequence[object]) -> None:
    at = 0
    for view in views:
        source = torch.from_numpy(view)
        index = torch.tensor(places[at : at + len(source)], device=layer.device)
        layer.index_copy_(0, index, source.to(layer.device))
        at += len(source)
