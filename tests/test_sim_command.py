"""`tierkv sim`: what it answers, what it writes, and what it says of mistakes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pytest

from tierkv import __version__, cli
from tierkv.core.models import model_geometry
from tierkv.sim import Trace, open_trace
from tierkv.sim.capacity import Target, cheapest, policy_curve
from tierkv.sim.study import BINS, PARTS, Kind, Size, hits_of, run_study, timeline
from tierkv.sim.sweep import BASE, OPTIMUM, policy_names, run_cell

SMALL = "builtin:agents?hours=0.5&sessions=8"

#: A policy that gives up what came first, as a user would write it.
OWN = """
class MyFirstOut:
    may_refuse = False
    wants_names = False

    def __init__(self, pages):
        self.pages = {}

    def expect(self, names):
        pass

    def track(self, page, now_ns, about):
        self.pages[page] = None

    def touch(self, pages, now_ns):
        pass

    renew = touch

    def forget(self, page):
        self.pages.pop(page, None)

    def evict(self, count, is_evictable, now_ns, *, must=False):
        chosen = [page for page in self.pages if is_evictable(page)][:count]
        for page in chosen:
            del self.pages[page]
        return chosen

    def __len__(self):
        return len(self.pages)
"""

Simulate: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Simulate:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierkv", "sim", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def small() -> Trace:
    return open_trace(SMALL)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(OWN)
    return path


def cells(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out)["cells"]
    return found


def test_the_table_names_trace_version_part_and_what_was_made_up(simulate: Simulate) -> None:
    code, out, _ = simulate("--trace", SMALL, "--policies", "fifo")
    assert code == 0
    assert "builtin:agents" in out
    assert f"tierkv    {__version__}" in out
    assert "requests of the second half" in out
    assert "made up   everything: fitted to the agent sessions" in out
    for word in ("fifo", "LRU %", "optimum %", "gap closed %"):
        assert word in out


def test_cells_are_those_of_the_replays(simulate: Simulate, small: Trace) -> None:
    _, out, _ = simulate("--trace", SMALL, "--policies", "s3fifo", "--sizes", "5%", "--json")
    (cell,) = cells(out)
    capacity = small.unique_blocks * 5 // 100
    assert cell["blocks"] == capacity
    for key, name in {"hit": "s3fifo", "lru": BASE, "optimum": OPTIMUM}.items():
        assert cell[key] == run_cell(small, name, capacity).ratio(small, 0.5)
    gap = (cell["hit"] - cell["lru"]) / (cell["optimum"] - cell["lru"])
    assert cell["gap_closed"] == pytest.approx(gap)


@pytest.mark.parametrize(("half", "bounds"), [("first", (0, 0.5)), ("all", (0, 1))])
def test_the_part_that_is_scored_can_be_chosen(
    simulate: Simulate, small: Trace, half: str, bounds: tuple[float, float]
) -> None:
    arguments = ("--policies", "fifo", "--sizes", "300blocks", "--half", half, "--json")
    _, out, _ = simulate("--trace", SMALL, *arguments)
    assert cells(out)[0]["hit"] == run_cell(small, "fifo", 300).ratio(small, *bounds)


def test_a_size_in_bytes_is_the_models_blocks(simulate: Simulate) -> None:
    arguments = ("--policies", "lru", "--sizes", "2GiB,1%", "--model", "llama-3-8b", "--json")
    _, out, _ = simulate("--trace", SMALL, *arguments)
    block = 64 * model_geometry("llama-3-8b").token_bytes
    assert cells(out)[0]["blocks"] == (2 << 30) // block
    assert cells(out)[1]["bytes"] == cells(out)[1]["blocks"] * block


def test_all_policies_are_every_one_of_the_registry(simulate: Simulate) -> None:
    _, out, _ = simulate("--trace", SMALL, "--policies", "all", "--sizes", "5%", "--json")
    assert [cell["policy"] for cell in cells(out)] == policy_names()


def test_processes_find_what_one_does(small: Trace) -> None:
    kinds = [Kind("fifo"), Kind("ttl")]
    sizes = [Size(count, count / small.unique_blocks, None) for count in (100, 1000)]
    told: list[int] = []
    one = run_study(small, kinds, sizes, PARTS["all"], processes=1)
    two = run_study(
        small, kinds, sizes, PARTS["all"], processes=2, tell=lambda _n, done, _a: told.append(done)
    )
    assert list(one.rows()) == list(two.rows())
    assert told == list(range(1, 9))


def test_the_timeline_is_the_hits_of_its_spans(small: Trace) -> None:
    cell = run_cell(small, "lru", 2000)
    line = timeline(small, cell)
    assert len(line) == BINS
    span = -(-(small.duration_ns + 1) // BINS)
    chosen = small.arrival_ns // span == 3
    assert line[3] == cell.hit_tokens[chosen].sum() / small.input_tokens[chosen].sum()
    assert all(math.isnan(v) or 0 <= v <= 1 for v in line)


def test_a_policy_of_ones_own_joins_under_its_class_name(
    simulate: Simulate, own: Path, small: Trace
) -> None:
    arguments = ("--policies", "fifo", "--policy", f"{own}:MyFirstOut", "--sizes", "2%", "--json")
    code, out, _ = simulate("--trace", SMALL, *arguments)
    assert code == 0
    fifo, mine = cells(out)
    assert mine["policy"] == "MyFirstOut"
    assert mine["hit"] == fifo["hit"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("self.pages = {}", "self.pages = {}[0]", ":7: KeyError: 0"),
        ("self.pages[page] = None", "self.page[page] = None", ":13: AttributeError"),
        ("self.pages[page] = None", "raise SystemExit", ":13: SystemExit"),
        ("return chosen", "return [5 - 6]", "which is not tracked or not evictable"),
        ("return chosen", "return None", "has to give a list of at most"),
        ("class MyFirstOut:", "class MyFirstOut(:", ":2: SyntaxError"),
        ("class MyFirstOut:", "1 / 0\nclass MyFirstOut:", ":2: ZeroDivisionError"),
        ("class MyFirstOut:", "class Other:", "there is no class 'MyFirstOut'"),
        ("def evict(", "def evicts(", "is no policy, it has no evict"),
    ],
)
def test_a_broken_policy_is_a_message_with_file_and_line(
    simulate: Simulate, own: Path, before: str, after: str, said: str
) -> None:
    own.write_text(OWN.replace(before, after))
    code, _, err = simulate("--trace", SMALL, "--policy", f"{own}:MyFirstOut", "--policies", "lru")
    assert code == 2
    assert str(own) in err
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policies", "lruu"), "did you mean 'lru'?"),
        (("--policies", ","), "name one"),
        (("--policy", "nowhere.py:Mine"), "is no Python file"),
        (("--policy", "nowhere.py"), "write FILE.py:CLASS"),
        (("--sizes", "5"), "has no unit"),
        (("--sizes", "0%"), "above 0%"),
        (("--sizes", "101%"), "at most 100%"),
        (("--sizes", "8GiB"), "depends on --model NAME"),
        (("--sizes", "1B", "--model", "gpt2"), "less than one block"),
        (("--sizes", ""), "give 1 to 64"),
        (("--model", "gpt9"), "unknown model"),
        (("--half", "third"), "second, first or all"),
        (("--hints", "yes"), "on or off"),
        (("--setting", "seed"), "write KEY=VALUE"),
        (("--out", "report.pdf"), "has to end in .html"),
        (("--plot", "absent-folder/a.png"), "no such directory"),
        (("--plan", "--out", "report.html"), "--plan writes no file"),
        (("--trace", "absent.jsonl"), "no such file"),
        (("--trace", "builtin:agent"), "did you mean 'agents'?"),
    ],
)
def test_a_mistake_is_a_message_and_exit_2(
    simulate: Simulate, arguments: tuple[str, ...], said: str
) -> None:
    given = arguments if "--trace" in arguments else ("--trace", SMALL, *arguments)
    code, out, err = simulate(*given)
    assert code == 2
    assert said in err
    assert out == ""


def test_the_table_is_saved_with_what_is_needed_to_read_it(
    simulate: Simulate, tmp_path: Path
) -> None:
    path = tmp_path / "results.parquet"
    files = ("--save-table", path, "--plot", tmp_path / "hits.png")
    code, _, err = simulate("--trace", SMALL, "--policies", "fifo,ttl", *files)
    assert code == 0
    assert "results.parquet: written" in err
    frame = pl.read_parquet(path)
    assert frame.shape[0] == 8
    assert set(frame["policy"]) == {"fifo", "ttl"}
    assert set(frame["tierkv"]) == {__version__}
    assert frame["bytes"].dtype == pl.Int64
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "module"), [("--save-table", "polars"), ("--plot", "matplotlib")]
)
def test_an_absent_extra_is_named_before_the_work(
    simulate: Simulate,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    option: str,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    ending = {"--save-table": "parquet", "--plot": "png"}[option]
    code, _, err = simulate("--trace", SMALL, option, tmp_path / f"a.{ending}")
    assert code == 2
    assert module in err
    assert "tierkv-offload[sim]" in err


def test_bad_lines_are_counted_and_strict_stops(simulate: Simulate, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    good = {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}
    lines = [json.dumps({**good, "timestamp": n}) for n in range(4)]
    path.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n")
    code, out, _ = simulate("--trace", path, "--policies", "lru", "--sizes", "100%")
    assert code == 0
    assert "bad lines 1, left out" in out
    assert "trace.jsonl:3:" in out
    code, _, err = simulate("--trace", path, "--policies", "lru", "--strict")
    assert code == 2
    assert "trace.jsonl:3:" in err


def test_a_plan_reaches_its_target_with_the_sizes_it_names(
    simulate: Simulate, small: Trace
) -> None:
    target = ("--plan", "--target-hit", "0.5", "--policies", "ttl", "--json")
    code, out, _ = simulate("--trace", SMALL, *target)
    assert code == 0
    lru, ttl = json.loads(out)["answers"]
    assert run_cell(small, "lru", lru["nvme_blocks"]).ratio(small, 0.5) >= 0.5
    assert run_cell(small, "lru", lru["nvme_blocks"] - 1).ratio(small, 0.5) < 0.5
    assert run_cell(small, "lru", lru["dram_blocks"]).ratio(small, 0.5) >= 0.25
    assert ttl["policy"] == "ttl"


def test_a_plan_says_how_far_a_target_out_of_reach_can_be_had(
    simulate: Simulate, small: Trace
) -> None:
    most = hits_of(small, Kind(BASE), small.unique_blocks).ratio(small, 0.5)
    code, out, _ = simulate("--trace", SMALL, "--plan", "--target-hit", "1", "--policies", "lru")
    assert code == 0
    assert f"out of reach: {most:.2%} at most" in out


def test_where_dram_is_cheaper_a_plan_has_no_nvme(small: Trace) -> None:
    curve = policy_curve(small, Kind(BASE), PARTS["second"])
    answer = cheapest(curve, Target(0.5, 1.0, 2.0, 0.5, "gpt2"), 1 << 20)
    assert answer.nvme_blocks == 0
    assert answer.dram_blocks == curve.curve.smallest(0.5)
    assert answer.cost == pytest.approx((answer.dram_blocks or 0) / 1024)


def test_a_sampled_curve_states_its_error_against_full_replays() -> None:
    trace = open_trace("builtin:chat?hours=0.3")
    found = policy_curve(trace, Kind("fifo"), PARTS["all"], share=0.3)
    assert 0.1 < found.sampled < 0.6
    errors = [
        abs(run_cell(trace, "fifo", size).ratio(trace) - found.curve.at(size))
        for size in found.checked
    ]
    assert found.error == max(errors)
    assert found.error < 0.05
    assert bool(np.all(np.diff(found.curve.ratios) >= 0))
