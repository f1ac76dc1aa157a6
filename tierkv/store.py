"""Store: the one object that engines, the daemon and tools talk to.

It owns a planner, the tiers and the transfer engine, and is the loop between them: an event goes
to the planner, its transfers go to the engine, what ended comes back as an event. One lock guards
the planner; no I/O and no copy of KV bytes happens under it. Any thread.

What it promises: `get` gives exactly the bytes that were put under that prefix, layout and
namespace, or fewer blocks. A block's bytes never change while it is known: a second `put` of a
known block is skipped. Faults of a tier shorten what is found and raise counters; they do not
raise exceptions.

KV bytes cross this interface as uint8 arrays ``(layers, blocks, block_layer_bytes)`` with any
strides: numpy arrays or torch tensors.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from tierkv.assembly import FilesFor, Parts, assemble
from tierkv.config import Config
from tierkv.core.errors import ConfigError, GeometryMismatch, StoreClosed, TierFailed
from tierkv.core.geometry import Layout
from tierkv.core.keys import BlockKey, Tokens
from tierkv.core.tier import Span, TierId
from tierkv.core.transfer import Transfer, Urgency
from tierkv.plan import events as ev
from tierkv.plan.event_log import entry_line, head_line
from tierkv.plan.events import Hint, HintKind
from tierkv.plan.planner import Located, Planner

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hint", "HintKind", "Lease", "Match", "Store"]

logger = logging.getLogger(__name__)

Bytes: TypeAlias = npt.NDArray[np.uint8]
#: KV bytes as a caller has them.
Rows: TypeAlias = "Bytes | Tensor"

_LOG_LINES_MAX = 4096
#: Instructions that the calling method carries out itself.
_FOR_CALLERS = frozenset({ev.Fill, ev.Grant, ev.Short, ev.Erase})


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


class Store:
    """See the module. Open with `Store.open`; close it, or use it as a context manager."""

    def __init__(self, config: Config, layout: Layout, parts: Parts) -> None:
        self.config = config
        self.layout = layout
        self.plan = layout.pages
        self._planner = Planner(parts.spec)
        self._chains = parts.chains
        self._host = parts.host
        self._device = parts.device
        self._cold = parts.cold
        self._files = parts.files
        self._engine = parts.engine
        self._lock = threading.Lock()
        self._closed = False
        self._demand_s = config.transfer.demand_deadline_ms / 1e3
        self._put_s = config.transfer.put_deadline_ms / 1e3
        self._log: list[bytes] | None = None
        self._rows_shape = (self.plan.layers, self.plan.block_layer_bytes)
        self._window = self.plan.cold_page_warm_pages * self.plan.warm_page_blocks
        if config.event_log is not None:
            self._log = [head_line(parts.spec)]
            config.event_log.parent.mkdir(parents=True, exist_ok=True)
            config.event_log.write_bytes(b"")
        if parts.recovered:
            with self._lock:
                self._handle(ev.Recovered(parts.recovered))

    @classmethod
    def open(
        cls, config: Config, layout: Layout, *, files_for: FilesFor | None = None
    ) -> Store:
        """Open the tiers and recover what the cold tier holds.

        `files_for` makes another file engine than the configured one (fault injection). Raises ConfigError for a tier that cannot work as configured, TierFailed for one whose
        device or directory refuses.
        """
        if layout.block_tokens != config.block_tokens or layout.targets != config.pages.targets:
            raise ConfigError(
                f"the layout has blocks of {layout.block_tokens} tokens and {layout.targets}, the "
                f"configuration {config.block_tokens} and {config.pages.targets}; take them from it"
            )
        return cls(config, layout, assemble(config, layout, files_for=files_for))

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- finding

    def keys(self, tokens: Tokens, *, namespace: str = "default") -> list[BlockKey]:
        """The keys of every whole block of `tokens`."""
        chain = self._chains.get(namespace)
        if chain is None:
            known = ", ".join(self._chains)
            raise ConfigError(f"namespaces: unknown name {namespace!r}; configured: {known}")
        return chain.of_tokens(tokens)

    def match(self, tokens: Tokens, *, namespace: str = "default") -> Match:
        """The longest readable prefix of `tokens`. Waits for nothing, changes nothing."""
        return self.match_keys(self.keys(tokens, namespace=namespace), namespace=namespace)

    def match_keys(self, keys: Sequence[BlockKey], *, namespace: str = "default") -> Match:
        """As `match`, for keys that are already at hand."""
        step = self.plan.block_tokens
        with self._lock:
            self._pump()
            counts = self._planner.match_counts(keys)
        by_tier = {tier.label: count * step for tier, count in counts.items()}
        return Match(list(keys[: sum(counts.values())]), step, namespace, by_tier)

    # ---- reading

    def get(self, match: Match, out: Rows, *, first_block: int = 0) -> int:
        """Fill ``out[:, :n]`` with blocks ``first_block ..`` of a match; gives n.

        n is less than asked where blocks were lost or evicted meanwhile, or did not arrive before
        `transfer.demand_deadline_ms`. What lies beyond n in `out` is undefined.
        """
        rows = self._rows(out)
        wanted = min(match.blocks - first_block, rows.shape[1])
        deadline = time.monotonic() + self._demand_s
        held = self._acquire_soon(match, first_block, wanted, deadline)
        done = 0
        while held.count:
            # The next window is fetched from disk while this one is copied.
            ahead: _Held | None = None
            if held.waits and done + held.count < wanted:
                left = wanted - done - held.count
                ahead = self._acquire(match, first_block + done + held.count, min(left, self._window))
            try:
                delivered = self._read(held, rows, done, deadline)
            except BaseException:
                self._release(held, ahead)
                raise
            self._release(held)
            done += delivered
            if delivered < held.count or done >= wanted:
                self._release(ahead)
                break
            if ahead is None or not ahead.count:
                self._release(ahead)
                ahead = self._acquire_soon(match, first_block + done, wanted - done, deadline)
            held = ahead
        else:
            self._release(held)
        if wanted > self._window:
            with self._lock:
                self._handle(ev.Touch(match.keys))  # windows were used root first; see `Touch`
        return done

    def lease(self, match: Match, *, first_block: int = 0) -> Lease:
        """Bring blocks ``first_block ..`` of a match into memory and keep them until it is left.

        It may hold fewer blocks than the match: see `get`, which needs less memory at a time.
        """
        held = self._acquire(match, first_block, match.blocks - first_block)
        self._wait(held.waits, time.monotonic() + self._demand_s)
        with self._lock:
            parts = self._planner.located(held.lease)
        return Lease(self, held, parts)

    def _acquire(self, match: Match, first: int, count: int) -> _Held:
        keys = match.keys[first : first + count]
        with self._lock:
            if self._engine.has_results:
                self._pump()
            grant = self._handle(ev.Acquire(keys, match.namespace))[-1]  # type: ignore[arg-type]
            assert type(grant) is ev.Grant
            parts = None if grant.waits else self._planner.located(grant.lease)
        return _Held(grant.lease, grant.count, grant.waits, parts)

    def _acquire_soon(self, match: Match, first: int, count: int, deadline: float) -> _Held:
        """As `_acquire`, waiting for transfers that may make room, until the deadline."""
        while True:
            ended = self._engine.ended
            held = self._acquire(match, first, min(count, self._window))
            if held.count or not count or not self._wait_for_room(ended, deadline):
                return held
            self._release(held)

    def _read(self, held: _Held, rows: Rows, at: int, deadline: float) -> int:
        """Wait for a lease's transfers and copy what arrived to ``rows[:, at:]``."""
        parts = held.parts
        if parts is None:
            self._wait(held.waits, deadline)
            with self._lock:
                parts = self._planner.located(held.lease)
        target = rows[:, at : at + held.count]
        delivered = self._copy_out(parts, target)
        if self._device is not None and delivered == held.count:
            with self._lock:
                fills = self._handle(ev.Admit(held.lease))
            self._fill(fills, target)
        return delivered

    def _copy_out(self, parts: Iterable[Located], out: Rows) -> int:
        delivered = 0
        for tier, spans in parts:
            if tier is TierId.HOST:
                if isinstance(out, np.ndarray):
                    self._host.read(spans, out)
                else:
                    self._host_to_tensor(spans, out)
            else:
                assert self._device is not None
                self._device.read(spans, out)
            last = spans[-1]
            delivered = last.index + last.count
        return delivered

    def _host_to_tensor(self, spans: list[Span], out: Tensor) -> None:
        import torch

        for index, page, offset, count in spans:
            view = torch.from_numpy(self._host.blocks[page, :, offset : offset + count])
            out[:, index : index + count].copy_(view)

    def _release(self, *leases: _Held | None) -> None:
        with self._lock:
            for held in leases:
                if held is not None:
                    self._handle(ev.Release(held.lease))

    # ---- writing

    def put(
        self, tokens: Tokens, data: Rows, *, first_block: int = 0, namespace: str = "default"
    ) -> int:
        """Store whole blocks ``first_block ..`` of `tokens`; `data` is free again on return.

        Gives how many of the offered blocks are stored or were already known, counted from the
        first. Waits up to `transfer.put_deadline_ms` for room. The cold tier is written behind;
        `flush` waits for it.
        """
        keys = self.keys(tokens, namespace=namespace)
        return self.put_keys(keys, data, first_block=first_block, namespace=namespace)

    def put_keys(
        self,
        keys: Sequence[BlockKey],
        data: Rows,
        *,
        first_block: int = 0,
        namespace: str = "default",
    ) -> int:
        """As `put`, for keys that are already at hand."""
        rows = self._rows(data)
        chain = list(keys[: first_block + rows.shape[1]])
        offered = len(chain) - first_block
        if offered <= 0:
            return 0
        deadline = time.monotonic() + self._put_s
        done = 0
        while True:
            ended = self._engine.ended
            with self._lock:
                self._pump()
                out = self._handle(ev.Put(chain, first_block + done, namespace))  # type: ignore[arg-type]
            self._fill(out, rows[:, done:])
            short = next((item for item in out if isinstance(item, ev.Short)), None)
            if short is None:
                return offered
            done += short.index
            if not self._wait_for_room(ended, deadline) and not short.index:
                return done

    def _fill(self, instructions: Iterable[ev.AnyInstruction], rows: Rows) -> None:
        """Carry out fills from `rows`, and say so; a failed copy leaves nothing published."""
        for item in instructions:
            if not isinstance(item, ev.Fill):
                continue
            spans = _spans_in_rows(item)
            ok = False
            try:
                if item.tier is TierId.HOST:
                    self._host.write(spans, _on_host(rows))
                else:
                    assert self._device is not None
                    self._device.write(spans, rows)
                ok = True
            finally:
                with self._lock:
                    self._handle(ev.Filled(item.ticket, ok))

    # ---- background

    def hint(self, hint: Hint) -> None:
        """Tell what is known of a prefix's future; see `HintKind`."""
        with self._lock:
            self._pump()
            out = self._handle(hint)
        self._erase(out)

    def step(self) -> None:
        """Once per engine step: take in what transfers brought, let time pass."""
        with self._lock:
            self._pump()
            out = self._handle(ev.Tick())
        self._erase(out)
        self._write_log()

    def flush(self, *, deadline_s: float | None = None) -> bool:
        """Make everything that was put before durable in the cold tier; False if that failed.

        True without a cold tier only if nothing is stored: there is no place to be durable in.
        """
        if deadline_s is None:
            deadline_s = self.config.transfer.flush_deadline_ms / 1e3
        deadline = time.monotonic() + deadline_s
        movement = self._planner.movement
        if self._cold is None:
            return not len(self._planner.index)
        left: int | None = None
        while True:
            with self._lock:
                self._pump()
                dirty = len(movement.dirty)
                if left is not None and dirty >= left:
                    break  # what was tried did not land: the disk refuses
                left = dirty or None
                self._handle(ev.Flush())
                pending = movement.write_backs()
            if not pending:
                break
            if not self._wait(pending, deadline):
                return False
        return self._sync() and not dirty

    def _sync(self) -> bool:
        assert self._cold is not None
        try:
            self._cold.sync()
        except TierFailed as error:
            logger.warning("sync failed, unsynced pages are forgotten error=%s", error)
            lost = sorted(self._cold.distrusted)
            with self._lock:
                self._handle(ev.Distrust(lost))
            return False
        return True

    def close(self) -> None:
        """Write back what is only in memory, make it durable, and let everything go."""
        with self._lock:
            if self._closed:
                return
        self.flush()
        with self._lock:
            self._closed = True
        self._engine.close()
        for tier in (self._cold, self._device, self._host):
            if tier is not None:
                try:
                    tier.close()
                except TierFailed as error:
                    logger.warning("close failed error=%s", error)
        if self._files is not None:
            self._files.shutdown()
        self._write_log(force=True)

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Counters by name, and what each tier holds ("tiers": {"host,used_bytes": ...})."""
        with self._lock:
            found = self._planner.stats.snapshot()
            for name, values in self._engine.stats.snapshot().items():
                merged = found.setdefault(name, {})
                for label, value in values.items():
                    merged[label] = merged.get(label, 0) + value
            tiers: dict[str, int] = {}
            for tier, table in self._planner.tables.items():
                page = table.page_blocks * self.plan.block_bytes
                used = sum(table.pool.used) * self.plan.block_bytes
                tiers[f"{tier.label},used_bytes"] = used
                tiers[f"{tier.label},capacity_bytes"] = table.pool.pages * page
                tiers[f"{tier.label},blocks"] = sum(table.pool.used)
            tiers["blocks_known"] = len(self._planner.index)
        if self._cold is not None:
            tiers["cold,disk_bytes"] = self._cold.usage().disk_bytes
        return {**found, "tiers": tiers}

    def check(self) -> None:
        """Assert the planner's invariants; for tests and tools."""
        with self._lock:
            self._planner.check()

    # ---- async twins, for event loops: the same calls on a thread

    async def amatch(self, tokens: Tokens, *, namespace: str = "default") -> Match:
        """`match`, awaited."""
        return await asyncio.to_thread(self.match, tokens, namespace=namespace)

    async def aget(self, match: Match, out: Rows, *, first_block: int = 0) -> int:
        """`get`, awaited."""
        return await asyncio.to_thread(self.get, match, out, first_block=first_block)

    async def aput(
        self, tokens: Tokens, data: Rows, *, first_block: int = 0, namespace: str = "default"
    ) -> int:
        """`put`, awaited."""
        return await asyncio.to_thread(
            self.put, tokens, data, first_block=first_block, namespace=namespace
        )

    async def alease(self, match: Match) -> Lease:
        """`lease`, awaited."""
        return await asyncio.to_thread(self.lease, match)

    async def aflush(self, *, deadline_s: float | None = None) -> bool:
        """`flush`, awaited."""
        return await asyncio.to_thread(self.flush, deadline_s=deadline_s)

    # ---- the loop

    def _handle(self, event: ev.AnyEvent) -> list[ev.AnyInstruction]:
        """One event to the planner, its transfers to the engine. Call with the lock held."""
        if self._closed:
            raise StoreClosed("the store is closed")
        now = time.monotonic_ns()
        out = self._planner.handle(event, now)
        if self._log is not None:
            self._log.append(entry_line(now, event, out))
        for item in out:
            if type(item) in _FOR_CALLERS:
                continue
            if isinstance(item, Transfer):
                deadline = None
                if item.urgency is Urgency.DEMAND:
                    deadline = now + int(self._demand_s * 1e9)
                self._engine.submit(item, deadline_ns=deadline)
            elif isinstance(item, ev.Raise):
                self._engine.promote(item.transfer, item.urgency)
            elif isinstance(item, ev.Cancel):
                self._engine.cancel(item.transfer)
        return out

    def _pump(self) -> None:
        """Feed ended transfers to the planner. Call with the lock held."""
        if self._closed:
            raise StoreClosed("the store is closed")
        if not self._engine.has_results:
            return
        for result in self._engine.poll():
            self._handle(ev.TransferDone(result.transfer, result.ok, result.cancelled))
        self._engine.wake()

    def _wait(self, transfers: Sequence[int], deadline: float) -> bool:
        """Until these transfers have ended and the planner knows; False at the deadline."""
        flights = self._planner.movement.flights
        while any(number in flights for number in transfers):
            # Another thread may take our results in: then `flights` shows it.
            if not self._engine.wait(
                deadline - time.monotonic(),
                until=lambda: not any(number in flights for number in transfers),
            ):
                return False
            with self._lock:
                self._pump()
        return True

    def _wait_for_room(self, ended: int, deadline: float) -> bool:
        """Until more than `ended` transfers have ended; False if none will, or at the deadline."""
        if not self._engine.busy:
            return self._engine.ended != ended
        return self._engine.wait(
            deadline - time.monotonic(), until=lambda: self._engine.ended != ended
        )

    def _erase(self, instructions: Iterable[ev.AnyInstruction]) -> None:
        for item in instructions:
            if isinstance(item, ev.Erase) and self._cold is not None:
                try:
                    self._cold.erase(item.pages)
                except TierFailed as error:
                    logger.warning("erase failed pages=%d error=%s", len(item.pages), error)

    def _write_log(self, *, force: bool = False) -> None:
        path: Path | None = self.config.event_log
        if path is None or self._log is None:
            return
        if force or len(self._log) > _LOG_LINES_MAX:
            with self._lock:
                lines, self._log = self._log, []
            with path.open("ab") as file:
                file.writelines(lines)

    def _rows(self, data: Rows) -> Rows:
        """KV bytes in the store's shape, or GeometryMismatch."""
        plan = self.plan
        if (
            isinstance(data, np.ndarray)
            and data.ndim == 3
            and data.dtype == np.uint8
            and data.shape[::2] == self._rows_shape
        ):
            return data
        shape = tuple(data.shape)
        dtype = str(data.dtype).removeprefix("torch.")
        if len(shape) != 3 or shape[0] != plan.layers or shape[2] != plan.block_layer_bytes:
            raise GeometryMismatch(
                f"KV bytes must be (layers={plan.layers}, blocks, block_layer_bytes="
                f"{plan.block_layer_bytes}), got {shape}"
            )
        if dtype != "uint8":
            raise GeometryMismatch(f"KV bytes must be uint8, got {dtype}; view them as bytes")
        if isinstance(data, np.ndarray) or data.device.type != "cpu":
            return data
        return data.numpy()  # type: ignore[no-any-return]


class Lease:
    """Blocks of a match, pinned in memory. A context manager; views die with it."""

    def __init__(self, store: Store, held: _Held, parts: list[Located]) -> None:
        self._store = store
        self._held: _Held | None = held
        self._parts = parts
        last = parts[-1].spans[-1] if parts else None
        self.blocks = last.index + last.count if last else 0
        self.tokens = self.blocks * store.plan.block_tokens

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def read(self, out: Rows) -> int:
        """Copy the leased blocks to ``out[:, :blocks]``; gives how many."""
        return self._store._copy_out(self._parts, self._store._rows(out))

    def layer(self, number: int) -> list[Bytes]:
        """One layer of the leased blocks, in order, as arrays (blocks, block_layer_bytes).

        Blocks in host memory come as views without a copy, one per run; others are copied.
        """
        store, views = self._store, []
        for tier, spans in self._parts:
            if tier is TierId.HOST:
                pages = store._host.blocks
                views += [pages[s.page, number, s.offset : s.offset + s.count] for s in spans]
            else:
                count = sum(span.count for span in spans)
                rows = np.empty((store.plan.layers, count, store.plan.block_layer_bytes), np.uint8)
                first = spans[0].index
                moved = [span._replace(index=span.index - first) for span in spans]
                store._copy_out([Located(tier, moved)], rows)
                views.append(rows[number])
        return views

    def release(self) -> None:
        """Let the blocks go; a second call does nothing."""
        held, self._held = self._held, None
        if held is not None:
            self._parts = []
            self._store._release(held)


@dataclass(slots=True)
class _Held:
    """A lease as the store sees it; `parts` is None while transfers are awaited."""

    lease: int
    count: int
    waits: list[int]
    parts: list[Located] | None


def _on_host(rows: Rows) -> Bytes:
    return rows if isinstance(rows, np.ndarray) else rows.cpu().numpy()


def _spans_in_rows(fill: ev.Fill) -> list[Span]:
    """The spans of a fill, counted in the offered blocks instead of in those to be written."""
    indices = fill.indices
    first = indices[0]
    if indices[-1] - first + 1 == len(indices):
        return [s._replace(index=s.index + first) for s in fill.spans] if first else fill.spans
    spans: list[Span] = []
    for index, page, offset, count in fill.spans:
        start = index
        for stop in range(index + 1, index + count + 1):
            if stop == index + count or indices[stop] != indices[stop - 1] + 1:
                spans.append(Span(indices[start], page, offset + start - index, stop - start))
                start = stop
    return spans
