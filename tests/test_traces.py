"""Traces as arrays: the builder against a dict, the tree, cutting, and the reader's bounds."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tierkv.core.errors import ConfigError
from tierkv.sim import Stop, Trace, TraceBuilder, TraceFacts, open_trace
from tierkv.sim import cache as cache_module
from tierkv.sim import source as source_module
from tierkv.sim.settings import Seconds, Settings, settings_of
from tierkv.sim.summary import known_blocks, reuse_gaps, summarise
from tierkv.sim.trace import ARRAYS
from tierkv.sim.writing import write_trace

FACTS = TraceFacts(format="test")

#: Requests as (arrival, content of each block): few contents, so that chains share.
REQUESTS = st.lists(
    st.tuples(st.integers(0, 50), st.lists(st.integers(0, 3), min_size=0, max_size=6)),
    min_size=1,
    max_size=40,
)


def built(requests: list[tuple[int, list[int]]], *, block_tokens: int = 4) -> Trace:
    builder = TraceBuilder("test", block_tokens, chained=False)
    for number, (arrival, contents) in enumerate(requests):
        # Requests without a block have a few tokens that fill none.
        tokens = block_tokens * len(contents) if contents else 1
        builder.add(
            arrival,
            np.array(contents, dtype=np.int64),
            input_tokens=tokens,
            output_tokens=number,
            session=number % 3 - 1,
            stop=Stop(number % 4),
            pause_ns=number * 7 - 1,
            busy_ns=number - 1,
        )
    return builder.build(FACTS)


def chain_of(trace: Trace, request: int) -> list[int]:
    blocks: list[int] = trace.blocks[trace.starts[request] : trace.starts[request + 1]].tolist()
    return blocks


def assert_same(one: Trace, other: Trace) -> None:
    assert (one.name, one.block_tokens, one.facts) == (other.name, other.block_tokens, other.facts)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@given(REQUESTS)
def test_a_block_is_its_content_after_that_of_its_parents(
    requests: list[tuple[int, list[int]]],
) -> None:
    trace = built(requests)
    trace.check()
    numbers: dict[tuple[int, ...], int] = {}
    ordered = sorted(requests, key=lambda request: request[0])
    for i, (_, contents) in enumerate(ordered):
        paths = [tuple(contents[: k + 1]) for k in range(len(contents))]
        assert chain_of(trace, i) == [numbers.setdefault(path, len(numbers)) for path in paths]
    for path, number in numbers.items():
        assert trace.parents[number] == numbers.get(path[:-1], -1)


@given(REQUESTS)
def test_chained_ids_give_the_same_trace_as_content(requests: list[tuple[int, list[int]]]) -> None:
    builder = TraceBuilder("test", 4)
    rng = np.random.default_rng(1)
    names: dict[tuple[int, ...], int] = {}
    for arrival, contents in requests:
        paths = [tuple(contents[: k + 1]) for k in range(len(contents))]
        ids = [names.setdefault(path, int(rng.integers(-(1 << 62), 1 << 62))) for path in paths]
        builder.add(arrival, np.array(ids, dtype=np.int64), input_tokens=max(1, 4 * len(ids)))
    trace, other = builder.build(FACTS), built(requests)
    trace.check()
    np.testing.assert_array_equal(trace.blocks, other.blocks)
    np.testing.assert_array_equal(trace.parents, other.parents)


@given(REQUESTS)
def test_what_is_known_before_a_request_is_what_was_in_an_earlier_one(
    requests: list[tuple[int, list[int]]],
) -> None:
    trace = built(requests)
    seen: dict[int, int] = {}
    gaps: list[float] = []
    known = known_blocks(trace)
    for i in range(trace.requests):
        chain = chain_of(trace, i)
        assert known[i] == sum(block in seen for block in chain)
        now = int(trace.arrival_ns[i])
        gaps += [(now - seen[block]) * 1e-9 for block in chain if block in seen]
        seen |= dict.fromkeys(chain, now)
    np.testing.assert_allclose(reuse_gaps(trace), gaps, rtol=1e-6)
    summary = summarise(trace)
    assert summary.requests == len(requests)
    assert 0 <= summary.prefix_hit_max <= 1


@given(REQUESTS, st.integers(0, 40), st.integers(0, 40))
def test_a_cut_is_the_trace_of_those_requests_alone(
    requests: list[tuple[int, list[int]]], first: int, stop: int
) -> None:
    trace = built(requests)
    part = trace.cut(first, stop)
    part.check()
    assert part.requests == len(range(trace.requests)[first:stop])
    ordered = sorted(requests, key=lambda request: request[0])[first:stop]
    if ordered:
        alone = built(ordered)
        np.testing.assert_array_equal(part.blocks, alone.blocks)
        np.testing.assert_array_equal(part.parents, alone.parents)
        np.testing.assert_array_equal(part.arrival_ns, alone.arrival_ns)


def test_a_request_whose_block_has_another_parent_leaves_no_trace() -> None:
    builder = TraceBuilder("test", 4)
    builder.add(0, np.array([1, 2, 3]), input_tokens=12)
    for bad in ([2], [1, 3], [9, 8, 3], [9, 9], [8, 9, 8]):
        with pytest.raises(ValueError, match="another parent"):
            builder.add(1, np.array(bad), input_tokens=4 * len(bad))
    builder.add(2, np.array([8, 9]), input_tokens=8)  # as if they had not been
    with pytest.raises(ValueError, match="another parent"):
        builder.add(3, np.array([9]), input_tokens=4)
    trace = builder.build(FACTS)
    trace.check()
    assert trace.blocks.tolist() == [0, 1, 2, 3, 4]
    assert trace.parents.tolist() == [-1, 0, 1, -1, 3]


def test_a_parent_that_a_refused_request_claimed_is_given_back() -> None:
    builder = TraceBuilder("test", 4)
    builder.add(0, np.array([1]), input_tokens=4)
    with pytest.raises(ValueError, match="another parent"):
        builder.add(0, np.array([7, 1]), input_tokens=8)
    with pytest.raises(ValueError, match="another parent"):
        builder.add(0, np.array([6, 7, 1]), input_tokens=12)  # claims 7 for 6, and is refused
    builder.add(0, np.array([5, 7]), input_tokens=8)
    trace = builder.build(FACTS)
    assert trace.parents.tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_tokens": 0},
        {"input_tokens": 3},
        {"input_tokens": 16},
        {"input_tokens": 1 << 40},
        {"output_tokens": -1},
        {"session": -2},
        {"tenant": 1 << 20},
        {"pause_ns": 1 << 62},
        {"arrival_ns": -(1 << 62)},
    ],
)
def test_a_request_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    builder = TraceBuilder("test", 4)
    arguments = {"arrival_ns": 0, "input_tokens": 12} | wrong
    with pytest.raises(ValueError):
        builder.add(ids=np.array([1, 2, 3]), **arguments)  # type: ignore[arg-type]
    assert len(builder) == 0


def test_a_last_block_may_be_partial_or_left_out() -> None:
    builder = TraceBuilder("test", 4)
    builder.add(0, np.array([1, 2, 3]), input_tokens=9)
    builder.add(0, np.array([1, 2]), input_tokens=11)
    builder.build(FACTS).check()


def test_many_blocks_are_told_apart() -> None:
    builder = TraceBuilder("test", 1)
    ids = np.random.default_rng(3).permutation(200_000).astype(np.int64)
    for i in range(4):
        builder.add(i, ids, input_tokens=len(ids))
    trace = builder.build(FACTS)
    trace.check()
    assert trace.unique_blocks == len(ids)
    assert summarise(trace).block_hit_max == 0.75


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parents": np.array([-1, 1], dtype=np.int32)}, "after its child"),
        ({"blocks": np.array([1, 0], dtype=np.int32)}, "order of first reference"),
        ({"blocks": np.array([0, 0], dtype=np.int32)}, "nothing refers to"),
        ({"parents": np.array([-1, -1], dtype=np.int32)}, "follow its parent"),
        ({"starts": np.array([0, 1], dtype=np.int64)}, "do not fit"),
        ({"starts": np.array([0, 2], dtype=np.int32)}, "no <i8"),
        ({"input_tokens": np.array([3], dtype=np.int32)}, "number of blocks"),
        ({"arrival_ns": np.array([5], dtype=np.int64)}, "first arrival"),
        ({"stop": np.array([], dtype=np.int8)}, "one value for each"),
    ],
)
def test_check_finds_what_is_no_trace(change: dict[str, object], reason: str) -> None:
    builder = TraceBuilder("test", 4)
    builder.add(0, np.array([1, 2]), input_tokens=8)
    trace = builder.build(FACTS)
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(trace, **change).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.jsonl.zst", "t.jsonl.gz"])
@given(requests=REQUESTS)
def test_what_is_written_is_read_back(
    requests: list[tuple[int, list[int]]], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trace = built(requests)
    path = tmp_path_factory.mktemp("written") / name
    write_trace(trace, path)
    assert_same(open_trace(str(path), strict=True), trace)
    assert [p.name for p in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl.zst", "t.jsonl.gz"])
def test_a_damaged_file_is_refused_or_still_a_trace(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_trace(open_trace("builtin:chat?hours=0.01"), path)
    good, rng = path.read_bytes(), np.random.default_rng(5)
    for number in range(60):
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad if number % 3 else bad[: int(rng.integers(len(bad)))])
        with contextlib.suppress(ConfigError):
            open_trace(str(path), keep=False).check()


def test_only_names_that_can_be_read_back_are_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.parquet"):
        write_trace(built([(0, [1])]), tmp_path / "t.csv")
    with pytest.raises(ConfigError, match=r"t\.jsonl"):
        write_trace(built([(0, [1])]), tmp_path / "absent" / "t.jsonl")


def mooncake_line(at: int, ids: list[int], tokens: int | None = None) -> str:
    length = 512 * len(ids) if tokens is None else tokens
    entry = {"timestamp": at, "input_length": length, "output_length": 1, "hash_ids": ids}
    return json.dumps(entry)


def test_bad_lines_are_named_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    good = [mooncake_line(0, [1, 2]), mooncake_line(5, [1, 3])]
    bad = ["{", mooncake_line(1, [2]), mooncake_line(1, [9], 4000), mooncake_line(-1, [9])]
    path.write_text("\n".join([good[0], *bad, "", good[1]]) + "\n", encoding="utf-8")
    trace = open_trace(str(path))
    trace.check()
    assert (trace.requests, trace.facts.bad_lines) == (2, 4)
    assert [text.split(": ")[0] for text in trace.facts.problems] == [
        f"m.jsonl:{number}" for number in (2, 3, 4, 5)
    ]
    with pytest.raises(ConfigError, match=r"m\.jsonl:2: "):
        open_trace(str(path), strict=True)


def test_only_the_first_bad_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join([mooncake_line(0, [1]), *["{}"] * 100]), encoding="utf-8")
    facts = open_trace(str(path)).facts
    assert (facts.bad_lines, len(facts.problems)) == (100, source_module.PROBLEMS_KEPT)


def test_a_line_that_is_too_long_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "LINE_BYTES_MAX", 200)
    path = tmp_path / "m.jsonl"
    long = mooncake_line(1, list(range(100, 400)))
    text = "\n".join([mooncake_line(0, [1]), long, mooncake_line(2, [1])])
    path.write_text(text, encoding="utf-8")
    trace = open_trace(str(path))
    assert (trace.requests, trace.facts.bad_lines) == (2, 1)
    assert "m.jsonl:2: longer" in trace.facts.problems[0]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compression_is_seen_through(suffix: str, tmp_path: Path) -> None:
    data = (mooncake_line(0, [1, 2]) + "\n").encode()
    path = tmp_path / f"m.jsonl{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif suffix == ".zst":  # in two frames, as `zstd` may write
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(data[:10]) + compress(data[10:]))
    else:
        path.write_bytes(data)
    assert open_trace(str(path)).references == 2


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".tar", ".tar.zst", ".parquet", ".jsonl"])
def test_rubbish_is_a_message_not_a_traceback(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"PAR1 rubbish" * 100)
    with pytest.raises(ConfigError, match=path.name):
        open_trace(str(path))


@pytest.mark.parametrize(
    ("module", "name"), [("zstandard", "t.jsonl.zst"), ("polars", "t.parquet")]
)
def test_a_package_that_is_absent_is_named_with_its_cure(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = built([(0, [1, 2])])
    write_trace(trace, tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module}: pip install 'tierkv-offload\[sim\]'"):
        open_trace(str(tmp_path / name))
    with pytest.raises(ConfigError, match=module):
        write_trace(trace, tmp_path / f"other-{name}")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_not_there_or_not_known_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        open_trace(str(tmp_path / "absent"))
    path = tmp_path / "m.jsonl"
    path.write_text(mooncake_line(0, [1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'mooncake'"):
        open_trace(str(path), format="moncake")
    with pytest.raises(ConfigError, match="unknown setting 'size'; known: block_tokens, ids"):
        open_trace(str(path), settings={"size": "1"})
    with pytest.raises(ConfigError, match="block_tokens"):
        open_trace(str(path), settings={"block_tokens": "many"})


class _Times(Settings, frozen=True):
    wait: Seconds = 1.0


@pytest.mark.parametrize(
    ("word", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("2d", 172800), ("15m", 900)]
)
def test_a_setting_in_seconds_may_have_a_unit(word: str, seconds: float) -> None:
    assert settings_of(_Times, {"wait": word}, "x").wait == seconds


@pytest.mark.parametrize("word", ["1w", "-1", "nan", "1e99", "h"])
def test_a_time_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="wait"):
        settings_of(_Times, {"wait": word}, "x")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trace's path, of which everything is kept however small."""
    monkeypatch.setattr(cache_module, "KEPT_REFERENCES_MIN", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = tmp_path / "data" / "m.jsonl"
    path.parent.mkdir()
    lines = [mooncake_line(at, [1, 2 + at % 3]) for at in range(9)]
    path.write_text("\n".join([*lines, "{}"]), encoding="utf-8")
    return path


def arrays_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob(".*.arrays"))


def test_a_trace_is_found_again_as_it_was(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_trace(str(kept))
    assert len(arrays_of(kept.parent)) == 1
    monkeypatch.setattr("tierkv.sim.formats.mooncake.Mooncake.read", None)
    assert_same(open_trace(str(kept)), first)


def test_other_settings_or_content_are_another_trace(kept: Path) -> None:
    one = open_trace(str(kept))
    other = open_trace(str(kept), settings={"ids": "content"})
    assert one.facts.synthesised != other.facts.synthesised
    kept.write_text(mooncake_line(0, [1]), encoding="utf-8")
    assert open_trace(str(kept)).requests == 1
    assert len(arrays_of(kept.parent)) == 3


def test_a_kept_trace_with_bad_lines_is_read_again_when_strict(kept: Path) -> None:
    open_trace(str(kept))
    with pytest.raises(ConfigError, match=r"m\.jsonl:10"):
        open_trace(str(kept), strict=True)


def test_of_one_path_the_newest_readings_are_kept(kept: Path) -> None:
    for size in range(512, 525):
        open_trace(str(kept), settings={"block_tokens": str(size), "ids": "content"})
    assert len(arrays_of(kept.parent)) <= cache_module.KEPT_FILES_MAX


def test_nothing_is_kept_where_that_is_not_wanted(kept: Path) -> None:
    open_trace(str(kept), keep=False)
    assert arrays_of(kept.parent) == []


def test_a_folder_that_is_not_for_writing_is_left_alone(kept: Path, tmp_path: Path) -> None:
    kept.parent.chmod(0o555)
    try:
        trace = open_trace(str(kept))
        assert arrays_of(kept.parent) == []
        (file,) = arrays_of(tmp_path / "xdg")
        assert file.parent == tmp_path / "xdg" / "tierkv" / "traces"
        assert_same(open_trace(str(kept)), trace)
    finally:
        kept.parent.chmod(0o755)


@pytest.mark.parametrize("place", range(0, 1200, 37))
def test_a_damaged_cache_is_rebuilt(kept: Path, place: int) -> None:
    trace = open_trace(str(kept))
    (file,) = arrays_of(kept.parent)
    good = file.read_bytes()
    at = place % len(good)
    file.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
    assert_same(open_trace(str(kept)), trace)
    file.write_bytes(good[:at])
    assert_same(open_trace(str(kept)), trace)
    assert file.read_bytes() == good
