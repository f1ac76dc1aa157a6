"""Reading: from a match to bytes in a caller's array, or to pinned views of them.

A read acquires a **window** of blocks (one cold page's worth), waits for its transfers, copies what
arrived, releases it, and meanwhile has the next window fetched. So a prompt larger than host memory
can be read, and disk and memory work at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from tierkv.core.errors import StoreClosed
from tierkv.core.keys import BlockKey
from tierkv.core.tier import TierId
from tierkv.memory import Bytes, Memory, Rows
from tierkv.plan import events as ev
from tierkv.plan.leases import Located
from tierkv.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Match:
    """The longest stored prefix of some tokens, as it was when asked. Holds nothing in place."""

    keys: list[BlockKey]
    block_tokens: int
    namespace: str
    tokens_by_tier: dict[str, int]

    @property
    def blocks(self) -> int:
        """Whole blocks found."""
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """Tokens found."""
        return len(self.keys) * self.block_tokens


@dataclass(slots=True)
class Held:
    """A planner's lease; `parts` is None while transfers are awaited."""

    lease: int
    count: int
    waits: list[int]
    parts: list[Located] | None


class Reader:
    """Gets and leases. Any thread."""

    def __init__(self, runtime: Runtime, memory: Memory, *, demand_s: float) -> None:
        self.memory = memory
        self._runtime = runtime
        self._demand_s = demand_s
        plan = memory.plan
        self._window = plan.cold_page_warm_pages * plan.warm_page_blocks

    def get(self, match: Match, out: Rows, first_block: int) -> int:
        """See `Store.get`."""
        rows = self.memory.rows_of(out)
        wanted = min(match.blocks - first_block, rows.shape[1])
        deadline = time.monotonic() + self._demand_s
        done = 0
        held = self._acquire_soon(match, first_block, wanted, deadline)
        while held.count:
            at, left = first_block + done + held.count, wanted - done - held.count
            # The next window is fetched from disk while this one is copied.
            ahead = self._acquire(match, at, left) if held.waits and left else None
            try:
                delivered = self._read(held, rows, done, deadline)
            except BaseException:
                self.release(held, ahead)
                raise
            self.release(held)
            done += delivered
            if delivered < held.count or done >= wanted:
                if ahead is not None:
                    self.release(ahead)
                break
            if ahead is None or not ahead.count:
                if ahead is not None:
                    self.release(ahead)
                ahead = self._acquire_soon(match, first_block + done, wanted - done, deadline)
            held = ahead
        else:
            self.release(held)
        if wanted > self._window:
            with self._runtime.lock:
                self._runtime.handle(ev.Touch(list(match.keys)))  # windows went root first
        return done

    def lease(self, match: Match, first_block: int) -> Lease:
        """See `Store.lease`."""
        deadline = time.monotonic() + self._demand_s
        held = self._acquire_soon(
            match, first_block, match.blocks - first_block, deadline, whole=True
        )
        self._runtime.wait(held.waits, deadline)
        with self._runtime.lock:
            parts = self._runtime.planner.located(held.lease)
        return Lease(self, held, parts)

    def no_lease(self) -> Lease:
        """A lease of nothing."""
        return Lease(self, None, [])

    def release(self, *leases: Held | None) -> None:
        """Let leases go."""
        runtime = self._runtime
        with runtime.guard, runtime.lock:
            for held in leases:
                if held is not None:
                    runtime.handle(ev.Release(held.lease))

    def require_open(self) -> None:
        """Raise StoreClosed where memory that was leased is gone."""
        if self._runtime.is_closed:
            raise StoreClosed("the store was closed while its blocks were leased")

    def _acquire(self, match: Match, first: int, count: int, *, whole: bool = False) -> Held:
        runtime = self._runtime
        wanted = count if whole else min(count, self._window)
        with runtime.lock:
            runtime.pump()
            event = ev.Acquire(match.keys, first, wanted, match.namespace)  # type: ignore[arg-type]
            grant = runtime.handle(event)[-1]
            assert isinstance(grant, ev.Grant)
            parts = None if grant.waits else runtime.planner.located(grant.lease)
        return Held(grant.lease, grant.count, grant.waits, parts)

    def _acquire_soon(
        self, match: Match, first: int, count: int, deadline: float, *, whole: bool = False
    ) -> Held:
        """As `_acquire`, waiting for transfers that may make room, until the deadline."""
        while True:
            ended = self._runtime.engine.ended
            held = self._acquire(match, first, count, whole=whole)
            if held.count or not count or not self._runtime.wait_for_room(ended, deadline):
                return held
            self.release(held)

    def _read(self, held: Held, rows: Rows, at: int, deadline: float) -> int:
        """Wait for a lease's transfers and copy what arrived to ``rows[:, at:]``."""
        runtime, parts = self._runtime, held.parts
        if parts is None:
            runtime.wait(held.waits, deadline)
            with runtime.lock:
                parts = runtime.planner.located(held.lease)
        target = rows[:, at : at + held.count]
        delivered = self.memory.copy_out(parts, target)
        if self.memory.device is not None and delivered == held.count:
            with runtime.lock:
                fills = runtime.handle(ev.Admit(held.lease))
            fill_all(runtime, self.memory, fills, target)
        return delivered


class Lease:
    """Blocks of a match, pinned in memory. A context manager; views die with it."""

    def __init__(self, reader: Reader, held: Held | None, parts: list[Located]) -> None:
        self._reader = reader
        self._held = held
        self._parts = parts
        last = parts[-1].spans[-1] if parts else None
        self.blocks = last.index + last.count if last else 0
        self.tokens = self.blocks * reader.memory.plan.block_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def read(self, out: Rows) -> int:
        """Copy the leased blocks to ``out[:, :blocks]``; gives how many. Raises as `layer`."""
        self._reader.require_open()
        memory = self._reader.memory
        return memory.copy_out(self._parts, memory.rows_of(out))

    def layer(self, number: int) -> list[Bytes]:
        """One layer of the leased blocks, in order, as arrays (blocks, block_layer_bytes).

        Blocks in host memory come as views without a copy, one per run; others are copied. Raises
        StoreClosed where the store was closed before the lease was left.
        """
        self._reader.require_open()
        memory = self._reader.memory
        plan, pages = memory.plan, memory.host.blocks
        views: list[Bytes] = []
        for tier, spans in self._parts:
            if tier is TierId.HOST:
                views += [pages[s.page, number, s.offset : s.offset + s.count] for s in spans]
                continue
            count = sum(span.count for span in spans)
            rows = np.empty((plan.layers, count, plan.block_layer_bytes), np.uint8)
            moved = [span._replace(index=span.index - spans[0].index) for span in spans]
            memory.copy_out([Located(tier, moved)], rows)
            views.append(rows[number])
        return views

    def release(self) -> None:
        """Let the blocks go; a second call does nothing."""
        held, self._held = self._held, None
        if held is not None:
            self._parts = []
            self._reader.release(held)


def fill_all(
    runtime: Runtime, memory: Memory, instructions: list[ev.AnyInstruction], rows: Rows
) -> None:
    """Carry out fills from `rows`, and say so; what a copy that failed leaves is not published."""
    fills = [item for item in instructions if isinstance(item, ev.Fill)]
    done = 0
    try:
        for item in fills:
            memory.fill(item, rows)
            done += 1
            with runtime.lock:
                runtime.handle(ev.Filled(item.ticket, True))
    finally:
        for item in fills[done:]:
            with runtime.lock:
                runtime.handle(ev.Filled(item.ticket, False))
