"""Formats of traces on small inputs of each, and on the public traces where they are there."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tierkv.core.errors import ConfigError
from tierkv.core.tier import TierId
from tierkv.plan import event_log, events
from tierkv.plan.spec import NamespaceSpec, PlanSpec, TierPlan
from tierkv.sim import Stop, Trace, open_trace
from tierkv.sim.chaining import chained_ids
from tierkv.sim.formats import TRACES
from tierkv.sim.opening import format_of
from tierkv.sim.summary import summarise

S = 1_000_000_000
ROOT = Path(__file__).resolve().parent.parent
PUBLIC = Path(os.environ.get("TIERKV_TRACES", ROOT.parent / "shared" / "traces"))

needs_traces = pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public traces are not here")


def written(path: Path, rows: Iterable[object]) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def chains(trace: Trace) -> list[list[int]]:
    trace.check()
    pairs = zip(trace.starts[:-1], trace.starts[1:], strict=True)
    return [trace.blocks[low:high].tolist() for low, high in pairs]


# ---- mooncake


def test_mooncake_ids_may_be_content(tmp_path: Path) -> None:
    rows = [
        {"timestamp": at, "input_length": 60, "output_length": 5, "hash_ids": ids}
        for at, ids in ((1500, [1, 2]), (2500, [2, 1]), (3500, [1, 2]))
    ]
    path = written(tmp_path / "g.jsonl", rows)
    assert open_trace(path, settings={"block_tokens": "32"}).facts.bad_lines == 1
    trace = open_trace(path, settings={"block_tokens": "32", "ids": "content"})
    assert chains(trace) == [[0, 1], [2, 3], [0, 1]]
    assert trace.arrival_ns.tolist() == [0, S, 2 * S]
    assert trace.facts.synthesised


# ---- agents


def turn(t: float, ids: list[int], **more: object) -> dict[str, object]:
    return {"t": t, "type": "n", "in": 4 * len(ids) + 1, "out": 3, "hash_ids": ids, **more}


def session(requests: list[dict[str, object]], **more: object) -> dict[str, object]:
    return {
        "block_size": 4,
        "hash_id_scope": "local",
        "tool_tokens": 5,
        "system_tokens": 3,
        "requests": requests,
    } | more


ALONE = {"spread": "0", "cut": "0"}


def agents(folder: Path, sessions: list[dict[str, object]], **settings: str) -> Trace:
    folder.mkdir(exist_ok=True)
    for number, entry in enumerate(sessions):
        (folder / f"s{number:03}.json").write_text(json.dumps(entry), encoding="utf-8")
    return open_trace(str(folder), settings=ALONE | settings)


def test_sessions_share_their_prompt_and_nothing_else(tmp_path: Path) -> None:
    one, other = session([turn(0, [1, 2, 3])]), session([turn(1, [7, 8, 3, 4])])
    apart = session([turn(2, [1, 2])], tool_tokens=6)
    trace = agents(tmp_path / "a", [one, other, apart])
    assert chains(trace) == [[0, 1, 2], [0, 1, 3, 4], [5, 6]]
    assert any("tool_tokens" in text for text in trace.facts.synthesised)
    alone = open_trace(str(tmp_path / "a"), settings=ALONE | {"share": "none"})
    assert alone.unique_blocks == 9


def test_a_request_that_leaves_the_prompt_shares_only_what_precedes(tmp_path: Path) -> None:
    one = session([turn(0, [1, 2, 3]), turn(1, [1, 9])])
    other = session([turn(2, [4, 5])])
    assert chains(agents(tmp_path / "a", [one, other])) == [[0, 1, 2], [0, 3], [0, 1]]


def test_stops_pauses_and_times_of_running_are_those_of_the_session(tmp_path: Path) -> None:
    turns = [
        turn(0, [1], stop="tool_use", api_time=2.5),
        turn(10, [1, 2], stop="end_turn", api_time=4.0, think_time=7.0),
        turn(30, [1, 2, 3], stop="", think_time=None),
        turn(31, [1, 2, 3], stop="max_tokens", api_time=1.0),
        turn(31.5, [1, 2, 3], stop="tool_use", api_time=1.0),
    ]
    trace = agents(tmp_path / "a", [session(turns)])
    assert trace.stop.tolist() == [Stop.TOOL, Stop.END, Stop.UNKNOWN, Stop.LENGTH, Stop.TOOL]
    assert (trace.pause_ns / S).tolist() == pytest.approx([7, 16, -1 / S, 0, -1 / S])
    assert (trace.busy_ns / S).tolist() == pytest.approx([2.5, 4, -1 / S, 1, 1])
    assert trace.session.tolist() == [0] * 5


def test_a_sub_agent_is_a_thread_whose_times_count_from_its_start(tmp_path: Path) -> None:
    inner = {"t": 5.0, "type": "subagent", "requests": [turn(0, [9]), turn(2, [9, 10])]}
    trace = agents(tmp_path / "a", [session([turn(0, [1]), inner, turn(20, [1, 2])])])
    assert (trace.arrival_ns / S).tolist() == [0, 5, 7, 20]
    assert trace.session.tolist() == [0, 1, 1, 0]
    assert trace.unique_blocks == 4


def nested(depth: int) -> dict[str, object]:
    return (
        turn(0, [1]) if not depth else {"t": 0, "type": "subagent", "requests": [nested(depth - 1)]}
    )


def test_a_session_that_cannot_be_is_left_out_and_named(tmp_path: Path) -> None:
    bad = [
        session([nested(30)]),
        session([turn(0, [1])], block_size=8),
        session([turn(0, [1])], hash_id_scope="global"),
        session([turn(0, [1 << 40])]),
        session([{"t": -1, "hash_ids": [1]}]),
        session([turn(0, [1, 2, 3]), turn(1, [3])]),
    ]
    trace = agents(tmp_path / "a", [session([turn(0, [1])]), *bad], copies="keep")
    assert trace.requests == 2
    assert [text.split(":")[0] for text in trace.facts.problems] == [
        f"s{number:03}.json" for number in range(1, 7)
    ]


def test_how_sessions_are_laid_side_by_side_is_chosen(tmp_path: Path) -> None:
    sessions = [session([turn(0, [1, *range(5, 5 + n)]), turn(50, [1])]) for n in range(20)]
    even = {"spread": "100", "share": "none"}
    one = agents(tmp_path / "a", sessions, **even)
    again, other = (
        agents(tmp_path / "a", sessions, **even),
        agents(tmp_path / "a", sessions, **even, seed="8"),
    )
    np.testing.assert_array_equal(one.arrival_ns, again.arrival_ns)
    assert one.arrival_ns.tolist() != other.arrival_ns.tolist()
    assert one.duration < 150
    assert agents(tmp_path / "a", sessions, **even, rate="10").duration < 60.5
    cut = agents(tmp_path / "a", sessions, **even, cut="40")
    assert cut.duration < 40
    assert cut.requests < 20
    parts = [agents(tmp_path / "a", sessions, **even, every=f"2,{k}") for k in (0, 1)]
    assert sorted(part.requests for part in parts) == [20, 20]
    assert "seed 8" in other.facts.synthesised[0]


def test_copies_of_a_session_are_read_once_unless_they_are_wanted(tmp_path: Path) -> None:
    sessions = [session([turn(0, [1, 2]), turn(4, [1, 2, 3])])] * 3
    assert agents(tmp_path / "a", sessions).requests == 2
    assert agents(tmp_path / "a", sessions, copies="keep").requests == 6


@pytest.mark.parametrize(
    "wrong", [{"every": "2,2"}, {"every": "0,0"}, {"every": "x"}, {"rate": "0"}, {"copies": "some"}]
)
def test_settings_of_agents_that_cannot_be_are_refused(
    wrong: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="agents"):
        agents(tmp_path / "a", [session([turn(0, [1])])], **wrong)


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_an_archive_of_sessions_is_read_as_its_directory_is(suffix: str, tmp_path: Path) -> None:
    sessions = [session([turn(n, [1, 2, n + 3])]) for n in range(3)]
    apart = agents(tmp_path / "a", sessions)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(tmp_path / "a", "traces")
    data = buffer.getvalue()
    path = tmp_path / f"t{suffix}"
    path.write_bytes(zstandard.compress(data) if suffix.endswith("zst") else data)
    trace = open_trace(str(path), settings=ALONE)
    np.testing.assert_array_equal(trace.blocks, apart.blocks)
    np.testing.assert_array_equal(trace.arrival_ns, apart.arrival_ns)


# ---- ragpulse


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=8), max_size=8),
    st.integers(1, 5),
)
def test_blocks_of_pieces_are_equal_where_all_tokens_before_are(
    prompts: list[list[tuple[int, int]]], size: int
) -> None:
    lengths = {0: 1, 1: 2, 2: 5, 3: 7}
    names: dict[int, tuple[tuple[int, int], ...]] = {}
    seen: dict[tuple[tuple[int, int], ...], int] = {}
    for prompt in prompts:
        pieces = [(content, lengths[content]) for content, _ in prompt]
        tokens = tuple((content, at) for content, length in pieces for at in range(length))
        ids = chained_ids(pieces, size).tolist()
        assert len(ids) == -(-len(tokens) // size)
        for k, block in enumerate(ids):
            path = tokens[: (k + 1) * size]
            assert seen.setdefault(path, block) == block
            assert names.setdefault(block, path) == path


def ragpulse(folder: Path) -> Path:
    folder.mkdir()
    ids = {"sys_prompt": [1], "passages_ids": [2, 3], "history": [], "web_search": []}
    rows = [
        {"timestamp": at, "hash_ids": ids | {"user_input": [asked]}, "session_id": name}
        for at, asked, name in (("5", 4, "a"), ("7", 5, "b"), ("8", 77, "b"), ("x", 5, "b"))
    ]
    written(folder / "0_trace.jsonl", rows)
    for name, key, lengths in (
        ("1_sys_prompt", "sys_prompt_id", {1: 16}),
        ("2_passages", "passage_id", {2: 20, 3: 12}),
        ("3_history", "history_id", {}),
        ("4_user_input", "user_input_id", {4: 3, 5: 17}),
        ("5_web_search", "web_search_id", {}),
    ):
        written(folder / f"{name}.jsonl", ({key: k, "token_length": n} for k, n in lengths.items()))
    return folder


def test_components_become_a_chain_of_blocks(tmp_path: Path) -> None:
    folder = ragpulse(tmp_path / "r")
    for path in (folder, folder / "0_trace.jsonl"):
        trace = open_trace(str(path))
        assert chains(trace) == [[0, 1, 2, 3], [0, 1, 2, 4, 5]]
        assert trace.input_tokens.tolist() == [51, 65]
        assert trace.session.tolist() == [0, 1]
        assert [text.split(" ")[0] for text in trace.facts.problems] == [
            "0_trace.jsonl:3:",
            "0_trace.jsonl:4:",
        ]
    (folder / "3_history.jsonl").unlink()
    with pytest.raises(ConfigError, match="3_history"):
        open_trace(str(folder))


# ---- lengths


AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.9799600,100,10",
    "2023-11-16 18:17:05.9799600,200,10",
    "2023-11-16 18:17:06,ten,10",
    "2023-11-16 18:17:06,10",
    "2024-05-10 00:00:00.009930+00:00,300,10",
]


def test_lengths_get_blocks_by_a_model_that_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "azure.csv", AZURE)
    settings = {"returns": "1", "block_tokens": "10", "within": "60"}
    trace = open_trace(path, settings=settings)
    one, other, late = chains(trace)
    assert other[:10] == one  # the second goes on with the first, the third comes too late
    assert not set(late) & set(other)
    assert trace.session.tolist() == [0, 0, 1]
    assert trace.facts.bad_lines == 2
    assert "100% go on" in trace.facts.synthesised[0]
    assert (
        open_trace(path, settings=settings | {"returns": "0", "prompt": "50"}).unique_blocks == 50
    )


def test_burstgpt_sessions_and_models_keep_to_themselves(tmp_path: Path) -> None:
    rows = [
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Log Type",
        "1,a,2.5,GPT-4,64,64,Conversation log",
        "9,a,,GPT-4,192,64,Conversation log",
        "9,a,,ChatGPT,192,64,Conversation log",
        "10,b,,GPT-4,0,0,Conversation log",
    ]
    trace = open_trace(written(tmp_path / "b.csv", rows), settings={"block_tokens": "64"})
    assert chains(trace) == [[0], [0, 1, 2], [3, 4, 5]]
    assert trace.tenant.tolist() == [0, 0, 1]
    assert trace.busy_ns.tolist() == [2.5 * S, -1, -1]
    assert trace.facts.bad_lines == 1


# ---- engines


def lookup(at: float, hashes: list[str], **more: object) -> dict[str, object]:
    return {
        "timestamp": 1711929600 + at,
        "request_id": "r",
        "model_name": "m",
        "chunk_size": 256,
        "seq_len": 256 * len(hashes) + 5,
        "chunk_hashes": hashes,
    } | more


def test_lookups_of_lmcache_are_requests(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    written(folder / "lookup_hashes_1.jsonl", [lookup(0, ["0xa", "0xb"]), lookup(2, ["0xa"])])
    written(
        folder / "lookup_hashes_2.jsonl",
        [lookup(3, ["0xa"], model_name="n"), lookup(4, ["0xb"]), lookup(5, ["0xa"], chunk_size=8)],
    )
    trace = open_trace(str(folder))
    assert chains(trace) == [[0, 1], [0], [2]]
    assert trace.tenant.tolist() == [0, 0, 1]
    assert trace.facts.problems[0].startswith("lookup_hashes_2.jsonl:2: ")
    assert open_trace(str(folder / "lookup_hashes_1.jsonl")).requests == 2


def stored(hashes: list[object], parent: object, **more: object) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": [],
        "block_size": 16,
        "lora_id": None,
    } | more


def test_stored_blocks_become_requests_with_their_whole_chain(tmp_path: Path) -> None:
    rows: list[object] = [
        {"ts": 100.0, "events": [stored([1, 2], None), stored(["ff"], None)]},
        [101.0, [["BlockStored", [3], 2, [], 16, None, "GPU"]], 0],  # the same request, next chunk
        {"ts": 150.0, **stored([4], 3)},  # the next turn
        [160.0, [["BlockRemoved", [1]], ["AllBlocksCleared"]]],
        {"ts": 170.0, "events": [stored([1, 2], None), stored([9], None, medium="CPU")]},
        {"ts": 171.0, "events": [{"type": "Surprise"}]},
        {"events": []},
        {"ts": 180.0, "events": [stored([7], 6)]},
    ]
    path = written(tmp_path / "e.jsonl", rows)
    for form in (None, "vllm", "sglang"):
        trace = open_trace(path, format=form)
        assert sorted(chains(trace)) == sorted([[0, 1, 2], [3], [0, 1, 2, 4], [0, 1], [5, 6]])
        assert trace.arrival_ns[-1] == 80 * S
        assert trace.facts.bad_lines == 2
        text = " ".join(trace.facts.synthesised)
        assert "1 removals, 1 clearings, 1 stores" in text
        assert "1 stores whose parent" in text


def test_our_own_event_log_is_a_trace(tmp_path: Path) -> None:
    spec = PlanSpec(
        tiers={TierId.HOST: TierPlan(8, 1)},
        namespaces=[NamespaceSpec("default", b"r" * 16), NamespaceSpec("b", b"s" * 16)],
        block_tokens=16,
        block_bytes=64,
    )
    a, b, c, d = (bytes([n]) * 16 for n in range(1, 5))
    happened: list[tuple[int, events.AnyEvent]] = [
        (0, events.Put([a, b], 0, "default")),
        (5 * S, events.Acquire([a, b], 0, 2, "default")),
        (6 * S, events.Release(1)),
        (7 * S, events.Put([a, b, c], 2, "default")),
        (8 * S, events.Acquire([a, b, c], 0, 1, "default")),
        (8 * S, events.Acquire([a, b, c], 1, 2, "default")),  # the next window
        (9 * S, events.Put([d], 0, "b")),
    ]
    lines = [event_log.head_line(spec), *(event_log.entry_line(t, e, []) for t, e in happened)]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines) + b"[1, 2]\n")
    trace = open_trace(str(path))
    assert chains(trace) == [[0, 1], [0, 1, 2], [0, 1, 2], [3]]
    assert (trace.arrival_ns / S).tolist() == [0, 5, 8, 9]
    assert trace.tenant.tolist() == [0, 0, 0, 1]
    assert trace.facts.bad_lines == 1


def test_every_format_is_told_from_its_content(tmp_path: Path) -> None:
    mooncake = {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}
    paths: Mapping[str, str] = {
        "mooncake": written(tmp_path / "1", [mooncake]),
        "azure": written(tmp_path / "2", AZURE),
        "burstgpt": written(tmp_path / "3", ["Timestamp,Model,Request tokens,Response tokens"]),
        "lmcache": written(tmp_path / "4", [lookup(0, ["0x1"])]),
        "vllm": written(tmp_path / "5", [[1.0, [["AllBlocksCleared"]]]]),
        "agents": written(tmp_path / "6", [session([])]),
        "ragpulse": str(ragpulse(tmp_path / "7")),
        "jsonl": written(tmp_path / "8", [{"tierkv_trace": 1}]),
    }
    for name, path in paths.items():
        assert format_of(Path(path)).name == name
    with pytest.raises(ConfigError, match="no known format"):
        format_of(Path(written(tmp_path / "9", ["hello"])))


DEEP = b'{"x": ' + b"[" * 100_000 + b"\n" + b'{"requests": [' * 20_000


@pytest.mark.parametrize("name", list(TRACES))
@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 9, b"[]\n{}\n1\n", b"a,b\n1,2\n", DEEP])
def test_no_format_falls_over_what_it_cannot_read(
    name: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=tmp_path.name):
        open_trace(str(path), format=name)


# ---- the public traces


@needs_traces
@pytest.mark.parametrize(
    ("name", "requests", "references", "unique", "hit"),
    [
        ("mooncake/conversation_trace.jsonl.zst", 12_031, 288_500, 182_790, 0.3736),
        ("mooncake/synthetic_trace.jsonl.zst", 3_993, 121_877, 43_924, 0.6512),
        ("ragpulse", 7_106, 1_306_687, 895_811, 0.3153),
    ],
)
def test_public_traces_have_the_known_figures(
    name: str, requests: int, references: int, unique: int, hit: float
) -> None:
    trace = open_trace(str(PUBLIC / name), strict=True, keep=False)
    trace.check()
    found = summarise(trace)
    assert (found.requests, found.references, found.unique_blocks) == (requests, references, unique)
    assert found.prefix_hit_max == pytest.approx(hit, abs=0.00006)


@needs_traces
@pytest.mark.parametrize(("name", "requests"), [("code", 8_819), ("conv", 19_366)])
def test_azure_is_read_whole(name: str, requests: int) -> None:
    path = PUBLIC / "azure2023" / f"AzureLLMInferenceTrace_{name}.csv.zst"
    trace = open_trace(str(path), strict=True, keep=False)
    trace.check()
    assert trace.requests == requests
    assert 3400 < trace.duration < 3600


@needs_traces
@pytest.mark.slow
def test_public_agent_sessions_have_the_known_figures() -> None:
    path = PUBLIC / "kv-cache-tester" / "cc_public.tar.zst"
    everything = {"copies": "keep", "cut": "0"}
    trace = open_trace(str(path), strict=True, keep=False, settings=everything)
    trace.check()
    assert (trace.requests, trace.references) == (36_694, 70_280_238)
    found = summarise(trace)
    assert 0.963 < found.prefix_hit_max < 0.965
    assert found.stops["tool"] == 31_611
