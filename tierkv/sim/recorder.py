"""Recorder: counts what a simulated run does, and makes its outcome. Single owner (the engine)."""

from __future__ import annotations

from typing import Final

import numpy as np

from tierkv.core.tier import TierId
from tierkv.plan.planner import Planner
from tierkv.sim.carrier import Carrier
from tierkv.sim.costs import Costs
from tierkv.sim.links import SECOND_NS
from tierkv.sim.outcome import Moved, Outcome, Timeline, Times
from tierkv.sim.stack import NAMES, Tiers
from tierkv.sim.trace import Trace

#: At most so many samples are kept: when there are more, every second one goes.
_SAMPLES_MAX: Final = 512
_LABELS: Final = {tier: name for name, tier in NAMES.items()}


class Recorder:
    """See the module. The arrays are (n,), by request, -1 until known."""

    def __init__(
        self, trace: Trace, tiers: Tiers, costs: Costs, planner: Planner, token_bytes: int
    ) -> None:
        n = trace.requests
        self.arrival_ns, self.start_ns, self.first_token_ns, self.end_ns = (
            [-1] * n for _ in range(4)
        )
        self.block_events = 0
        self._step_ns = max(1, trace.duration_ns // (_SAMPLES_MAX - 2))
        self._computed = [0] * n
        self._hits = {tier: [0] * n for tier in planner.tables}
        self._trace = trace
        self._tiers = tiers
        self._costs = costs
        self._planner = planner
        self._token_bytes = token_bytes
        self._counted = planner.stats.declare("tierkv_hit_tokens_total")
        self._input: list[int] = trace.input_tokens.tolist()
        self._gpu_ns = self._busy_since_ns = self._at_work = 0
        self._joules = 0.0
        self._begun_tokens = 0
        self._read_tokens = dict.fromkeys(planner.tables, 0)
        self._samples: list[tuple[int, ...]] = []

    def hits_so_far(self) -> dict[TierId, int]:
        """Tokens that the planner has granted from each tier."""
        counted = self._counted
        return {tier: counted.get((tier.label,), 0) for tier in self._hits}

    def prefilled(self, number: int, computed: int, sources: dict[TierId, int], hit: int) -> int:
        """A prefill begins; gives how long it takes, in ns. `sources`: tokens granted by tier."""
        left = min(hit, self._input[number])
        for tier, tokens in sources.items():
            read = min(tokens, left)
            left -= read
            self._hits[tier][number] = read
            self._read_tokens[tier] += read
        self._computed[number] = computed
        self._begun_tokens += self._input[number]
        context = self._input[number] - computed
        self._joules += self._costs.prefill_joules(computed, context)
        return round(self._costs.prefill_seconds(computed, context) * SECOND_NS)

    def decoded(self, output: int, batch: int, context: int, batch_context: int) -> int:
        """A request decodes `output` tokens beside others; gives how long that takes, in ns."""
        if not output:
            return 0
        took = round(output * self._costs.step_seconds(batch, batch_context) * SECOND_NS)
        self._joules += self._costs.decode_joules(output, batch, context, self._token_bytes)
        return took

    def works(self, more: int, now_ns: int) -> None:
        """So many prefills or decodings more (or fewer, below 0) are on the GPU."""
        if not self._at_work:
            self._busy_since_ns = now_ns
        self._at_work += more
        if not self._at_work:
            self._gpu_ns += now_ns - self._busy_since_ns

    def look(self, now_ns: int) -> int:
        """Take a sample; gives the time of the next."""
        pages = [len(table.pool.owner) for table in self._planner.tables.values()]
        hits = self._read_tokens.values()
        self._samples.append((now_ns, self._begun_tokens, *pages, *hits))
        if len(self._samples) > _SAMPLES_MAX:
            del self._samples[1:-1:2]
            self._step_ns *= 2
        return now_ns - now_ns % self._step_ns + self._step_ns

    def outcome(self, carrier: Carrier) -> Outcome:
        """All requests have ended, and all transfers."""
        stats = self._planner.stats
        prefetched = {
            how: stats.get("tierkv_prefetch_bytes_total", how)
            for how in ("timely", "late", "wasted")
        }
        evicted = {t: stats.get("tierkv_evicted_pages_total", t.label) for t in self._hits}
        tables = self._planner.tables
        events = self.block_events + carrier.blocks_moved
        events += sum(pages * tables[tier].page_blocks for tier, pages in evicted.items())
        links = {
            f"{_LABELS[source]}>{_LABELS[target]}": Moved(channel.moved_bytes, channel.busy_ns)
            for (source, target), channel in carrier.channels.items()
        }
        return Outcome(
            tiers=self._tiers,
            costs=self._costs,
            arrival_ns=_times(self.arrival_ns),
            start_ns=_times(self.start_ns),
            first_token_ns=_times(self.first_token_ns),
            end_ns=_times(self.end_ns),
            input_tokens=self._trace.input_tokens.astype(np.int64),
            output_tokens=self._trace.output_tokens.astype(np.int64),
            computed_tokens=_times(self._computed),
            hit_tokens={_LABELS[tier]: _times(found) for tier, found in self._hits.items()},
            moved=links,
            prefetch_bytes={**prefetched, "unused": self._planner.movement.prefetches.held_bytes},
            evicted_pages={_LABELS[tier]: pages for tier, pages in evicted.items()},
            block_events=events,
            gpu_ns=self._gpu_ns,
            joules=self._joules + self._link_joules(carrier),
            timeline=self._timeline(),
        )

    def _link_joules(self, carrier: Carrier) -> float:
        costs, joules = self._costs, 0.0
        for way, channel in carrier.channels.items():
            far = costs.joules_per_nvme_byte
            if TierId.DEVICE in way:
                far = costs.joules_per_link_byte + costs.joules_per_device_byte
            joules += channel.moved_bytes * (far + costs.joules_per_host_byte)
        return joules * costs.gpus

    def _timeline(self) -> Timeline:
        table = np.array(self._samples, np.int64)
        names = [_LABELS[tier] for tier in self._hits]
        pages = {name: table[:, 2 + place] for place, name in enumerate(names)}
        hits = {name: table[:, 2 + len(names) + place] for place, name in enumerate(names)}
        return Timeline(table[:, 0], table[:, 1], pages, hits)


def _times(values: list[int]) -> Times:
    return np.array(values, np.int64)
