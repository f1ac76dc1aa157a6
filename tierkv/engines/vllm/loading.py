"""Loads: from the store to the places of an engine's cache, whole blocks of bytes.

Those of a step go layer by layer, so that the first layer computes while the last one is still
being copied. Those beside the steps have a thread of their own, which takes the least priority
first, and go window by window: a prompt may be larger than the store's memory. What does not arrive
is told by its places.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tierkv.core.keys import BlockKey
from tierkv.engines.vllm.step import Blocks
from tierkv.memory import Bytes
from tierkv.store import Lease, Match, Store

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Loaded:
    """How a load went."""

    not_loaded: list[int]
    blocks: int = 0
    seconds: float = 0.0


class StepLoad:
    """The loads of one step; `done` has an event for each layer."""

    def __init__(self, store: Store, layers: list[torch.Tensor], loads: Sequence[Blocks]) -> None:
        self._store = store
        self._layers = layers
        self._loads = loads
        self.done = [threading.Event() for _ in layers]
        self._loaded = Loaded([])

    def run(self) -> None:
        """Load."""
        leases: list[tuple[Blocks, Lease]] = []
        loaded, start = self._loaded, time.perf_counter()
        try:
            for blocks in self._loads:
                lease = self._store.lease(
                    _match(self._store, blocks.keys), first_block=blocks.first
                )
                leases.append((blocks, lease))
                loaded.not_loaded += blocks.places[lease.blocks :]
                loaded.blocks += lease.blocks
            for number, layer in enumerate(self._layers):
                for blocks, lease in leases:
                    _fill(layer, blocks.places, lease.layer(number))
                self.done[number].set()
        except Exception:  # whatever it was, these blocks are computed
            logger.exception("not loaded requests=%s", [blocks.request for blocks in self._loads])
            loaded.not_loaded = [place for blocks in self._loads for place in blocks.places]
        finally:
            loaded.seconds = time.perf_counter() - start
            for _, lease in leases:
                lease.release()
            for event in self.done:
                event.set()

    def result(self) -> Loaded:
        """How it went, when it has ended."""
        for event in self.done:
            event.wait()
        return self._loaded


class LoadsBeside:
    """The loads beside the steps: `submit` them, ask which have `arrived`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._order = itertools.count()
        self._waiting: queue.PriorityQueue[tuple[float, int, _Job | None]] = queue.PriorityQueue()
        self._arrived: dict[str, tuple[Blocks, Loaded]] = {}
        self._under_way = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tierkv-load-beside", daemon=True)
        self._thread.start()

    def submit(self, layers: list[torch.Tensor], blocks: Blocks) -> None:
        """Load some blocks when those that are more urgent are there."""
        with self._changed:
            self._under_way += 1
        self._waiting.put((blocks.priority, next(self._order), _Job(layers, blocks)))

    def arrived(self, *, wait_s: float = 0.0) -> dict[str, tuple[Blocks, Loaded]]:
        """What has ended since this was last asked, by request; waits so long for the first."""
        with self._changed:
            if wait_s and self._under_way:
                self._changed.wait_for(lambda: bool(self._arrived), wait_s)
            ended, self._arrived = self._arrived, {}
            self._under_way -= len(ended)
            return ended

    def close(self) -> None:
        """Let what is under way end; what waits is not begun."""
        self._waiting.put((float("-inf"), next(self._order), None))
        self._thread.join()

    def _run(self) -> None:
        while (job := self._waiting.get()[2]) is not None:
            loaded = Loaded(list(job.blocks.places))
            start = time.perf_counter()
            try:
                self._load(job, loaded)
            except Exception:  # whatever it was, these blocks are computed
                logger.exception("not loaded request=%s", job.blocks.request)
                loaded.not_loaded = list(job.blocks.places)
            loaded.seconds = time.perf_counter() - start
            with self._changed:
                self._arrived[job.blocks.request] = job.blocks, loaded
                self._changed.notify_all()

    def _load(self, job: _Job, loaded: Loaded) -> None:
        blocks = job.blocks
        match = _match(self._store, blocks.keys)
        while loaded.not_loaded:
            with self._store.lease(match, first_block=blocks.first + loaded.blocks) as lease:
                if not lease.blocks:
                    break
                for number, layer in enumerate(job.layers):
                    _fill(layer, loaded.not_loaded, lease.layer(number))
                loaded.blocks += lease.blocks
                del loaded.not_loaded[: lease.blocks]


@dataclass(slots=True)
class _Job:
    layers: list[torch.Tensor]
    blocks: Blocks


def _match(store: Store, keys: list[BlockKey]) -> Match:
    return Match(keys, store.plan.block_tokens, "default", {})


def _fill(layer: torch.Tensor, places: Sequence[int], views: Sequence[Bytes]) -> None:
    at = 0
    for view in views:
        source = torch.from_numpy(view)
        index = torch.tensor(places[at : at + len(source)], device=layer.device)
        layer.index_copy_(0, index, source.to(layer.device))
        at += len(source)
