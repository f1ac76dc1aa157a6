"""Carrier: the shipping planner with links of simulated time in the place of the transfer engine.

An event goes to the planner; its transfers become jobs on links, and come back as `TransferDone`
when their bytes would have moved. `Cancel` and `Raise` are honoured. Whole pages move between DRAM
and NVMe, so that half empty ones cost as much as they would; single blocks to and from HBM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tierkv.core.tier import TierId
from tierkv.core.transfer import Outcome, Transfer, Urgency
from tierkv.plan import events as ev
from tierkv.plan.event_log import entry_line, head_line
from tierkv.plan.planner import Planner
from tierkv.plan.spec import PlanSpec
from tierkv.sim.costs import Costs
from tierkv.sim.links import Channel, Job
from tierkv.sim.loop import Loop

Way = tuple[TierId, TierId]

_UP: Final = (TierId.HOST, TierId.DEVICE)
_DOWN: Final = (TierId.DEVICE, TierId.HOST)


class Carrier:
    """See the module. `on_end` is called with each transfer that ended, after the planner was."""

    def __init__(
        self,
        spec: PlanSpec,
        costs: Costs,
        loop: Loop,
        *,
        on_end: Callable[[int], None],
        log: list[bytes] | None = None,
    ) -> None:
        self.planner = Planner(spec)
        self.channels: dict[Way, Channel] = {
            _DOWN: Channel(costs.device_to_host),
            _UP: Channel(costs.host_to_device),
        }
        if TierId.COLD in spec.tiers:
            self.channels[TierId.HOST, TierId.COLD] = Channel(costs.host_to_cold)
            self.channels[TierId.COLD, TierId.HOST] = Channel(costs.cold_to_host)
        self.block_bytes = spec.block_bytes
        self.page_blocks = spec.tiers[TierId.HOST].page_blocks
        self.blocks_moved = 0
        #: Bytes of all transfers that the planner was told have arrived.
        self.transferred_bytes = dict.fromkeys(self.channels, 0)
        self._loop = loop
        self._on_end = on_end
        self._log = log
        self._jobs = 0
        self._acts: dict[int, Callable[[Job], None]] = {}
        self._transfers: dict[int, tuple[Transfer, Channel, Job]] = {}
        if log is not None:
            log.append(head_line(spec))

    def handle(self, event: ev.AnyEvent) -> list[ev.AnyInstruction]:
        """One event to the planner, its transfers to the links; gives all instructions."""
        now_ns = self._loop.now_ns
        out = self.planner.handle(event, now_ns)
        if self._log is not None:
            self._log.append(entry_line(now_ns, event, out))
        for item in out:
            if type(item) is Transfer:
                self._carry(item)
            elif type(item) is ev.Raise:
                _, channel, job = self._transfers[item.transfer]
                channel.hurry(job, item.urgency, now_ns)
                self._watch(channel)
            elif type(item) is ev.Cancel:
                self._cancel(item.transfer)
            elif type(item) is ev.Erase:
                self.handle(ev.Erased(item.pages))
        return out

    def submit(self, way: Way, blocks: int, urgency: Urgency, act: Callable[[Job], None]) -> None:
        """Move so many blocks for a request, beside the planner; then call `act`."""
        self._submit(self.channels[way], blocks, self.block_bytes, urgency, act)

    def way_bytes(self, way: Way) -> int:
        """The bytes of one move on a link."""
        return self.block_bytes * (self.page_blocks if TierId.COLD in way else 1)

    def _carry(self, transfer: Transfer) -> None:
        way = (transfer.source, transfer.target)
        channel, moves = self.channels[way], len(transfer.moves)

        def ended(job: Job) -> None:
            self._ended(transfer, job)

        job = self._submit(channel, moves, self.way_bytes(way), transfer.urgency, ended)
        self._transfers[transfer.id] = (transfer, channel, job)

    def _ended(self, transfer: Transfer, job: Job) -> None:
        way = (transfer.source, transfer.target)
        del self._transfers[transfer.id]
        self.transferred_bytes[way] += job.done * job.move_bytes
        self.blocks_moved += job.done * (self.page_blocks if TierId.COLD in way else 1)
        left = len(transfer.moves) - job.done
        outcomes = [Outcome.ARRIVED] * job.done + [Outcome.SKIPPED] * left
        self.handle(ev.TransferDone(transfer.id, outcomes))
        self._on_end(transfer.id)

    def _cancel(self, number: int) -> None:
        _, channel, job = self._transfers[number]
        if channel.cancel(job, self._loop.now_ns):
            # Later, as the planner is not to be called while its instructions are carried out.
            self._loop.post(self._loop.now_ns, self._finish, job)
        else:
            self._watch(channel)

    def _submit(
        self,
        channel: Channel,
        moves: int,
        move_bytes: int,
        urgency: Urgency,
        act: Callable[[Job], None],
    ) -> Job:
        self._jobs += 1
        job = Job(self._jobs, moves, move_bytes, urgency)
        self._acts[job.number] = act
        channel.submit(job, self._loop.now_ns)
        self._watch(channel)
        return job

    def _watch(self, channel: Channel) -> None:
        """Come back when the link's current job ends or leaves it."""
        if channel.ends_at is not None and channel.ends_at != channel.watched_at:
            channel.watched_at = channel.ends_at
            self._loop.post(channel.ends_at, self._look, channel)

    def _look(self, channel: Channel) -> None:
        if channel.ends_at != self._loop.now_ns:
            return  # the job has left the link earlier, or stays longer, than it looked then
        channel.watched_at = None
        job = channel.end(self._loop.now_ns)
        self._watch(channel)
        if job is not None:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        self._acts.pop(job.number)(job)
