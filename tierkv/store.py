"""Store: the one object that engines, the daemon and tools talk to.

It joins a planner, the tiers and the transfer engine. Reading is in `tierkv.reading`, copying in
`tierkv.memory`, the loop between planner and engine in `tierkv.runtime`. Any thread.

What it promises: `get` gives exactly the bytes that were put under that prefix, layout and
namespace, or fewer blocks. A block's bytes never change while it is known: a second `put` of a
known block is skipped. Faults of a tier shorten what is found and raise counters; they do not
raise exceptions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from tierkv.assembly import FilesFor, Parts, StagingFor, assemble
from tierkv.config import Config
from tierkv.core.errors import ConfigError, TierKVError
from tierkv.core.geometry import Layout
from tierkv.core.keys import BlockKey, Tokens
from tierkv.core.tier import TierId
from tierkv.memory import Memory, Rows
from tierkv.plan import events as ev
from tierkv.plan.events import Hint, HintKind
from tierkv.reading import Lease, Match, Reader, fill_all
from tierkv.runtime import Runtime

__all__ = ["Hint", "HintKind", "Lease", "Match", "Store"]

logger = logging.getLogger(__name__)

#: How soon a flush looks again at a page that somebody copies into.
_FILL_S: Final = 0.5e-3


class Store:
    """See the module. Open with `Store.open`; close it, or use it as a context manager."""

    def __init__(self, config: Config, layout: Layout, parts: Parts) -> None:
        self.config = config
        self.layout = layout
        self.plan = layout.pages
        limits = config.transfer
        demand_s = limits.demand_deadline_ms / 1e3
        self._put_s = limits.put_deadline_ms / 1e3
        cold_page = self.plan.cold_page_warm_pages * self.plan.warm_page_blocks
        self._put_step = max(1, cold_page // 4) if parts.cold else 1 << 62
        self._parts = parts
        self._chains = parts.chains
        self._cold = parts.cold
        self._syncs = 0
        self._runtime = Runtime(parts.spec, parts.engine, demand_s=demand_s, log=config.event_log)
        self._memory = Memory(self.plan, parts.host, parts.device)
        self._reader = Reader(self._runtime, self._memory, demand_s=demand_s)
        withheld = parts.cold.withheld if parts.cold else []
        if parts.recovered or withheld:
            with self._runtime.lock:
                self._runtime.handle(ev.Recovered(parts.recovered, withheld))

    @classmethod
    def open(
        cls,
        config: Config,
        layout: Layout,
        *,
        files_for: FilesFor | None = None,
        staging_for: StagingFor | None = None,
    ) -> Store:
        """Open the tiers and recover what the cold tier holds.

        `files_for` and `staging_for` make another file engine, another ring to the device, than the
        configured ones (fault injection, recorded streams). Raises ConfigError for a tier that
        cannot work as configured, TierFailed for one whose device or directory refuses.
        """
        if layout.block_tokens != config.block_tokens or layout.targets != config.pages.targets:
            raise ConfigError(
                f"the layout has blocks of {layout.block_tokens} tokens and {layout.targets}, the "
                f"configuration {config.block_tokens} and {config.pages.targets}; take them from it"
            )
        parts = assemble(config, layout, files_for=files_for, staging_for=staging_for)
        try:
            return cls(config, layout, parts)
        except BaseException:
            parts.close()
            raise

    def __enter__(self) -> Self:
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
        """The keys of every whole block of `tokens`. ConfigError for an unknown namespace."""
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
        runtime, step = self._runtime, self.plan.block_tokens
        counts: dict[TierId, int] = {}
        with runtime.guard, runtime.lock:
            runtime.pump()
            counts = runtime.planner.match_counts(keys)
        by_tier = {tier.label: count * step for tier, count in counts.items()}
        return Match(list(keys[: sum(counts.values())]), step, namespace, by_tier)

    def changes(self) -> dict[BlockKey, TierId | None] | None:
        """The fastest tier of each block where that may have changed since this was last asked.

        For whoever keeps a copy of what is stored; the first call gives all of it. None for a block
        that cannot be read any more, and None as a whole where nothing can be.
        """
        runtime = self._runtime
        with runtime.guard, runtime.lock:
            runtime.pump()
            return runtime.planner.watch.changes()
        return None

    # ---- reading

    def get(self, match: Match, out: Rows, *, first_block: int = 0) -> int:
        """Fill ``out[:, :n]`` with blocks ``first_block ..`` of a match; gives n.

        `out`: uint8 (layers, blocks, block_layer_bytes), any strides. n is less than asked where
        blocks were lost or evicted meanwhile, or did not arrive before
        `transfer.demand_deadline_ms`; what lies beyond n in `out` is undefined then.
        """
        with self._runtime.guard:
            return self._reader.get(match, out, first_block)
        return 0

    def lease(self, match: Match, *, first_block: int = 0) -> Lease:
        """Bring blocks ``first_block ..`` of a match into memory and keep them until it is left.

        It may hold fewer blocks than the match: see `get`, which needs less memory at a time.
        """
        with self._runtime.guard:
            return self._reader.lease(match, first_block)
        return self._reader.no_lease()

    # ---- writing

    def put(
        self, tokens: Tokens, data: Rows, *, first_block: int = 0, namespace: str = "default"
    ) -> int:
        """Store whole blocks ``first_block ..`` of `tokens`; `data` is free again on return.

        `data`: uint8 (layers, blocks, block_layer_bytes), any strides. Gives how many of the
        offered blocks are stored or were already known, counted from the first. Waits up to
        `transfer.put_deadline_ms` for room. The cold tier is written behind; `flush` waits for it.
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
        with self._runtime.guard:
            return self._put(keys, data, first_block, namespace)
        return 0

    def _put(self, keys: Sequence[BlockKey], data: Rows, first_block: int, namespace: str) -> int:
        runtime = self._runtime
        rows = self._memory.rows_of(data)
        chain = list(keys[: first_block + rows.shape[1]])
        offered = len(chain) - first_block
        if offered <= 0:
            return 0
        deadline = time.monotonic() + self._put_s
        done = 0
        while done < offered:
            ended = runtime.engine.ended
            # In steps, so that the disk writes what is copied while the rest is being copied.
            stop = min(offered, done + self._put_step)
            with runtime.lock:
                runtime.pump()
                keys_now: list[bytes] = [*chain[: first_block + stop]]
                out = runtime.handle(ev.Put(keys_now, first_block + done, namespace))
            fill_all(runtime, self._memory, out, rows[:, done:stop])
            short = next((item for item in out if isinstance(item, ev.Short)), None)
            if short is None:
                done = stop
                continue
            done += short.index
            if not runtime.wait_for_room(ended, deadline) and not short.index:
                break
        return done

    # ---- background

    def hint(self, hint: Hint) -> None:
        """Tell what is known of a prefix's future; see `HintKind`."""
        with self._runtime.guard:
            with self._runtime.lock:
                self._runtime.pump()
                out = self._runtime.handle(hint)
            self._erase(out)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """A chain was used without being read here: it goes later."""
        with self._runtime.guard, self._runtime.lock:
            self._runtime.pump()
            self._runtime.handle(ev.Touch(list(keys)))

    def clear(self) -> None:
        """Forget everything that nobody is reading or writing."""
        with self._runtime.guard:
            with self._runtime.lock:
                self._runtime.pump()
                out = self._runtime.handle(ev.Clear())
            self._erase(out)

    def step(self) -> None:
        """Once per engine step: take in what transfers brought, let time pass."""
        with self._runtime.guard:
            with self._runtime.lock:
                self._runtime.pump()
                out = self._runtime.handle(ev.Tick())
            self._erase(out)
        self._runtime.write_log()

    def flush(self, *, deadline_s: float | None = None) -> bool:
        """Make everything that was put before durable in the cold tier; False if that failed.

        It fails where the disk refuses, or where the tier cannot hold all of it. Without a cold
        tier there is no place to be durable in: True only if nothing is stored.
        """
        if deadline_s is None:
            deadline_s = self.config.transfer.flush_deadline_ms / 1e3
        with self._runtime.guard:
            return self._flush(time.monotonic() + deadline_s)
        return False

    def _flush(self, deadline: float) -> bool:
        runtime = self._runtime
        movement = runtime.planner.movement
        if self._cold is None:
            return not len(runtime.planner.index)
        runtime.engine.breaker.try_now()
        with runtime.lock:
            runtime.pump()
            wanted = movement.unsaved()  # what others put from here on is for the next flush
        before: int | None = None
        while True:
            with runtime.lock:
                runtime.pump()
                left = movement.moves_to_save(wanted)
                if not left or (before is not None and left >= before):
                    break  # all is there, or what was tried did not land: the disk refuses
                runtime.handle(ev.Flush())
                pending = movement.going_down()
                is_filling = bool(runtime.planner.tickets) and time.monotonic() < deadline
            if pending:
                before = None if is_filling else left  # such a page was not tried
                if not runtime.wait(pending, deadline):
                    return False
            elif is_filling:
                time.sleep(_FILL_S)  # somebody copies blocks into such a page
            else:
                break
        return self._sync(wanted)

    def _sync(self, wanted: Mapping[int, BlockKey]) -> bool:
        """Sync the cold tier; whether these blocks are durable now."""
        assert self._cold is not None
        runtime = self._runtime
        with runtime.lock:
            self._syncs += 1
            number = self._syncs
            # Another call's sync may have failed already, or may until ours begins.
            failures = self._cold.failed_syncs
            self._distrust()
            # Now, as the sync covers only what is there when it begins.
            is_there = not runtime.planner.movement.moves_to_save(wanted)
            runtime.handle(ev.Syncing(number))
        try:
            self._cold.sync(failures_before=failures)
        except TierKVError as error:
            logger.warning("sync failed, unsynced pages are forgotten error=%s", error)
            with runtime.lock:
                self._distrust()
            return False
        with runtime.lock:
            out = runtime.handle(ev.Synced(number))
        self._erase(out)
        return is_there

    def _distrust(self) -> None:
        """Forget the pages that failed syncs have lost. Call with the lock held."""
        lost = self._cold.distrusted if self._cold else ()
        if lost:
            self._runtime.handle(ev.Distrust(sorted(lost)))

    def _erase(self, instructions: Iterable[ev.AnyInstruction]) -> None:
        for item in instructions:
            if isinstance(item, ev.Erase) and self._cold is not None:
                try:
                    self._cold.erase(item.pages)
                except TierKVError as error:
                    logger.warning("erase failed pages=%d error=%s", len(item.pages), error)
                with self._runtime.lock:
                    self._runtime.handle(ev.Erased(item.pages))

    def close(self) -> None:
        """Write back what is only in memory, make it durable, and let everything go."""
        runtime = self._runtime
        if runtime.is_closed:
            return
        self.flush()
        runtime.write_log(force=True)
        with runtime.lock:
            runtime.is_closed = True
        self._parts.close()

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Counters by name, what each tier holds, and what each link gives.

        "tiers" has "cold,breaker_state" too: 0 closed, 1 half-open, 2 open; and "gave_up", 1 once
        an event was left half done (no memory): all is a miss until the store is opened again.

        "tiers" has keys as "host,used_bytes", "links" as "cold,host,bytes_per_second"; a link is
        there once something was moved on it. On CUDA the bytes that crossed the link to the device,
        both ways, are there by route: page, runs, mapped.
        """
        planner, engine = self._runtime.planner, self._runtime.engine
        with self._runtime.lock:
            found = planner.stats.snapshot() | engine.stats.snapshot()
            tiers: dict[str, int] = {}
            for tier, table in planner.tables.items():
                blocks = sum(table.pool.used)
                capacity = table.pool.pages * table.page_blocks
                tiers[f"{tier.label},blocks"] = blocks
                tiers[f"{tier.label},used_bytes"] = blocks * self.plan.block_bytes
                tiers[f"{tier.label},capacity_bytes"] = capacity * self.plan.block_bytes
            tiers["blocks_known"] = len(planner.index)
            links: dict[str, int] = {}
            for (source, target), link in list(engine.links.items()):
                name = f"{source.label},{target.label}"
                links[f"{name},bytes_per_second"] = int(link.bytes_per_second)
                links[f"{name},latency_ns"] = int(link.latency_ns)
            for route, moved in engine.route_bytes().items():
                links[f"host,device,{route}_bytes"] = moved
        host = self._parts.host
        tiers["host,pinned_bytes"] = host.pinned_pages * self.plan.warm_page_bytes
        tiers["host,recalled_bytes"] = host.recalled_bytes
        tiers["gave_up"] = int(self._runtime.gave_up)
        if self._cold is not None:
            tiers["cold,breaker_state"] = engine.breaker.state
            tiers["cold,breaker_skipped"] = engine.breaker.skipped
            usage = self._cold.usage()
            tiers["cold,disk_bytes"] = usage.disk_bytes
            tiers["cold,pages_corrupt"] = usage.pages_corrupt
            tiers["cold,pages_torn"] = usage.pages_torn
            tiers["cold,io_errors"] = usage.io_errors
            tiers["cold,quarantined"] = usage.quarantined
        return {**found, "tiers": tiers, "links": links}

    def check(self) -> None:
        """Assert the planner's invariants; for tests and tools."""
        with self._runtime.lock:
            self._runtime.planner.check()

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

    async def alease(self, match: Match, *, first_block: int = 0) -> Lease:
        """`lease`, awaited."""
        return await asyncio.to_thread(self.lease, match, first_block=first_block)

    async def aflush(self, *, deadline_s: float | None = None) -> bool:
        """`flush`, awaited."""
        return await asyncio.to_thread(self.flush, deadline_s=deadline_s)
