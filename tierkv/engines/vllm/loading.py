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
from tierkv.engines.vllm.side_stream import Mark, SideStream
from tierkv.engines.vllm.step import Blocks
from tierkv.memory import Bytes
from tierkv.store import Lease, Match, Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GroupCache:
    """A group of layers: its store, and its layers of the engine's cache as (blocks, bytes)."""

    store: Store
    layers: list[torch.Tensor]


@dataclass(slots=True)
class Loaded:
    """How a load went."""

    not_loaded: list[int]
    loaded_bytes: int = 0
    seconds: float = 0.0


class StepLoad:
    """The loads of one step; `done` has an event for each layer. Made by the engine's thread."""

    def __init__(
        self,
        cache: GroupCache,
        loads: Sequence[Blocks],
        stream: SideStream,
    ) -> None:
        self._store = cache.store
        self._layers = cache.layers
        self._loads = loads
        self._stream = stream
        self._marks: dict[int, Mark] = {}
        self.done = [threading.Event() for _ in self._layers]
        stream.follow()
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
                loaded.loaded_bytes += lease.blocks * self._store.plan.block_bytes
            for number, layer in enumerate(self._layers):
                with self._stream.queue():
                    for blocks, lease in leases:
                        _fill(layer, blocks.places, lease.layer(number), self._stream)
                    self._marks[number] = self._stream.mark()
                self.done[number].set()
        except Exception:  # whatever it was, these blocks are computed
            logger.exception("not loaded requests=%s", [blocks.request for blocks in self._loads])
            loaded.not_loaded = [place for blocks in self._loads for place in blocks.places]
        finally:
            self._stream.mark().wait()
            loaded.seconds = time.perf_counter() - start
            for _, lease in leases:
                lease.release()
            for event in self.done:
                event.set()

    def wait_for(self, number: int) -> None:
        """Return when what this thread's stream gets from now on finds the layer loaded."""
        self.done[number].wait()
        if number in self._marks:
            self._marks[number].hold()

    def result(self) -> Loaded:
        """How it went, when it has ended."""
        for event in self.done:
            event.wait()
        return self._loaded


class LoadsBeside:
    """The loads beside the steps: `submit` them, ask which have `arrived`."""

    def __init__(self, caches: Sequence[GroupCache], stream: SideStream) -> None:
        self._caches = caches
        self._stream = stream
        self._order = itertools.count()
        self._waiting: queue.PriorityQueue[tuple[float, int, list[Blocks] | None]] = (
            queue.PriorityQueue()
        )
        self._arrived: dict[str, tuple[list[Blocks], Loaded]] = {}
        self._under_way = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tierkv-load-beside", daemon=True)
        self._thread.start()

    def submit(self, parts: list[Blocks]) -> None:
        """Load a request's blocks in all groups when those that are more urgent are there."""
        with self._changed:
            self._under_way += 1
        self._stream.follow()
        self._waiting.put((parts[0].priority, next(self._order), parts))

    def arrived(self, *, wait_s: float = 0.0) -> dict[str, tuple[list[Blocks], Loaded]]:
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
        while (parts := self._waiting.get()[2]) is not None:
            loaded, start = Loaded([]), time.perf_counter()
            for blocks in parts:
                left = list(blocks.places)
                try:
                    loaded.loaded_bytes += self._load(blocks, left)
                except Exception:  # whatever it was, these blocks are computed
                    logger.exception("not loaded request=%s", blocks.request)
                    left = list(blocks.places)
                loaded.not_loaded += left
            loaded.seconds = time.perf_counter() - start
            with self._changed:
                self._arrived[parts[0].request] = parts, loaded
                self._changed.notify_all()

    def _load(self, blocks: Blocks, left: list[int]) -> int:
        """Take places out of `left` as they are loaded; gives bytes."""
        store, layers = self._caches[blocks.group].store, self._caches[blocks.group].layers
        match, done = _match(store, blocks.keys), 0
        while left:
            with store.lease(match, first_block=blocks.first + done) as lease:
                if not lease.blocks:
                    break
                with self._stream.queue():
                    for number, layer in enumerate(layers):
                        _fill(layer, left, lease.layer(number), self._stream)
                self._stream.mark().wait()  # the lease keeps its pages until they are read
                done += lease.blocks
                del left[: lease.blocks]
        return done * store.plan.block_bytes


def _match(store: Store, keys: list[BlockKey]) -> Match:
    return Match(keys, store.plan.block_tokens, "default", {})


def _fill(
    layer: torch.Tensor, places: Sequence[int], views: Sequence[Bytes], stream: SideStream
) -> None:
    at = 0
    for view in views:
        source = torch.from_numpy(view)
        index = stream.index(places[at : at + len(source)])
        layer.index_copy_(0, index, source.to(layer.device, non_blocking=True))
        at += len(source)
