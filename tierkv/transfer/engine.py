"""Transfer engine: one batch per transfer, cut into jobs for the lane of its link.

`submit` returns at once. When the last job of a batch ends, its result waits for `poll`, which the
store feeds to the planner; `wait` sleeps until something can be polled. There is one result per
batch, never per page: a hop between threads costs more than a small page.

A batch whose deadline passed, or that was cancelled, ends as cancelled as far as it had not begun.
An exception of a tier ends at the lane: it becomes "these pages did not arrive". Any thread.

Lanes: `read` and `write` move pages from and to the cold tier, `check` verifies what was read,
`device` copies blocks between device and host; on CUDA it starts copies and kernels and asks for
their events, so that nothing waits inside of the driver. Two pieces are read at a time: large
requests fill a disk, and those that end one after the other are verified while the next are under
way.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

import numpy as np

from tierkv.core.errors import TierKVError
from tierkv.core.geometry import MIB, PagePlan
from tierkv.core.stats import Stats
from tierkv.core.tier import Span, TierId
from tierkv.core.transfer import Outcome, Transfer, Urgency
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.host import HostTier
from tierkv.tiers.segments import SegmentTier
from tierkv.transfer.bandwidth import LinkEstimate
from tierkv.transfer.breaker import Breaker
from tierkv.transfer.lane import Follow, Held, Job, Lane, PolledLane, Started
from tierkv.transfer.staging import Staging

logger = logging.getLogger(__name__)

Link = tuple[TierId, TierId]
T = TypeVar("T")

#: More on the way to or from a device only makes what is urgent wait: this is over 1 ms of a link.
_DEVICE_INFLIGHT_BYTES: Final = 128 * MIB

#: What is written while somebody reads is cut smaller: a read waits for the one that is under way.
_BEHIND_PIECE_BYTES: Final = 2 * MIB


class Result(NamedTuple):
    """How a batch ended, per move."""

    transfer: int
    outcomes: list[Outcome]


@dataclass(slots=True)
class _Batch:
    transfer: Transfer
    outcomes: list[Outcome]
    jobs_left: int
    size_bytes: int
    deadline_ns: int | None
    started_ns: int = 0
    cancelled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class TransferEngine:
    """Carries transfers out between the tiers it was given."""

    def __init__(
        self,
        plan: PagePlan,
        host: HostTier,
        *,
        device: DeviceTier | None = None,
        staging: Staging | None = None,
        cold: SegmentTier | None = None,
        threads: int = 8,
        inflight_bytes_max: int = 256 << 20,
        piece_bytes: int = 8 << 20,
        sync_each_write: bool = False,
        zero_freed: bool = False,
        breaker: Breaker | None = None,
    ) -> None:
        self._plan = plan
        self._host = host
        self._device = device
        self._cold = cold
        self._piece_bytes = piece_bytes
        self._sync_each_write = sync_each_write
        self._zero_freed = zero_freed
        self.breaker = breaker or Breaker(TierId.COLD.label)
        self._batches: dict[int, _Batch] = {}
        self._done: deque[Result] = deque()
        #: A lane found no memory for its own bookkeeping: a transfer may never end.
        self.has_failed = False
        self._progress = threading.Condition()
        self._lock = Held(self._progress)
        self.ended = 0
        self.links: dict[Link, LinkEstimate] = {}
        self.stats = Stats()
        self._staging = staging
        self._lanes: dict[str, Lane] = {}
        lanes: dict[str, tuple[int, int]] = {}  # threads, most bytes in flight
        if cold is not None:
            lanes["read"] = (threads, min(inflight_bytes_max, 2 * piece_bytes))
            lanes["write"] = (threads, inflight_bytes_max)
            # Verifying is bound by memory: a thread for each core would only hold up the others.
            lanes["check"] = (max(1, min(4, (os.cpu_count() or 1) // 2)), 0)
        for name, (count, bytes_max) in lanes.items():
            self._lanes[name] = Lane(
                name,
                threads=count,
                inflight_bytes_max=bytes_max,
                on_failure=self._fail,
                behind=self._lanes["read"] if name == "write" else None,
            )
        if device is not None:
            bytes_max = min(inflight_bytes_max, _DEVICE_INFLIGHT_BYTES)
            self._lanes["device"] = PolledLane(
                "device", inflight_bytes_max=bytes_max, on_failure=self._fail
            )

    def submit(self, transfer: Transfer, *, deadline_ns: int | None = None) -> None:
        """Start a transfer; its result comes by `poll`. `deadline_ns` is monotonic time."""
        lane, pieces, unit_bytes = self._cut(transfer)
        batch = _Batch(
            transfer,
            [Outcome.SKIPPED] * len(transfer.moves),
            len(pieces),
            unit_bytes * len(transfer.moves),
            deadline_ns,
        )
        with self._lock:
            self._batches[transfer.id] = batch
        jobs = [
            Job(transfer.id, unit_bytes * len(piece), self._job(batch, piece)) for piece in pieces
        ]
        self._lanes[lane].submit(jobs, transfer.urgency)

    def promote(self, transfer: int, urgency: Urgency) -> None:
        """Somebody waits for a transfer now."""
        batch = self._batches.get(transfer)
        if batch is not None:
            self._lanes[self._lane_of(batch.transfer)].promote(transfer, urgency)

    def cancel(self, transfer: int) -> None:
        """Do not begin what has not begun of a transfer."""
        batch = self._batches.get(transfer)
        if batch is not None:
            batch.cancelled = True

    @property
    def has_results(self) -> bool:
        """Whether `poll` would give something; needs no lock."""
        return bool(self._done)

    def poll(self) -> list[Result]:
        """Results that have come in, oldest first."""
        results: list[Result] = []
        while self._done:
            results.append(self._done.popleft())
        return results

    def wait(self, timeout_s: float, *, until: Callable[[], bool]) -> bool:
        """Sleep until there is something to poll or `until()`; False if the time ran out first."""
        with self._lock:
            try:
                return self._progress.wait_for(
                    lambda: bool(self._done) or self.has_failed or until(), max(0.0, timeout_s)
                )
            except RuntimeError as error:  # what a condition raises that cannot allocate its lock
                raise MemoryError("no memory to wait for a transfer") from error

    def wake(self) -> None:
        """Let waiting threads look again: results were taken in by another thread."""
        with self._lock:
            self._progress.notify_all()

    @property
    def busy(self) -> int:
        """Transfers that have not ended."""
        return len(self._batches)

    def route_bytes(self) -> dict[str, int]:
        """Bytes that crossed the link to the device, by route; empty where there is no ring."""
        moved = {} if self._staging is None else self._staging.moved_bytes
        return {route.name.lower(): count for route, count in moved.items()}

    def close(self) -> None:
        """Let everything queued end, then join the threads."""
        for lane in self._lanes.values():
            lane.close()
        self._staging = None  # it holds views of both memories

    # ---- the work

    def _cut(self, transfer: Transfer) -> tuple[str, Sequence[Sequence[int]], int]:
        """The lane, the pieces (positions in `moves`), and the bytes of one move."""
        lane = self._lane_of(transfer)
        if lane == "device":
            return lane, [range(len(transfer.moves))], self._plan.block_bytes
        assert self._cold is not None
        page_bytes = self._plan.warm_page_bytes
        reads = transfer.source is TierId.COLD
        pages = [move.source if reads else move.target for move in transfer.moves]
        piece_bytes = self._piece_bytes
        if not reads and self._lanes["read"].is_busy:
            piece_bytes = min(piece_bytes, _BEHIND_PIECE_BYTES)
        pieces = self._cold.pieces(pages, max(piece_bytes, page_bytes))
        return lane, _staggered(pieces) if reads else pieces, page_bytes

    def _lane_of(self, transfer: Transfer) -> str:
        if transfer.source is TierId.COLD:
            return "read"
        return "write" if transfer.target is TierId.COLD else "device"

    def _job(self, batch: _Batch, piece: Sequence[int]) -> Callable[[], Follow | Started | None]:
        """Carry out one piece; what it gives back settles it, or has another lane verify it."""

        def run() -> Follow | Started | None:
            for page, opening in batch.transfer.fresh:
                self._host.clear(page, opening)
            now = time.monotonic_ns()
            with batch.lock:
                batch.started_ns = batch.started_ns or now
                late = batch.deadline_ns is not None and now > batch.deadline_ns
                begin = not (batch.cancelled or late)
            is_cold = TierId.COLD in (batch.transfer.source, batch.transfer.target)
            # An operation of the cold tier is of a round of its breaker; 0 is of none.
            number = self.breaker.begin() if begin and is_cold else 0
            if not begin or number is None:
                self._finish(batch)
                return None
            if self._staging is not None and self._lane_of(batch.transfer) == "device":
                return self._start(batch, piece, self._staging)
            if not is_cold:
                verify = self._attempt(lambda: self._carry(batch.transfer, piece))
                return lambda: self._settle(batch, piece, verify)
            assert self._cold is not None
            errors = self._cold.io_errors
            verify = self._attempt(lambda: self._carry(batch.transfer, piece))
            seconds = (time.monotonic_ns() - now) / 1e9
            if verify is None or batch.transfer.source is not TierId.COLD:
                self.breaker.end(number, is_good=verify is not None, seconds=seconds)
                return lambda: self._settle(batch, piece, verify)

            def settle() -> None:
                self._settle(batch, piece, verify)
                assert self._cold is not None
                is_good = self._cold.io_errors == errors
                self.breaker.end(number, is_good=is_good, seconds=seconds)

            job = Job(batch.transfer.id, 0, settle)
            return lambda: self._lanes["check"].submit([job], batch.transfer.urgency)

        return run

    def _settle(
        self, batch: _Batch, piece: Sequence[int], verify: Callable[[], list[bool]] | None
    ) -> None:
        arrived = None if verify is None else self._attempt(verify)
        for number, position in enumerate(piece):
            ok = arrived is not None and arrived[number]
            batch.outcomes[position] = Outcome.ARRIVED if ok else Outcome.FAILED
        self._finish(batch)

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """The end of the lane: whatever goes wrong here, the pages did not arrive."""
        try:
            return work()
        except TierKVError as error:
            logger.warning("transfer failed error=%s", error)
        except Exception:
            logger.exception("transfer failed")
        return None

    def _fail(self) -> None:
        """Called by a lane that lost a job: nobody may wait for it."""
        self.has_failed = True
        self.wake()

    def _finish(self, batch: _Batch) -> None:
        with batch.lock:
            batch.jobs_left -= 1
            if batch.jobs_left:
                return
        transfer, outcomes = batch.transfer, batch.outcomes
        if self._zero_freed and transfer.target is TierId.HOST:
            self._zero_unfilled(transfer, outcomes)
        link = (transfer.source, transfer.target)
        arrived = outcomes.count(Outcome.ARRIVED)
        moved = batch.size_bytes // max(1, len(outcomes)) * arrived
        with self._lock:
            if arrived == len(outcomes):
                elapsed = time.monotonic_ns() - batch.started_ns
                self.links.setdefault(link, LinkEstimate()).observe(batch.size_bytes, elapsed)
            self.stats.add("tierkv_bytes_total", moved, transfer.source.label, "read")
            self.stats.add("tierkv_bytes_total", moved, transfer.target.label, "write")
            # In this order, for readers without the lock: who sees the count can poll the result,
            # who sees that nothing is busy sees the count.
            self._done.append(Result(transfer.id, outcomes))
            self.ended += 1
            del self._batches[transfer.id]
            self._progress.notify_all()

    def _zero_unfilled(self, transfer: Transfer, outcomes: Sequence[Outcome]) -> None:
        """Zero the places of what did not arrive: a reader's pin may keep them owned.

        Until the result is polled they are this transfer's.
        """
        size = self._plan.warm_page_blocks
        for move, outcome in zip(transfer.moves, outcomes, strict=True):
            if outcome is Outcome.ARRIVED:
                continue
            if transfer.source is TierId.COLD:
                self._host.zero(move.target, range(size))
            else:
                self._host.zero(move.target // size, (move.target % size,))

    def _carry(self, transfer: Transfer, piece: Sequence[int]) -> Callable[[], list[bool]]:
        """Move the bytes of one piece; the call that comes back tells which may be believed."""
        moves = [transfer.moves[position] for position in piece]
        host = self._host
        if transfer.source is TierId.COLD:
            assert self._cold is not None
            outs = [host.pages[move.target] for move in moves]
            return self._cold.fetch_pages([move.source for move in moves], outs)
        if transfer.target is TierId.COLD:
            assert self._cold is not None
            for move in moves:
                host.zero(move.source, move.unused)
            payloads = [host.pages[move.source] for move in moves]
            labels = [move.label for move in moves if move.label is not None]
            gives_way = self._lanes["read"].is_busy
            pages = [move.target for move in moves]
            self._cold.write_pages(pages, payloads, labels, gives_way=gives_way)
            if self._sync_each_write:
                self._cold.sync()
        else:
            self._copy_blocks(transfer, [(move.source, move.target) for move in moves])
        return lambda: [True] * len(moves)

    def _start(self, batch: _Batch, piece: Sequence[int], staging: Staging) -> Follow | Started:
        """Start a piece between host and device; it is settled when its event is done."""
        transfer = batch.transfer
        device = self._device
        assert device is not None
        moves = [transfer.moves[position] for position in piece]
        ends = np.array([(move.source, move.target) for move in moves], np.int64)
        is_down = transfer.source is TierId.DEVICE
        work = staging.save if is_down else staging.load
        frames, places = ends.T if is_down else ends.T[::-1]
        event = self._attempt(lambda: work(places, frames, after=device.marks()))
        if event is None:
            # What was queued before it failed may still write: nobody else may have those places.
            self._attempt(staging.drain)
            return lambda: self._settle(batch, piece, None)
        arrived = [True] * len(moves)
        return Started(
            event, lambda ok: self._settle(batch, piece, (lambda: arrived) if ok else None)
        )

    def _copy_blocks(self, transfer: Transfer, places: list[tuple[int, int]]) -> None:
        """Between frames in host memory and host places."""
        assert self._device is not None
        plan = self._plan
        size = plan.warm_page_blocks
        stage = np.empty((plan.layers, len(places), plan.block_layer_bytes), np.uint8)
        if transfer.source is TierId.DEVICE:
            frames = [Span(i, source, 0, 1) for i, (source, _) in enumerate(places)]
            rooms = [Span(i, t // size, t % size, 1) for i, (_, t) in enumerate(places)]
            self._device.read(frames, stage)
            self._host.write(rooms, stage)
        else:
            rooms = [Span(i, s // size, s % size, 1) for i, (s, _) in enumerate(places)]
            frames = [Span(i, target, 0, 1) for i, (_, target) in enumerate(places)]
            self._host.read(rooms, stage)
            self._device.write(frames, stage)


def _staggered(pieces: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Read half of the first piece at the start and the other half at the end.

    Requests of one size that start together end together; then the device waits while all are
    verified. One that is shorter sets them apart, and there is less to verify after the last.
    """
    first, *others = pieces
    half = len(first) // 2
    return [first[:half], *others, first[half:]] if half else [first, *others]
