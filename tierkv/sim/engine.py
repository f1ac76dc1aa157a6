"""Engine: an inference engine in simulated time, over the planner that ships.

A request arrives, waits for one of `slots`, and finds its prefix (`match`). It leases what it reads
(`Acquire`), waits for the transfers of the grant, has the blocks copied to the GPU, and offers them
to HBM (`Admit`). What host memory cannot hold at once is read in pieces, and the whole chain is
touched then, as the store does it. The rest is computed, one prefill at a time, and put when the
first token is there: the blocks cross the link, then `Filled` publishes them. Decoding takes a
step's time a token, by how many were decoding when this request began to. Then the answer's blocks
are put (see `Chains.with_answer`), the lease ends, hints are given, and the slot is free.

Not modelled: prefills in pieces beside decoding; several ranks (all do the same); namespaces; the
planner's own time; faults.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
import numpy as np

from tierkv.core.errors import ConfigError
from tierkv.core.geometry import PageTargets
from tierkv.core.models import model_geometry
from tierkv.core.tier import TierId
from tierkv.core.transfer import Urgency
from tierkv.plan import events as ev
from tierkv.sim.carrier import Carrier
from tierkv.sim.chains import Chains
from tierkv.sim.costs import Costs
from tierkv.sim.links import SECOND_NS, Job
from tierkv.sim.loop import Loop
from tierkv.sim.outcome import Outcome
from tierkv.sim.recorder import Recorder
from tierkv.sim.stack import Tiers
from tierkv.sim.trace import Trace

_UP: Final = (TierId.HOST, TierId.DEVICE)
_DOWN: Final = (TierId.DEVICE, TierId.HOST)
_READ: Final = (TierId.COLD, TierId.HOST)
_SPACE: Final = "default"
#: How often a read, or a put, asks in vain for memory that transfers may free.
_TRIES_MAX: Final = 8


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the engine runs, and what it tells the planner.

    hints: at the end of an answer whose pause is known, EXPECT in time, and DEMOTE where the pause
    is long. hint_error: how wrong pauses are told: the standard deviation of their logarithm.
    lookahead: so many waiting requests are told with PREFETCH. recompute: compute what takes longer
    to load. answers: put what decoding made. closed: a session's next request is sent its pause
    after the answer before it, instead of when the trace says. pins: what was read last stays
    leased until the answer ends; else only until it is copied, as `Store.get` does it.
    """

    slots: Annotated[int, msgspec.Meta(ge=1)] = 16
    hints: bool = False
    hint_error: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    demote_seconds: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    lead_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    lookahead: Annotated[int, msgspec.Meta(ge=0)] = 0
    recompute: bool = True
    answers: bool = True
    closed: bool = False
    pins: bool = True
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0


@dataclass(slots=True, eq=False)
class Running:
    """A request in a slot: `read` of the `wanted` blocks are on the GPU."""

    number: int
    keys: list[bytes]
    wanted: int = 0
    read: int = 0
    lease: int = -1
    granted: int = 0
    awaited: int = 0
    tries: int = 0
    pieces: int = 0
    unplaced: int = -1  # from this block on a put has found no room yet
    context_tokens: int = 0
    sources: dict[TierId, int] = field(default_factory=dict)


class Engine:
    """One run over one trace. Single owner; `run` once."""

    def __init__(
        self,
        trace: Trace,
        tiers: Tiers,
        costs: Costs,
        *,
        model: str,
        policies: str | Mapping[str, str],
        settings: EngineSettings,
        targets: PageTargets | None = None,
        log: list[bytes] | None = None,
    ) -> None:
        geometry = model_geometry(model)
        spec = tiers.spec(geometry, trace.block_tokens, policies, targets)
        self.costs = costs
        self.loop = Loop()
        self.carrier = Carrier(spec, costs, self.loop, on_end=self._transfer_ended, log=log)
        self.planner = self.carrier.planner
        self.record = Recorder(trace, tiers, costs, self.planner, geometry.token_bytes)
        self._trace = trace
        self._settings = settings
        self._chains = Chains(trace)
        self._block_tokens = trace.block_tokens
        self._input: list[int] = trace.input_tokens.tolist()
        self._output: list[int] = trace.output_tokens.tolist()
        self._arrival: list[int] = trace.arrival_ns.tolist()
        self._pause: list[int] = trace.pause_ns.tolist()
        self._has_device = TierId.DEVICE in spec.tiers
        self._has_cold = TierId.COLD in spec.tiers
        self._rng = np.random.Generator(np.random.PCG64(settings.seed))
        self._waiting: deque[int] = deque()
        self._told: set[int] = set()  # of those waiting
        self._slots = settings.slots
        self._gpu_queue: deque[Running] = deque()
        self._gpu_idle = True
        self._waiters: dict[int, list[Running]] = {}  # by transfer
        self._stalled: list[Running] = []
        self._short: list[Running] = []
        self._decoding = 0
        self._decoding_tokens = 0

    def run(self) -> Outcome:
        """All requests of the trace, and the transfers that they leave behind."""
        following = self._chains.following
        sent = set[int]()
        if self._settings.closed:
            sent = {n for i, n in enumerate(following) if n >= 0 and self._pause[i] >= 0}
        for number, at_ns in enumerate(self._arrival):
            if number not in sent:
                self.loop.post(at_ns, self._arrive, number)
        self.loop.run(lambda: self.record.look(self.loop.now_ns))
        return self.record.outcome(self.carrier)

    # ---- waiting

    def _arrive(self, number: int) -> None:
        self.record.arrival_ns[number] = self.loop.now_ns
        self._waiting.append(number)
        self._admit()

    def _admit(self) -> None:
        waiting = self._waiting
        while waiting and self._slots:
            self._slots -= 1
            number = waiting.popleft()
            self._told.discard(number)
            self._begin(number)
        for place in range(min(self._settings.lookahead, len(waiting))):
            number = waiting[place]
            if number not in self._told:
                self._told.add(number)
                self._hint(ev.HintKind.PREFETCH, self._chains.of(number))

    # ---- reading

    def _begin(self, number: int) -> None:
        running = Running(number, self._chains.of(number))
        self.record.start_ns[number] = self.loop.now_ns
        self.record.block_events += len(running.keys)
        running.wanted = self._worth_loading(running)
        if running.wanted:
            self._acquire(running)
        else:
            self._to_gpu(running)

    def _worth_loading(self, running: Running) -> int:
        """How many blocks to read: all that are there, those in memory only, or none."""
        keys: list[bytes] = running.keys
        counts = self.planner.match_counts(keys)  # type: ignore[arg-type]
        found = sum(counts.values())
        if not found or not self._settings.recompute:
            return found
        choices = [(found, counts.get(TierId.COLD, 0))]
        if choices[0][1]:
            choices.append((self._in_memory(keys), 0))
        choices.append((0, 0))
        tokens, size = self._input[running.number], self._block_tokens
        on_device = counts.get(TierId.DEVICE, 0)
        best, best_s = 0, float("inf")
        for blocks, cold in choices:
            load_s = self._load_ns(max(0, blocks - on_device), cold) / SECOND_NS if blocks else 0.0
            left = max(1, tokens - blocks * size)
            total_s = load_s + self.costs.prefill_seconds(left, tokens - left)
            if total_s < best_s:
                best, best_s = blocks, total_s
        return best

    def _in_memory(self, keys: list[bytes]) -> int:
        """How many blocks come before the first that only NVMe has."""
        planner = self.planner
        blocks = planner.index.match(keys)  # type: ignore[arg-type]
        return next(
            (n for n, b in enumerate(blocks) if planner.tier_of(b) in (TierId.COLD, None)),
            len(blocks),
        )

    def _load_ns(self, blocks: int, cold: int) -> int:
        carrier, now_ns = self.carrier, self.loop.now_ns
        up_ns = 0
        if blocks:
            up_ns = carrier.channels[_UP].expected_ns(blocks * carrier.block_bytes, now_ns)
        if cold:
            pages = -(-cold // carrier.page_blocks)
            size = pages * carrier.way_bytes(_READ)
            up_ns += carrier.channels[_READ].expected_ns(size, now_ns)
        return up_ns

    def _acquire(self, running: Running) -> None:
        """Lease what is left to read, and wait for its transfers."""
        before = self.record.hits_so_far()
        keys, wanted = running.keys[: running.wanted], running.wanted - running.read
        grant = self.carrier.handle(ev.Acquire(keys, running.read, wanted, _SPACE))[-1]
        assert isinstance(grant, ev.Grant)
        self.record.block_events += grant.count
        if not grant.count:
            self.carrier.handle(ev.Release(grant.lease))
            running.tries += 1
            if self.planner.movement.flights and running.tries < _TRIES_MAX:
                self._stalled.append(running)  # their end may make room
            else:
                self._to_gpu(running)
            return
        for tier, tokens in self.record.hits_so_far().items():
            more = tokens - before[tier]
            running.sources[tier] = running.sources.get(tier, 0) + more
        running.lease, running.granted = grant.lease, grant.count
        running.pieces += 1
        running.awaited = len(grant.waits)
        for transfer in grant.waits:
            self._waiters.setdefault(transfer, []).append(running)
        if not grant.waits:
            self._copy_in(running)

    def _copy_in(self, running: Running) -> None:
        """All is in memory: bring it to where the prefill reads it."""
        located = self.planner.located(running.lease)
        delivered = from_host = 0
        for tier, spans in located:
            blocks = sum([span.count for span in spans])
            delivered += blocks
            from_host += blocks if tier is TierId.HOST else 0
        if from_host:
            self.carrier.submit(
                _UP, from_host, Urgency.DEMAND, lambda _job: self._copied(running, delivered)
            )
        else:
            self._copied(running, delivered)

    def _copied(self, running: Running, delivered: int) -> None:
        running.read += delivered
        if self._has_device and delivered == running.granted:
            self._fill(self.carrier.handle(ev.Admit(running.lease)))
        if delivered < running.granted or running.read >= running.wanted:
            if running.pieces > 1:
                self.carrier.handle(ev.Touch(running.keys[: running.read]))
            if not self._settings.pins:
                self._release(running)
            self._to_gpu(running)
            return
        self._release(running)
        self._acquire(running)

    def _release(self, running: Running) -> None:
        if running.lease >= 0:
            self.carrier.handle(ev.Release(running.lease))
            running.lease = -1

    def _transfer_ended(self, transfer: int) -> None:
        for running in self._waiters.pop(transfer, ()):
            running.awaited -= 1
            if not running.awaited:
                self._copy_in(running)
        if self._stalled:
            stalled, self._stalled = self._stalled, []
            for running in stalled:
                self._acquire(running)
        self._put_again()

    def _put_again(self) -> None:
        """Something has moved: what found no room may find it now."""
        if self._short:
            short, self._short = self._short, []
            for running in short:
                self._put(running, running.unplaced)

    # ---- computing

    def _to_gpu(self, running: Running) -> None:
        self._gpu_queue.append(running)
        self._prefill_next()

    def _prefill_next(self) -> None:
        if not self._gpu_idle or not self._gpu_queue:
            return
        running = self._gpu_queue.popleft()
        self._gpu_idle = False
        hit = running.read * self._block_tokens
        computed = max(1, self._input[running.number] - hit)
        self.record.works(1, self.loop.now_ns)
        took = self.record.prefilled(running.number, computed, running.sources, hit)
        self.loop.post(self.loop.now_ns + took, self._prefill_ended, running)

    def _prefill_ended(self, running: Running) -> None:
        number = running.number
        self.record.first_token_ns[number] = self.loop.now_ns
        running.tries = 0
        self._put(running, running.read)
        self._gpu_idle = True
        self._prefill_next()
        output = self._output[number]
        running.context_tokens = self._input[number] + output // 2
        self._decoding += 1
        self._decoding_tokens += running.context_tokens
        took = self.record.decoded(
            output, self._decoding, running.context_tokens, self._decoding_tokens
        )
        self.loop.post(self.loop.now_ns + took, self._end, running)

    def _put(self, running: Running, first: int) -> None:
        if first < len(running.keys):
            out = self.carrier.handle(ev.Put(running.keys, first, _SPACE))
            self._fill(out)
            last = out[-1] if out else None
            if isinstance(last, ev.Short) and (last.waits or self.planner.tickets):
                running.unplaced = first + last.index
                running.tries = 0 if last.index else running.tries + 1
                if running.tries < _TRIES_MAX:
                    self._short.append(running)

    def _fill(self, out: list[ev.AnyInstruction]) -> None:
        """Write what `Fill`s ask for: to host memory over the link, in HBM at once."""
        for item in out:
            if type(item) is ev.Fill:
                self.record.block_events += len(item.indices)
                filled = ev.Filled(item.ticket, True)
                if item.tier is TierId.DEVICE:
                    self.carrier.handle(filled)
                else:
                    self._store(len(item.indices), filled)

    def _store(self, blocks: int, filled: ev.Filled) -> None:
        def ended(_job: Job) -> None:
            self.carrier.handle(filled)
            self._put_again()

        self.carrier.submit(_DOWN, blocks, Urgency.DEMAND, ended)

    # ---- ending

    def _end(self, running: Running) -> None:
        number = running.number
        self.record.end_ns[number] = self.loop.now_ns
        self.record.works(-1, self.loop.now_ns)  # since its prefill began
        self._decoding -= 1
        self._decoding_tokens -= running.context_tokens
        if running in self._short:
            self._short.remove(running)  # its bytes are overwritten now
        if self._settings.answers:
            known = len(running.keys)
            running.keys = self._chains.with_answer(number)
            if len(running.keys) > known:
                self._fill(self.carrier.handle(ev.Put(running.keys, known, _SPACE)))
        self._release(running)
        self._slots += 1
        self._pause_begins(running)
        self._admit()

    def _pause_begins(self, running: Running) -> None:
        """Send the session's next request, and tell the planner when that will be."""
        pause, after = self._pause[running.number], self._chains.following[running.number]
        if pause < 0 or after < 0:
            return
        now_ns, settings = self.loop.now_ns, self._settings
        next_ns = now_ns + pause
        if settings.closed:
            self.loop.post(next_ns, self._arrive, after)
        else:
            next_ns = max(now_ns, self._arrival[after])
        if not settings.hints or not self._has_cold:
            return
        told = next_ns - now_ns
        if settings.hint_error:
            told = int(told * float(np.exp(self._rng.normal(0.0, settings.hint_error))))
        if told > settings.demote_seconds * SECOND_NS:
            self._hint(ev.HintKind.DEMOTE, running.keys)
        load_ns = self._load_ns(0, len(running.keys))
        lead_ns = 2 * load_ns + round(settings.lead_seconds * SECOND_NS)
        at_ns = max(now_ns + 1, now_ns + told - lead_ns)
        self._hint(ev.HintKind.EXPECT, running.keys, at_ns)
        self.loop.post(at_ns, self._tick, None)

    def _hint(self, kind: ev.HintKind, keys: list[bytes], at_ns: int = 0) -> None:
        self.carrier.handle(ev.Hint(kind, keys, _SPACE, at_ns))

    def _tick(self, _nothing: None) -> None:
        self.carrier.handle(ev.Tick())


def simulate(
    trace: Trace,
    tiers: Tiers | str,
    costs: Costs | None = None,
    *,
    model: str = "llama-3-8b",
    gpu: str = "h100",
    policies: str | Mapping[str, str] = "lru",
    settings: EngineSettings | None = None,
    targets: PageTargets | None = None,
    log: list[bytes] | None = None,
) -> Outcome:
    """Run a trace through tiers, such as ``hbm=8GiB,dram=64GiB,nvme=1TiB``.

    costs: the roofline of `model` on `gpu`, where none are given. policies: one name for all tiers,
    or a name by tier ("hbm", "dram", "nvme"; "lru" for others). targets: page sizes. log: gets the
    lines of an event log, which `tierkv.plan.event_log.replay` takes. Raises ConfigError for what
    cannot be used.
    """
    if isinstance(tiers, str):
        tiers = Tiers.parse(tiers)
    if not trace.requests:
        raise ConfigError(f"{trace.name}: a trace without requests")
    engine = Engine(
        trace,
        tiers,
        costs or Costs.roofline(model, gpu),
        model=model,
        policies=policies,
        settings=settings or EngineSettings(),
        targets=targets,
        log=log,
    )
    return engine.run()
