"""Generators: the same seed gives the same trace, and one that is like what it was fitted to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tierkv import cli
from tierkv.core.errors import ConfigError
from tierkv.sim import Stop, Trace, open_trace
from tierkv.sim.generator import GENERATORS, base
from tierkv.sim.summary import summarise
from tierkv.sim.trace import ARRAYS

ROOT = Path(__file__).resolve().parent.parent
NAMES = list(GENERATORS)

#: Requests, references and unique blocks of the small chat.
GOLDEN_CHAT = (917, 19_817, 15_714)

#: A small trace of each.
SMALL = {
    "chat": "hours=0.1",
    "agents": "hours=0.5&sessions=8",
    "rag": "hours=6",
    "shared": "hours=0.1",
    "shift": "hours=0.2",
    "mix": "hours=0.1",
}


def small(name: str, more: str = "") -> Trace:
    return open_trace(f"builtin:{name}?{SMALL[name]}{more}")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_trace(name: str) -> None:
    one, other, another = small(name), small(name), small(name, "&seed=2")
    one.check()
    for array in ARRAYS:
        np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
    assert one.facts == other.facts
    assert one.facts.digest != another.facts.digest
    assert one.blocks.tolist() != another.blocks.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_up_is_said(name: str) -> None:
    facts = small(name).facts
    assert facts.format == "builtin"
    assert facts.synthesised[0].startswith("everything: ")
    assert facts.settings["seed"] == "1"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["16", "100", "512"])
def test_any_size_of_block_makes_a_tree(name: str, size: str) -> None:
    trace = small(name, f"&block_tokens={size}")
    trace.check()
    assert trace.block_tokens == int(size)


def test_pauses_after_a_tool_call_are_known_and_lead_to_the_next_request() -> None:
    trace = small("agents")
    order = np.lexsort((trace.arrival_ns, trace.session))
    for before, after in pairwise(order):
        if trace.session[before] == trace.session[after]:
            assert trace.stop[before] in (Stop.TOOL, Stop.END)
            ends = trace.arrival_ns[before] + trace.busy_ns[before]
            assert abs(ends + trace.pause_ns[before] - trace.arrival_ns[after]) < 1000
    assert (trace.pause_ns[trace.stop == Stop.TOOL] > 0).all()
    assert (trace.stop == Stop.TOOL).mean() > 0.8


def test_parts_of_a_mix_are_tenants_that_share_nothing() -> None:
    trace = small("mix")
    owner: dict[int, int] = {}
    kinds = np.minimum(trace.tenant, 3)
    for i in range(trace.requests):
        for block in set(trace.blocks[trace.starts[i] : trace.starts[i + 1]].tolist()):
            assert owner.setdefault(block, int(kinds[i])) == kinds[i]
    assert sorted(set(kinds.tolist())) == [0, 1, 2, 3]
    alone = open_trace("builtin:mix?hours=0.1&chat=0&agents=0&rag=0")
    assert alone.tenant.min() == 3


def test_load_shifts_from_phase_to_phase() -> None:
    trace = open_trace("builtin:shift?hours=0.8&phases=4")
    phase = np.minimum(trace.arrival_ns // (720 * 10**9), 3)
    chat = [float((trace.tenant[phase == k] == 0).mean()) for k in range(4)]
    assert chat[0] > 0.5
    assert chat[2] < 0.3


def test_one_generator_by_its_golden_figures() -> None:
    """A change of these is a change of every figure that was ever measured on the generator."""
    found = summarise(small("chat"))
    assert (found.requests, found.references, found.unique_blocks) == GOLDEN_CHAT


@pytest.mark.parametrize(
    ("name", "low", "high"), [("chat", 0.30, 0.40), ("agents", 0.93, 0.98), ("rag", 0.29, 0.38)]
)
def test_fitted_generators_come_near_the_hit_ceiling_of_their_trace(
    name: str, low: float, high: float
) -> None:
    assert low < summarise(open_trace(f"builtin:{name}")).prefix_hit_max < high


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("builtin:chit", "did you mean 'chat'"),
        ("builtin:chat?sed=1", "unknown setting 'sed'"),
        ("builtin:chat?hours", "hours"),
        ("builtin:chat?hours=0", "hours"),
        ("builtin:chat?seed=-1", "seed"),
        ("builtin:chat?&&", "builtin:chat"),
        ("builtin:chat?rate=1e5&hours=700", "arrivals"),
        ("builtin:chat?rate=1e-5&hours=0.001", "no request"),
    ],
)
def test_what_cannot_be_generated_is_said(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_trace(spec)
    with pytest.raises(ConfigError, match="no format"):
        open_trace("builtin:chat", format="jsonl")


def test_a_generator_stops_before_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "REQUESTS_MAX", 10)
    with pytest.raises(ConfigError, match="more than 10 requests"):
        small("agents")


def test_quantiles_are_drawn_from_their_table() -> None:
    table = base.Quantiles(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    rng = np.random.Generator(np.random.PCG64(1))
    drawn = np.array([table.draw(rng) for _ in range(4000)])
    assert 1 <= drawn.min() <= drawn.max() <= 11
    np.testing.assert_allclose(np.percentile(drawn, (25, 50, 75)), (5, 6, 7), rtol=0.05)
    with pytest.raises(ValueError, match="levels"):
        base.Quantiles(1, 2)


# ---- the command


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trace_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierkv", "trace", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else int(code is not None), out, err)

    return run


def test_info_says_what_is_in_a_trace(trace_command: Command) -> None:
    code, out, err = trace_command("info", "builtin:agents?hours=0.5&sessions=8")
    assert (code, err) == (0, "")
    for text in ("requests", "prefix hit at most", "used once", "block used again", "everything: "):
        assert text in out


def test_info_as_json_can_be_parsed(trace_command: Command) -> None:
    code, out, _ = trace_command("info", "builtin:chat", "--json", "--setting", "hours=0.1")
    shown = json.loads(out)
    assert code == 0
    assert shown["requests"] == GOLDEN_CHAT[0]
    assert shown["facts"]["settings"]["hours"] == "0.1"


def test_what_was_generated_can_be_converted_and_looked_at(
    trace_command: Command, tmp_path: Path
) -> None:
    one, other = tmp_path / "t.jsonl.zst", tmp_path / "t.parquet"
    code, out, _ = trace_command(
        "generate", "rag", str(one), "--seed", "3", "--setting", "hours=6", "--setting", "rate=0.01"
    )
    assert code == 0
    assert "requests" in out
    assert trace_command("convert", str(one), str(other))[0] == 0
    trace = open_trace(str(other))
    assert trace.name == "builtin:rag"
    assert trace.facts.settings["seed"] == "3"
    np.testing.assert_array_equal(trace.blocks, open_trace(str(one)).blocks)


def test_bad_lines_are_shown_and_strict_stops_at_the_first(
    trace_command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "m.jsonl"
    good = {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}
    path.write_text(json.dumps(good) + "\n{}\n" * 12, encoding="utf-8")
    code, out, _ = trace_command("info", str(path))
    assert code == 0
    assert "12" in out
    assert "m.jsonl:2: " in out
    code, out, err = trace_command("info", str(path), "--strict")
    assert (code, out) == (2, "")
    assert err.startswith("m.jsonl:2: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "absent.jsonl"),
        ("info", "builtin:chat", "--setting", "hours"),
        ("info", "builtin:nothing"),
        ("generate", "chat", "out.csv", "--setting", "hours=0.1"),
    ],
)
def test_a_mistake_is_a_message_with_exit_code_2(
    arguments: tuple[str, ...], trace_command: Command
) -> None:
    code, out, err = trace_command(*arguments)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


def test_the_fit_can_be_printed_where_the_traces_are(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "fit_generator.py")]
    command += ["--traces", str(tmp_path / "absent")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "no traces there" in done.stderr
