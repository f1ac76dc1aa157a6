"""The worker's side: moves whole blocks between the engine's cache and this rank's stores.

Loads are in `loading`. What did not arrive is told by its places and computed again; nothing is
ever written to a place after it was told, and nothing that was computed on it is saved. Saves are
in `saving`. After a step it tells the scheduler what its store has (`report`).

The engine's cache is bytes here: `(blocks, bytes of a block)` for each layer, on any device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from tierkv.core.errors import GeometryMismatch
from tierkv.engines.vllm.loading import GroupCache, Loaded, LoadsBeside, StepLoad
from tierkv.engines.vllm.mirror import Report, changes_of
from tierkv.engines.vllm.saving import Saver
from tierkv.engines.vllm.side_stream import SideStream
from tierkv.engines.vllm.step import Step, Wish
from tierkv.store import Hint, Store

logger = logging.getLogger(__name__)

#: An engine that has nothing to compute steps on and on, and would keep the loader from its core.
_IDLE_S: Final = 5e-3
#: How much of a rate a new measurement is.
_NEW: Final = 0.25
#: Loads and steps of less say nothing of a rate.
_BYTES_MIN: Final = 8 << 20
_TOKENS_MIN: Final = 128


class WorkerSide:
    """See the module. Its methods are called by the worker's thread."""

    def __init__(self, stores: Mapping[Store, Sequence[str] | None], *, rank: int = 0) -> None:
        """`stores` have the names of their group's layers; None: all."""
        self._stores = dict(stores)
        self._rank = rank
        self._caches: list[GroupCache] = []
        self._numbers: dict[str, int] = {}
        self._loading: StepLoad | None = None
        self._pool = ThreadPoolExecutor(1, "tierkv-load")
        self._beside: LoadsBeside | None = None
        self._saver: Saver | None = None
        self._stream: SideStream | None = None
        self._under_way: set[str] = set()
        self._not_loaded: set[int] = set()
        self._failed_steps = 0
        self._rates = {"memory": 0.0, "disk": 0.0, "prefill": 0.0}
        self._began = self._waited = 0.0
        self._counted_bytes = 0
        #: For `stats`; they start again whenever they are taken.
        self.counters: dict[str, float] = {}

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """The engine's cache, a tensor for each layer in the order of layers."""
        self._caches = [
            GroupCache(store, layers_of(store, caches, caches if names is None else names))
            for store, names in self._stores.items()
        ]
        self._numbers = {name: number for number, name in enumerate(caches)}
        device = self._caches[0].layers[0].device
        self._stream = SideStream(device)
        self._beside = LoadsBeside(self._caches, SideStream(device))
        self._saver = Saver(self._caches, SideStream(device))

    def start(self) -> None:
        """A step's time begins."""
        self._began, self._waited = time.perf_counter(), 0.0

    def begin(self, step: Step) -> None:
        """Start the loads of a step, and those beside it."""
        if step.clears:
            for store in self._stores:
                store.clear()
        if step.loads:
            assert self._stream is not None, "there is no cache yet"
            self._loading = StepLoad(self._caches[0], step.loads, self._stream)
            self._pool.submit(self._loading.run)
        for parts in step.async_loads:
            assert self._beside is not None, "there is no cache yet"
            self._under_way.add(parts[0].request)
            self._beside.submit(parts)

    def wait_for_layer(self, name: str) -> None:
        """Return when a layer holds what the step loads, as far as that arrived.

        It has no deadline but the store's: a step that went on before would compute on bytes that
        arrive later, and save what it computed.
        """
        if self._loading is not None:
            start = time.perf_counter()
            self._loading.wait_for(self._numbers[name])
            self._waited += time.perf_counter() - start

    def end(self) -> None:
        """The step has ended: note what its loads did not bring."""
        loading, self._loading = self._loading, None
        if loading is not None:
            loaded = loading.result()
            self._note(loaded, is_cold=False)
            self._failed_steps += bool(loaded.not_loaded)

    def save(self, step: Step) -> None:
        """Save what the step computed; nothing of a step that may have computed on what is missing.

        That is the step itself, and those that were made before the scheduler heard of it.
        """
        saver = self._saver
        assert saver is not None, "there is no cache yet"
        if step.failed_steps == self._failed_steps:
            start = time.perf_counter()
            for blocks in step.saves:
                try:
                    saver.submit(blocks)
                except Exception:  # whatever it was, it is no reason to stop an engine
                    logger.exception("not saved request=%s", blocks.request)
            if step.saves:
                self._count("save_seconds", time.perf_counter() - start)
        saver.end_of(step.number, tokens=step.tokens, began=self._began + self._waited)
        for store in self._stores:
            for wish in step.wishes:
                store.hint(_hint(wish))
            for keys in step.used:
                store.touch(keys)
            store.step()

    def arrived(self, step: Step) -> tuple[set[str], set[str]]:
        """Requests whose loads beside the steps have ended since this was last asked, and of these
        those that have to be computed: with several groups a request is loaded whole, or not.

        A step that computes nothing may wait a little, as nothing else is to be done.
        """
        assert self._beside is not None, "there is no cache yet"
        assert self._saver is not None, "there is no cache yet"
        wait_s = 0.0 if step.tokens else _IDLE_S
        if not self._under_way:
            self._saver.done(wait_s=wait_s)
            return set(), set()
        ended = self._beside.arrived(wait_s=wait_s)
        failed = set()
        for name, (parts, loaded) in ended.items():
            if loaded.not_loaded and len(self._caches) > 1:
                failed.add(name)
                loaded.not_loaded = []
            self._note(loaded, is_cold=parts[0].is_cold)
        self._under_way -= ended.keys()
        return set(ended), failed

    def not_loaded(self) -> set[int]:
        """Places that hold nothing, since this was last asked."""
        places, self._not_loaded = self._not_loaded, set()
        return places

    def report(self) -> Report:
        """What the store has now that it had not, and how fast it is."""
        saved_step = 0
        if self._saver is not None:
            # Before the changes are asked for, or they would lack what was put meanwhile.
            saved_step = self._saver.done()
            self._count("saved_bytes", self._saver.saved_bytes - self._counted_bytes)
            self._counted_bytes = self._saver.saved_bytes
            computed, self._saver.computed = self._saver.computed, None
            if computed is not None and computed[0] >= _TOKENS_MIN:
                self._measure("prefill", *computed)
        return Report(
            self._rank,
            [changes_of(store.changes()) for store in self._stores],
            saved_step,
            self._failed_steps,
            self._rates["memory"],
            self._rates["disk"],
            self._rates["prefill"],
        )

    def close(self) -> None:
        """Let what is under way end, and make the stores durable."""
        self._pool.shutdown()
        if self._beside is not None and self._saver is not None:
            self._beside.close()
            self._saver.close()
        self._caches = []
        for store in self._stores:
            store.close()

    def _note(self, loaded: Loaded, *, is_cold: bool) -> None:
        self._not_loaded.update(loaded.not_loaded)
        self._count("loaded_bytes", loaded.loaded_bytes)
        self._count("load_seconds", loaded.seconds)
        if loaded.loaded_bytes >= _BYTES_MIN:
            self._measure("disk" if is_cold else "memory", loaded.loaded_bytes, loaded.seconds)

    def _measure(self, name: str, amount: float, seconds: float) -> None:
        rate = amount / max(seconds, 1e-9)
        before = self._rates[name] or rate
        self._rates[name] = before + _NEW * (rate - before)

    def _count(self, name: str, amount: float) -> None:
        if amount:
            self.counters[name] = self.counters.get(name, 0) + amount


def _hint(wish: Wish) -> Hint:
    at_ns = time.monotonic_ns() + int(wish.in_s * 1e9) if wish.in_s else 0
    return Hint(wish.kind, list(wish.keys), at_ns=at_ns)


def layers_of(
    store: Store, caches: Mapping[str, torch.Tensor], names: Iterable[str]
) -> list[torch.Tensor]:
    """A group's layers as bytes. GeometryMismatch if they are not what the store is for."""
    layers = [bytes_of(name, caches[name]) for name in names]
    wanted = (store.plan.layers, store.plan.block_layer_bytes)
    found = (len(layers), layers[0].shape[1])
    if found != wanted:
        raise GeometryMismatch(f"the engine's cache is {found} layers and bytes, not {wanted}")
    return layers


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
