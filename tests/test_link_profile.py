"""What a link gives: kept once for a card and driver, never trusted, and read the right way."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.core.geometry import KIB, MIB
from tierkv.transfer.link_profile import (
    PUBLISHED,
    SIZES,
    Direction,
    LinkProfile,
    link_profile,
    measure_device,
    measure_link,
    read_profile,
)
from tierkv.transfer.streams import Queue

NEVER = 1 << 62


def profile_of(seed: float = 1.0) -> LinkProfile:
    """Every rate another number, so that none can be taken for another."""
    ways = [
        Direction(tuple(seed * 1e9 + n + 100 * way for n in range(8)), seed * 3e9 + way)
        for way in (1, 2)
    ]
    return LinkProfile(ways[0], ways[1], "measured")


class Measuring:
    """Measures by handing out a profile, and counts how often."""

    def __init__(self, seed: float = 1.0) -> None:
        self.times = 0
        self.profile = profile_of(seed)

    def __call__(self) -> LinkProfile:
        self.times += 1
        return self.profile


def never() -> LinkProfile:
    raise AssertionError("measured though it is known")


# ---- the file


def test_a_link_is_measured_once_and_read_back_from_then_on(tmp_path: Path) -> None:
    measure = Measuring()
    first = link_profile(measure, tmp_path, "card-13000")
    second = link_profile(never, tmp_path, "card-13000")
    assert measure.times == 1
    assert first.source == "measured"
    assert (second.up, second.down) == (first.up, first.down)
    assert second.source == f"measured, kept in {tmp_path / 'card-13000.json'}"


def test_the_file_and_its_directory_are_the_users_own(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        link_profile(Measuring(), tmp_path / "not" / "there" / "yet", "card")
    finally:
        os.umask(before)
    path = tmp_path / "not" / "there" / "yet" / "card.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_the_file_says_format_sizes_and_both_directions(tmp_path: Path) -> None:
    measure = Measuring()
    link_profile(measure, tmp_path, "card")
    text = (tmp_path / "card.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    found = json.loads(text)
    assert (found["format"], found["sizes"]) == (1, list(SIZES))
    assert found["up"]["copy"] == list(measure.profile.up.copy)
    assert found["down"]["kernel"] == measure.profile.down.kernel


@pytest.mark.parametrize("other", ["another-13000", "card-13010"], ids=["card", "driver"])
def test_another_card_or_driver_is_measured_for_itself(tmp_path: Path, other: str) -> None:
    one, two = Measuring(1), Measuring(2)
    link_profile(one, tmp_path, "card-13000")
    link_profile(two, tmp_path, other)
    assert (one.times, two.times) == (1, 1)
    assert link_profile(never, tmp_path, "card-13000").up == one.profile.up
    assert link_profile(never, tmp_path, other).up == two.profile.up


def test_without_a_directory_every_use_measures() -> None:
    measure = Measuring()
    assert link_profile(measure, None, "card") is measure.profile
    assert link_profile(measure, None, "card") is measure.profile
    assert measure.times == 2


@given(st.lists(st.floats(0, 1e15, exclude_min=True, exclude_max=True), min_size=18, max_size=18))
def test_every_rate_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, rates: list[float]
) -> None:
    ways = [Direction(tuple(rates[n : n + 8]), rates[n + 8]) for n in (0, 9)]
    folder = tmp_path_factory.mktemp("links")
    link_profile(lambda: LinkProfile(ways[0], ways[1], "measured"), folder, "card")
    kept = link_profile(never, folder, "card")
    assert [kept.up, kept.down] == ways


# ---- files that are not to be believed


def kept_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A good file with something in it changed."""
    found = {"format": 1, "sizes": list(SIZES), **asdict(profile_of())}
    for way in ("up", "down"):
        found[way]["copy"] = list(found[way]["copy"])
    change(found)
    return json.dumps(found).encode()


def set_rate(value: object) -> bytes:
    return kept_with(lambda found: found["down"]["copy"].__setitem__(3, value))


BAD_FILES = {
    "empty": b"",
    "half": kept_with(lambda _: None)[:200],
    "not text": b"\xff\xfe\x00\x01" * 9,
    "not json": b"what is this",
    "null": b"null",
    "number": b"1",
    "list": b"[1, 2]",
    "another format": kept_with(lambda found: found.update(format=2)),
    "older format": kept_with(lambda found: found.update(format=0)),
    "no format": kept_with(lambda found: found.pop("format")),
    "other sizes": kept_with(lambda found: found["sizes"].pop()),
    "no sizes": kept_with(lambda found: found.pop("sizes")),
    "sizes a number": kept_with(lambda found: found.update(sizes=4096)),
    "huge sizes": kept_with(lambda found: found.update(sizes=[10**400] * 8)),
    "no direction": kept_with(lambda found: found.pop("down")),
    "direction a list": kept_with(lambda found: found.update(up=[])),
    "no kernel": kept_with(lambda found: found["up"].pop("kernel")),
    "a rate too few": kept_with(lambda found: found["up"]["copy"].pop()),
    "a rate too many": kept_with(lambda found: found["up"]["copy"].append(1e9)),
    "rates null": kept_with(lambda found: found["up"].update(copy=None)),
    "zero rate": set_rate(0),
    "negative rate": set_rate(-1e9),
    "nan": set_rate(float("nan")),
    "infinite": set_rate(float("inf")),
    "minus infinite": set_rate(float("-inf")),
    "beyond any link": set_rate(1e15),
    "rate null": set_rate(None),
    "rate a list": set_rate([1e9]),
    "rate a word": set_rate("fast"),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_cannot_be_believed_is_measured_again_and_replaced(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "card.json"
    path.write_bytes(content)
    assert read_profile(path) is None
    measure = Measuring()
    assert link_profile(measure, tmp_path, "card") is measure.profile
    assert link_profile(never, tmp_path, "card").up == measure.profile.up
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [set_rate(10**400), b"[" * 100_000, b'{"up":' * 100_000],
    ids=["huge", "deep", "nested"],
)
def test_a_number_or_a_depth_without_end_is_measured_again_too(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "card.json").write_bytes(content)
    measure = Measuring()
    assert link_profile(measure, tmp_path, "card") is measure.profile


@pytest.mark.parametrize(
    "content",
    [
        kept_with(lambda found: found["up"].update(copy="12345678")),
        set_rate("1_000"),
        set_rate(True),
    ],
    ids=["digits", "text", "truth"],
)
def test_a_rate_is_a_number(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_bytes(content)
    assert read_profile(tmp_path / "card.json") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)


@given(where=st.sampled_from(["format", "sizes", "up", "down", "copy", "kernel"]), value=JSON)
def test_whatever_a_file_holds_it_gives_sound_rates_or_none(
    tmp_path_factory: pytest.TempPathFactory, where: str, value: object
) -> None:
    inside = where in ("copy", "kernel")
    content = kept_with(lambda found: (found["up"] if inside else found).update({where: value}))
    path = tmp_path_factory.mktemp("links") / "card.json"
    path.write_bytes(content)
    found = read_profile(path)
    for way in [] if found is None else [found.up, found.down]:
        assert len(way.copy) == len(SIZES)
        assert all(0 < rate < 1e15 for rate in (*way.copy, way.kernel))


def test_a_file_that_is_not_there_or_a_directory_is_none(tmp_path: Path) -> None:
    assert read_profile(tmp_path / "none.json") is None
    assert read_profile(tmp_path) is None


# ---- places that cannot be written


@contextmanager
def no_room() -> Iterator[None]:
    """Files of this process may hold 10 bytes: as a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_directory_that_cannot_be_made_is_no_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("of somebody")
    measure = Measuring()
    for folder in (tmp_path / "file", tmp_path / "file" / "links", tmp_path / ("long" * 100)):
        assert link_profile(measure, folder, "card") is measure.profile
    assert measure.times == 3
    assert caplog.text.count("link profile not kept") == 3
    assert (tmp_path / "file").read_text() == "of somebody"


def test_a_full_disk_keeps_the_profile_from_its_file_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measure = Measuring()
    with no_room():
        found = link_profile(measure, tmp_path, "card")
    assert found is measure.profile
    assert "link profile not kept" in caplog.text
    assert not (tmp_path / "card.json").exists()
    link_profile(measure, tmp_path, "card")
    assert link_profile(never, tmp_path, "card").up == found.up


def test_a_full_disk_leaves_a_file_that_is_there_as_it_is(tmp_path: Path) -> None:
    link_profile(Measuring(), tmp_path, "card")
    before = (tmp_path / "card.json").read_bytes()
    with no_room():
        link_profile(never, tmp_path, "card")
    assert (tmp_path / "card.json").read_bytes() == before


@pytest.mark.parametrize("fault", ["full", "taken"])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, fault: str) -> None:
    """One file for each start of the store, on a disk that is full already."""
    if fault == "full":
        with no_room():
            link_profile(Measuring(), tmp_path, "card")
        assert list(tmp_path.iterdir()) == []
    else:
        (tmp_path / "card.json").mkdir()
        link_profile(Measuring(), tmp_path, "card")
        assert list(tmp_path.iterdir()) == [tmp_path / "card.json"]


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    """As the ranks of one machine start together; a reader meanwhile sees none or all of it."""
    writers = 8
    start = threading.Barrier(writers + 1)
    profiles = [Measuring(n + 1) for n in range(writers)]
    wanted = {one.profile.up for one in profiles}
    odd: list[object] = []

    def write(measure: Measuring) -> None:
        start.wait(10)
        for _ in range(20):
            found = link_profile(measure, tmp_path, "card")
            if found.up not in wanted:
                odd.append(found)
            (tmp_path / "card.json").unlink(missing_ok=True)
        link_profile(measure, tmp_path, "card")

    threads = [threading.Thread(target=write, args=(one,)) for one in profiles]
    for thread in threads:
        thread.start()
    start.wait(10)
    while any(thread.is_alive() for thread in threads):
        try:
            text = (tmp_path / "card.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        if tuple(json.loads(text)["up"]["copy"]) not in {up.copy for up in wanted}:
            odd.append(text)
    for thread in threads:
        thread.join()
    assert odd == []
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]
    assert link_profile(never, tmp_path, "card").up in wanted


# ---- what the figures mean


RATES = st.floats(1e6, 1e12)
WAYS = st.builds(
    Direction, st.lists(RATES, min_size=8, max_size=8).map(tuple), RATES
) | st.builds(  # as links are: the larger, the faster
    lambda rates, kernel: Direction(tuple(sorted(rates)), kernel),
    st.lists(RATES, min_size=8, max_size=8),
    RATES,
)


def rate_at(way: Direction, piece: int) -> float:
    """Bytes per second of the copy engine in pieces of a size."""
    return float(1e9 / way.copy_seconds(np.array([piece]), np.array([10**9]))[0])


@given(WAYS)
def test_from_the_crossover_on_the_copy_engine_is_the_faster(way: Direction) -> None:
    least = way.crossover_bytes
    assert least in (0, NEVER, *SIZES)
    for size, rate in zip(SIZES, way.copy, strict=True):
        if size >= least:
            assert rate >= way.kernel
    below = [rate for size, rate in zip(SIZES, way.copy, strict=True) if size < least]
    if below:
        assert below[-1] < way.kernel, "a smaller size would have done"


@given(WAYS, st.integers(SIZES[0], 4 * SIZES[-1]))
def test_between_the_sizes_the_crossover_holds_as_well(way: Direction, piece: int) -> None:
    if piece >= way.crossover_bytes:
        assert rate_at(way, piece) >= way.kernel * (1 - 1e-9)


@pytest.mark.parametrize(
    ("copy", "kernel", "least"),
    [
        pytest.param(PUBLISHED.up.copy, 40e9, 32 * KIB, id="published"),
        pytest.param((1e9,) * 8, 1e9, 0, id="never slower"),
        pytest.param((1e9,) * 8, 1.1e9, NEVER, id="never faster"),
        pytest.param((1e9, 2e9, 3e9, 4e9, 5e9, 6e9, 7e9, 8e9), 7.5e9, 2 * MIB, id="at the largest"),
        pytest.param((1e9, 9e9, 9e9, 9e9, 9e9, 9e9, 9e9, 9e9), 2e9, 8 * KIB, id="at once"),
        pytest.param((9e9, 9e9, 1e9, 9e9, 9e9, 9e9, 9e9, 9e9), 2e9, 32 * KIB, id="a dip"),
        pytest.param((9e9, 1e9, 9e9, 9e9, 9e9, 1e9, 9e9, 9e9), 2e9, 512 * KIB, id="two dips"),
        pytest.param((9e9, 9e9, 9e9, 9e9, 9e9, 9e9, 9e9, 1e9), 2e9, NEVER, id="slow at the end"),
    ],
)
def test_the_crossover_lies_behind_the_last_size_that_is_slower(
    copy: tuple[float, ...], kernel: float, least: int
) -> None:
    assert Direction(copy, kernel).crossover_bytes == least


@given(WAYS, st.integers(1, 8 * MIB), st.lists(st.integers(0, 1 << 40), min_size=2, max_size=6))
def test_more_bytes_never_take_less_time(way: Direction, piece: int, totals: list[int]) -> None:
    totals.sort()
    seconds = way.copy_seconds(np.full(len(totals), piece), np.array(totals))
    assert seconds.dtype == np.float64
    assert np.all(np.diff(seconds) >= 0)
    assert np.all(seconds >= 0)


@given(WAYS, st.integers(1, 8 * MIB), st.integers(1, 1 << 30), st.integers(1, 100))
def test_time_is_in_proportion_to_bytes(way: Direction, piece: int, total: int, times: int) -> None:
    one, many = way.copy_seconds(np.array([piece] * 2), np.array([total, total * times]))
    assert many == pytest.approx(one * times)


@given(WAYS, st.integers(1, SIZES[0]))
def test_below_the_smallest_size_a_piece_costs_what_the_smallest_costs(
    way: Direction, piece: int
) -> None:
    pieces = np.array([piece, SIZES[0]])
    small, least = way.copy_seconds(pieces, pieces)
    assert small == pytest.approx(least)
    assert small == pytest.approx(SIZES[0] / way.copy[0])


@given(WAYS)
def test_at_each_size_the_rate_is_the_one_that_was_measured(way: Direction) -> None:
    sizes = np.array(SIZES)
    assert way.copy_seconds(sizes, sizes) == pytest.approx(sizes / np.array(way.copy))


@given(WAYS, st.integers(0, len(SIZES) - 2), st.floats(0, 1))
def test_between_two_sizes_the_rate_is_between_theirs(
    way: Direction, number: int, part: float
) -> None:
    low, high = SIZES[number : number + 2]
    rate = rate_at(way, low + int(part * (high - low)))
    ends = sorted(way.copy[number : number + 2])
    assert ends[0] * (1 - 1e-9) <= rate <= ends[1] * (1 + 1e-9)


@given(WAYS, st.integers(SIZES[-1], 1 << 40))
def test_beyond_the_largest_size_nothing_gets_faster(way: Direction, piece: int) -> None:
    assert rate_at(way, piece) == pytest.approx(way.copy[-1])


def test_a_queue_has_its_direction() -> None:
    found = profile_of()
    assert found.of(Queue.TO_DEVICE) is found.up
    assert found.of(Queue.TO_HOST) is found.down


# ---- measuring


def test_a_measurement_gives_rates_and_touches_its_scratch_memory_alone() -> None:
    """Views into larger memory; nothing is in flight twice, in whatever order a device runs it."""
    torch = pytest.importorskip("torch")
    from tierkv.testing.streams import RecordingStreams

    size, margin = 32 * KIB, 4 * KIB
    wholes = [torch.full((size + 2 * margin,), 7, dtype=torch.uint8) for _ in range(2)]
    host, device = (whole[margin : margin + size] for whole in wholes)
    host.random_(0, 256, generator=torch.Generator().manual_seed(1))
    bytes_before = torch.bincount(host.int(), minlength=256)
    streams = RecordingStreams()
    found = measure_link(streams, host, device)

    assert found.source == "measured"
    for way in (found.up, found.down):
        assert len(way.copy) == len(SIZES)
        assert all(0 < rate < 1e15 for rate in (*way.copy, way.kernel))
    for whole in wholes:
        assert torch.all(whole[:margin] == 7)
        assert torch.all(whole[-margin:] == 7)
    # Pages are scattered, and all of them arrive: the device holds the host's bytes.
    assert torch.equal(torch.bincount(device.int(), minlength=256), bytes_before)
    assert streams.races() == []
    assert len(streams.done) == len(streams.operations), "something is still under way"


def test_each_direction_is_measured_at_every_size_and_once_by_a_kernel() -> None:
    torch = pytest.importorskip("torch")
    from tierkv.testing.streams import RecordingStreams

    size = 256 * KIB
    streams = RecordingStreams()
    memory = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    measure_link(streams, *memory)

    runs = 4  # one that warms up, three that count
    wanted = [
        (queue, max(1, size // piece), max(1, size // piece) * min(piece, size), True)
        for queue in (Queue.TO_DEVICE, Queue.TO_HOST)
        for piece in SIZES
        for _ in range(runs)
    ]
    assert streams.copies == wanted
    kernels = [one for one in streams.operations if one.name.startswith("move of")]
    assert [one.queue for one in kernels] == [Queue.RELAYOUT] * 2 * runs
    copies = [one for one in streams.operations if " copies of " in one.name]
    up = [one for one in copies if one.queue == Queue.TO_DEVICE] + kernels[:runs]
    down = [one for one in copies if one.queue == Queue.TO_HOST] + kernels[runs:]
    for operations, target in ((up, memory[1]), (down, memory[0])):
        first, end = target.data_ptr(), target.data_ptr() + size
        for operation in operations:
            written = [one for one in operation.accesses if one.writes]
            assert all(first <= one.start < one.stop <= end for one in written), operation.name
    assert all(index.until is not None for index in streams._uploads), "index memory is lost"


def test_a_measurement_that_is_kept_is_read_back(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tierkv.testing.streams import RecordingStreams

    memory = [torch.zeros(64 * KIB, dtype=torch.uint8) for _ in range(2)]
    first = link_profile(lambda: measure_link(RecordingStreams(), *memory), tmp_path, "card")
    assert link_profile(never, tmp_path, "card").down == first.down


class Timeless:
    """Streams on which nothing takes any time, as far as the clock can tell."""

    def begin(self) -> None:
        pass

    def copy(self, queue: Queue, copies: object, *, pinned: bool = True) -> None:
        pass

    def upload(self, queue: Queue, sources: object, targets: object) -> Timeless:
        return self

    def move(self, *_: object) -> None:
        pass

    def record(self, queue: Queue) -> Timeless:
        return self

    def wait(self, queue: Queue, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def test_a_clock_that_stands_still_gives_rates_that_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("time.perf_counter", lambda: 1.0)
    memory = [torch.zeros(64 * KIB, dtype=torch.uint8) for _ in range(2)]
    link_profile(lambda: measure_link(Timeless(), *memory), tmp_path, "card")
    monkeypatch.undo()
    assert link_profile(never, tmp_path, "card").up.kernel > 0


def test_scratch_memory_of_its_own_is_enough_to_measure() -> None:
    torch = pytest.importorskip("torch")
    found = measure_device(Timeless(), torch.device("cpu"))
    assert all(rate > 0 for way in (found.up, found.down) for rate in (*way.copy, way.kernel))
