"""The engine in simulated time: the planner that ships, on links that take time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.core.errors import ConfigError
from tierkv.core.geometry import PageTargets
from tierkv.core.models import model_geometry
from tierkv.core.tier import TierId
from tierkv.plan.event_log import replay as replay_log
from tierkv.plan.policies import POLICIES
from tierkv.sim import (
    Costs,
    EngineSettings,
    Outcome,
    Tiers,
    Trace,
    TraceBuilder,
    TraceFacts,
    open_trace,
    simulate,
)
from tierkv.sim.costs import Link
from tierkv.sim.engine import Engine
from tierkv.sim.fast import lru_hits
from tierkv.sim.replay import replay

SECOND: Final = 1_000_000_000
MODEL: Final = "gpt2"
BLOCK_TOKENS: Final = 16
BLOCK_BYTES: Final = model_geometry(MODEL).token_bytes * BLOCK_TOKENS
#: Pages of one block, and of four.
ONE: Final = PageTargets(warm_bytes=BLOCK_BYTES)
FOUR: Final = PageTargets(warm_bytes=4 * BLOCK_BYTES)
NO_TIME: Final = Link(0.0)
ROOFLINE: Final = Costs.roofline(MODEL, "h100")
AT_ONCE: Final = msgspec.structs.replace(
    ROOFLINE,
    prefill_seconds_per_token=0.0,
    prefill_seconds_per_pair=0.0,
    weights_seconds=0.0,
    decode_seconds_per_context_token=0.0,
    cold_to_host=NO_TIME,
    host_to_cold=NO_TIME,
    host_to_device=NO_TIME,
    device_to_host=NO_TIME,
)
PLAIN: Final = EngineSettings(slots=1, recompute=False, answers=False)
#: How many small logs are tried; the project's promise is about 10,000.
LOGS: Final = int(os.environ.get("TIERKV_SIM_LOGS", "60"))

#: Requests over few tokens, so that they share beginnings.
CHAINS: Final = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=30
)


def trace_of(
    chains: Sequence[Sequence[int]],
    step_ns: int = SECOND,
    *,
    output: int = 0,
    pause_ns: int = -1,
    sessions: int = 1,
) -> Trace:
    """Requests `step_ns` apart, each block named by its content and all before it."""
    builder = TraceBuilder("test", BLOCK_TOKENS, chained=False)
    for number, chain in enumerate(chains):
        builder.add(
            number * step_ns,
            np.array(chain, np.int64),
            input_tokens=len(chain) * BLOCK_TOKENS,
            output_tokens=output,
            session=number % sessions,
            pause_ns=pause_ns,
        )
    return builder.build(TraceFacts("test"))


def sizes(dram: int, nvme: int = 0, hbm: int = 0, targets: PageTargets = ONE) -> Tiers:
    """Tiers of so many pages of memory and disk, and blocks of HBM."""
    page = targets.warm_bytes
    return Tiers(dram * page, hbm * BLOCK_BYTES, nvme * page)


def run(
    trace: Trace,
    tiers: Tiers,
    costs: Costs = ROOFLINE,
    *,
    how: EngineSettings = PLAIN,
    policy: str = "lru",
    targets: PageTargets = ONE,
    log: list[bytes] | None = None,
) -> Outcome:
    return simulate(
        trace,
        tiers,
        costs,
        model=MODEL,
        policies=policy,
        settings=how,
        targets=targets,
        log=log,
    )


def blocks_hit(outcome: Outcome) -> list[int]:
    hits = sum(outcome.hit_tokens.values())
    return (np.asarray(hits) // BLOCK_TOKENS).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("policy", list(POLICIES))
def test_at_once_and_in_one_tier_it_hits_what_the_replay_hits(policy: str) -> None:
    @settings(deadline=None, max_examples=30)
    @given(chains=CHAINS, capacity=st.sampled_from([1, 2, 3, 5, 8, 130]))
    def holds(chains: list[list[int]], capacity: int) -> None:
        trace = trace_of(chains)
        outcome = run(trace, sizes(capacity), AT_ONCE, policy=policy)
        expected = replay(
            POLICIES.load(policy)(capacity), trace.starts, trace.blocks, capacity, trace.arrival_ns
        )

        assert blocks_hit(outcome) == expected.prefix_hits.tolist()

    holds()


def test_at_once_it_hits_what_the_fast_path_hits_on_a_generated_trace() -> None:
    trace = open_trace("builtin:shared?hours=0.05&seed=3&block_tokens=16")
    tiers = Tiers(512 * BLOCK_BYTES)
    outcome = run(trace, tiers, AT_ONCE)
    whole = trace.input_tokens // trace.block_tokens

    hits = np.minimum(lru_hits(trace, 512), whole)
    assert len(hits) > 100
    assert abs(int(hits.sum()) - sum(blocks_hit(outcome))) <= 0.02 * hits.sum()


@settings(deadline=None, max_examples=LOGS)
@given(
    chains=CHAINS,
    dram=st.integers(2, 6),
    nvme=st.sampled_from([0, 3, 40]),
    hbm=st.sampled_from([0, 0, 2, 9]),
    slots=st.sampled_from([1, 2, 8]),
    step_ns=st.sampled_from([1_000, 1_000_000, SECOND]),
    policy=st.sampled_from(list(POLICIES)),
    lookahead=st.sampled_from([0, 3]),
    targets=st.sampled_from([ONE, FOUR]),
    pause_ns=st.sampled_from([-1, 1_000_000, 90 * SECOND]),
    rate=st.sampled_from([0.0, 1e7, 1e9]),
    closed=st.booleans(),
)
def test_a_run_replays_conserves_and_lets_everything_go(
    chains: list[list[int]],
    dram: int,
    nvme: int,
    hbm: int,
    slots: int,
    step_ns: int,
    policy: str,
    lookahead: int,
    targets: PageTargets,
    pause_ns: int,
    rate: float,
    closed: bool,
) -> None:
    """Same instructions from the log; same outcome again; bytes as transferred; no pin stays."""
    link = Link(rate, 1e-5 if rate else 0.0)
    costs = msgspec.structs.replace(
        ROOFLINE, cold_to_host=link, host_to_cold=link, host_to_device=link, device_to_host=link
    )
    how = EngineSettings(
        slots=slots, hints=True, hint_error=0.3, lookahead=lookahead, closed=closed, seed=slots
    )
    trace = trace_of(chains, step_ns, output=20, pause_ns=pause_ns, sessions=3)
    tiers = sizes(dram, nvme, hbm, targets)
    log: list[bytes] = []
    engine = Engine(
        trace, tiers, costs, model=MODEL, policies=policy, settings=how, targets=targets, log=log
    )
    outcome = engine.run()

    assert replay_log(log).different == []
    assert outcome.is_same(run(trace, tiers, costs, how=how, policy=policy, targets=targets))
    planner, carrier = engine.planner, engine.carrier
    planner.check()
    assert not planner.leases
    assert not planner.tickets
    assert not planner.movement.flights
    assert not any(any(table.pins) for table in planner.tables.values())
    for way, channel in carrier.channels.items():
        if TierId.COLD in way:
            assert channel.moved_bytes == carrier.transferred_bytes[way]
        assert channel.moved_bytes >= carrier.transferred_bytes[way]
    assert (outcome.start_ns >= outcome.arrival_ns).all()
    assert (outcome.first_token_ns >= outcome.start_ns).all()
    assert (outcome.end_ns >= outcome.first_token_ns).all()
    hits = np.asarray(sum(outcome.hit_tokens.values()))
    computed = outcome.computed_tokens
    assert (np.maximum(1, outcome.input_tokens - hits) == computed).all()


@settings(deadline=None, max_examples=40)
@given(chains=CHAINS, slower=st.sampled_from([2.0, 30.0]))
def test_a_slower_link_lowers_no_ttft(chains: list[list[int]], slower: float) -> None:
    """With requests so far apart that nothing is under way when one comes."""
    trace, tiers = trace_of(chains, 3600 * SECOND), sizes(3, 40)
    fast = Link(1e9, 1e-5)
    slow = Link(1e9 / slower, 1e-5)
    quick, tardy = (
        run(trace, tiers, msgspec.structs.replace(ROOFLINE, cold_to_host=link, host_to_device=link))
        for link in (fast, slow)
    )
    assert (tardy.ttft_ns >= quick.ttft_ns).all()


def conversations(turns: int = 12, sessions: int = 10) -> Trace:
    """Sessions in turn, each of which goes on 100 seconds later, longer than before."""
    chains = [
        [session, *range(100, 104 + 4 * turn)]
        for turn in range(turns)
        for session in range(sessions)
    ]
    return trace_of(chains, 10 * SECOND, output=32, pause_ns=90 * SECOND, sessions=sessions)


def test_hints_bring_blocks_in_time_where_pauses_are_known() -> None:
    trace, tiers = conversations(), sizes(60, 2000)
    costs = msgspec.structs.replace(ROOFLINE, cold_to_host=Link(2e8, 1e-4))
    how = EngineSettings(recompute=False)
    without = run(trace, tiers, costs, how=how)
    told = run(trace, tiers, costs, how=msgspec.structs.replace(how, hints=True))

    assert without.prefetch_bytes["timely"] == 0
    assert told.prefetch_bytes["timely"] > 0.9 * sum(told.prefetch_bytes.values())
    assert told.ttft_seconds(0.5) < without.ttft_seconds(0.5)


def test_waiting_requests_are_fetched_ahead() -> None:
    trace, tiers = conversations(), sizes(150, 2000)
    costs = msgspec.structs.replace(ROOFLINE, cold_to_host=Link(2e8, 1e-4), weights_seconds=0.4)
    how = EngineSettings(slots=1, recompute=False)
    told = run(trace, tiers, costs, how=msgspec.structs.replace(how, lookahead=2))

    assert run(trace, tiers, costs, how=how).prefetch_bytes["timely"] == 0
    assert told.prefetch_bytes["timely"] > 0


def test_what_takes_longer_to_load_is_computed() -> None:
    trace = trace_of([[1, 2, 3, 4]] * 5)
    costs = msgspec.structs.replace(ROOFLINE, host_to_device=Link(1e3))
    loads = run(trace, sizes(8), costs)
    computes = run(trace, sizes(8), costs, how=msgspec.structs.replace(PLAIN, recompute=True))

    assert loads.hit_ratio == 0.8
    assert computes.hit_ratio == 0.0
    assert computes.ttft_ns.max() < loads.ttft_ns.max()


def test_a_prompt_larger_than_memory_is_read_in_pieces() -> None:
    chain = list(range(20))
    outcome = run(trace_of([chain, chain], 60 * SECOND, output=5000), sizes(4, 100))

    assert blocks_hit(outcome)[1] > 4


def test_an_answers_blocks_are_there_when_the_session_goes_on() -> None:
    trace = trace_of([[1, 2], [1, 2, 3, 4, 5]], output=2 * BLOCK_TOKENS, pause_ns=SECOND)
    how = msgspec.structs.replace(PLAIN, answers=True)

    assert blocks_hit(run(trace, sizes(9))) == [0, 2]
    assert blocks_hit(run(trace, sizes(9), how=how)) == [0, 4]


def test_a_tail_that_is_no_whole_block_is_not_stored() -> None:
    builder = TraceBuilder("test", BLOCK_TOKENS)
    for number in range(2):
        builder.add(number * SECOND, np.array([1, 2]), input_tokens=BLOCK_TOKENS + 5)
    outcome = run(builder.build(TraceFacts("test")), sizes(9))

    assert outcome.computed_tokens.tolist() == [BLOCK_TOKENS + 5, 5]


def test_one_slot_makes_requests_wait_and_the_wait_counts() -> None:
    trace = trace_of([[1], [2], [3]], 1, output=100)
    outcome = run(trace, sizes(9))

    assert (outcome.start_ns[1:] >= outcome.end_ns[:-1]).all()
    assert outcome.ttft_ns[2] > outcome.ttft_ns[1] > outcome.ttft_ns[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dram", "has no size"),
        ("dram=64", "no unit"),
        ("dram=64G", "did you mean"),
        ("drum=64GiB", "did you mean 'dram'"),
        ("hbm=8GiB", "'dram' is missing"),
        ("dram=1GiB,dram=2GiB", "twice"),
        ("", "has no size"),
    ],
)
def test_tiers_that_cannot_be_read_say_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Tiers.parse(text)


def test_tiers_are_read_and_shown_in_the_same_words() -> None:
    text = "hbm=8GiB,dram=64GiB,nvme=1TiB"
    assert str(Tiers.parse(text)) == text


def test_a_tier_of_less_than_a_page_and_an_unknown_policy_are_refused() -> None:
    trace = trace_of([[1]])
    with pytest.raises(ConfigError, match="less than 1 page"):
        run(trace, Tiers(BLOCK_BYTES // 2))
    with pytest.raises(ConfigError, match="did you mean 'lru'"):
        run(trace, sizes(4), policy="lruu")
    with pytest.raises(ConfigError, match="without requests"):
        run(trace.cut(0, 0), sizes(4))


def test_a_calibration_replaces_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "costs.yaml"
    path.write_text("model: llama-3-8b\ngpu: a100\ncold_to_host: {bytes_per_second: 3.0e+9}\n")
    costs = Costs.read(path)

    assert costs.cold_to_host == Link(3e9)
    assert costs.weights_seconds == Costs.roofline("llama-3-8b", "a100").weights_seconds
    path.write_text("prefil_seconds: 1\n")
    with pytest.raises(ConfigError, match="prefil_seconds"):
        Costs.read(path)
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        Costs.roofline("llama-3-8b", "h10")


def test_a_larger_gpu_and_more_ranks_compute_sooner() -> None:
    times = [
        Costs.roofline(model, gpu).prefill_seconds(4096, 0)
        for model, gpu in (
            ("llama-3-70b", "a100"),
            ("llama-3-70b", "h100"),
            ("llama-3-70b:tp8", "h100"),
        )
    ]
    assert times == sorted(times, reverse=True)
    assert 0.9 < times[1] < 1.6  # seconds: 4,096 tokens of 141 GFLOP at half of 989 TFLOP/s


def test_the_timeline_ends_with_the_totals() -> None:
    outcome = run(conversations(), sizes(60, 2000))
    line = outcome.timeline

    assert (np.diff(line.at_ns) >= 0).all()
    assert line.input_tokens[-1] == outcome.input_tokens.sum()
    for tier, tokens in outcome.hit_tokens.items():
        assert line.hit_tokens[tier][-1] == tokens.sum()
    assert set(outcome.summary()) >= {"hit_ratio", "ttft_seconds_p99", "moved_bytes_dram>nvme"}
