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


@dataclass(slots=True)
class Loaded:
    """How a load went."""

    not_loaded: list[int]
    blocks: int = 0
    seconds: float = 0.0


class StepLoad:
    """The loads of one step; `done` has an event for each layer. Made by the engine's thread."""

    def __init__(
        self,
        store: Store,
        layers: list[torch.Tensor],
        loads: Sequence[Blocks],
        stream: SideStream,
    ) -> None:
        self._store = store
        self._layers = layers
        self._loads = loads
        self._stream = stream
        self._marks: dict[int, Mark] = {}
        self.done = [threading.Event() for _ in layers]
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
                loaded.blocks += lease.blocks
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

    def __init__(self, store: Store, layers: list[torch.Tensor], stream: SideStream) -> None:
        self._store = store
        self._layers = layers
        self._stream = stream
        self._order = itertools.count()
        self._waiting: queue.PriorityQueue[tuple[float, int, Blocks | None]] = queue.PriorityQueue()
        self._arrived: dict[str, tuple[Blocks, Loaded]] = {}
        self._under_way = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tierkv-load-beside", daemon=True)
        self._thread.start()

    def submit(self, blocks: Blocks) -> None:
        """Load some blocks when those that are more urgent are there."""
        with self._changed:
            self._under_way += 1
        self._stream.follow()
        self._waiting.put((blocks.priority, next(self._order), blocks))

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
        while (blocks := self._waiting.get()[2]) is not None:
            loaded = Loaded(list(blocks.places))
            start = time.perf_counter()
            try:
                self._load(blocks, loaded)
            except Exception:  # whatever it was, these blocks are computed
                logger.exception("not loaded request=%s", blocks.request)
                loaded.not_loaded = list(blocks.places)
            loaded.seconds = time.perf_counter() - start
            with self._changed:
                self._arrived[blocks.request] = blocks, loaded
                self._changed.notify_all()

    def _load(self, blocks: Blocks, loaded: Loaded) -> None:
        match = _match(self._store, blocks.keys)
        while loaded.not_loaded:
            with self._store.lease(match, first_block=blocks.first + loaded.blocks) as lease:
                if not lease.blocks:
                    break
                with self._stream.queue():
                    for number, layer in enumerate(self._layers):
                        _fill(layer, loaded.not_loaded, lease.layer(number), self._stream)
                self._stream.mark().wait()  # the lease keeps its pages until they are read
                loaded.blocks += lease.blocks
                del loaded.not_loaded[: lease.blocks]


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
