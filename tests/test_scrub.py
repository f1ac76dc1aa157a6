"""The command `scrub`: a bounded rate, and a pass that goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cold_directories import HEADER, SLOT, fill, flip_page, open_store, run_command
from tierkv.core.errors import ConfigError
from tierkv.upkeep import scrub
from tierkv.upkeep.pace import Pace, parse_rate
from tierkv.upkeep.report import LayoutReport
from tierkv.upkeep.scrub import PAUSE_SECONDS, Progress, Scrub, progress_file


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A cold directory with one layout of 12 full pages, closed cleanly."""
    fill(tmp_path / "cold")
    return tmp_path / "cold"


@pytest.fixture
def folder(cold: Path) -> Path:
    (found,) = cold.iterdir()
    return found


class Clock:
    """A time that only sleeping moves; `at` is called at each sleep, with the time."""

    def __init__(self, at: Callable[[float], None] = lambda now: None) -> None:
        self.time = 0.0
        self.slept: list[float] = []
        self._at = at

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.time += seconds
        self._at(self.time)


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.left: list[int | None] = []
        self.reports: list[LayoutReport] = []

    def began(self, root: Path, next_page: int, pages: int) -> None:
        self.begun.append(next_page)

    def finished(self, report: LayoutReport) -> None:
        self.reports.append(report)

    def stopped(self, root: Path, next_page: int | None) -> None:
        self.left.append(next_page)

    @property
    def damaged(self) -> list[tuple[str, int | None]]:
        return [(f.file, f.page) for report in self.reports for f in report.damage]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where progress is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tierkv" / "scrub"


RATE = 100_000


def scrub_of(cold: Path, notes: Path, heard: Heard, clock: Clock) -> Scrub:
    return Scrub(cold, RATE, heard, notes, now=clock.now, sleep=clock.sleep)


def interrupt_after(seconds: float) -> Clock:
    def at(now: float) -> None:
        if now >= seconds:
            raise KeyboardInterrupt

    return Clock(at)


def test_a_pass_takes_as_long_as_its_bytes_at_the_rate(cold: Path, notes: Path) -> None:
    clock, heard = Clock(), Heard()
    assert scrub_of(cold, notes, heard, clock).run(once=True)
    (report,) = heard.reports
    assert report.pages_kept == 12
    # All payloads and headers, and every slot's header once more, less the last read's own time.
    least = report.pages_kept * SLOT + report.pages * HEADER - SLOT
    assert clock.time >= least / RATE
    assert clock.time <= (least + 3 * SLOT) / RATE
    assert list(notes.glob("*")) == []


def test_no_burst_follows_a_pause() -> None:
    clock = Clock()
    pace = Pace(1000, now=clock.now, sleep=clock.sleep)
    pace.take(500)
    clock.time += 100
    pace.take(500)
    assert clock.slept == []
    pace.take(500)
    assert clock.slept == [0.5]


def test_an_interrupted_pass_goes_on_where_it_was(cold: Path, folder: Path, notes: Path) -> None:
    flip_page(folder, 1, HEADER + 9)
    flip_page(folder, 10, HEADER + 9)
    heard = Heard()
    headers = 16 * HEADER / RATE
    clock = interrupt_after(headers + 5 * SLOT / RATE)
    with pytest.raises(KeyboardInterrupt):
        scrub_of(cold, notes, heard, clock).run(once=True)
    (left,) = heard.left
    assert left is not None
    assert 3 <= left <= 6
    file = progress_file(notes, folder)
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())["next_page"] == left
    assert [path.name for path in notes.iterdir()] == [file.name]

    again = Clock()
    assert not scrub_of(cold, notes, heard, again).run(once=True)
    assert heard.begun == [0, left]
    assert heard.damaged == [("segment-00000000.tkv", 1), ("segment-00000001.tkv", 10)]
    # Pages that were read and were good are not read again.
    assert again.time < headers + (12 - left + 2) * SLOT / RATE
    assert not file.exists()


def test_a_folder_that_is_done_is_not_read_again_in_the_same_pass(cold: Path, notes: Path) -> None:
    fill(cold, 30, model="other")
    heard = Heard()

    def at(now: float) -> None:
        if heard.reports and len(heard.begun) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scrub_of(cold, notes, heard, Clock(at)).run(once=True)
    (first,) = heard.reports
    assert scrub_of(cold, notes, heard, Clock()).run(once=True)
    assert heard.begun[2] == first.pages
    assert heard.begun[3] < heard.reports[-1].pages
    assert list(notes.iterdir()) == []


def test_an_interrupt_while_headers_are_read_is_told(cold: Path, notes: Path) -> None:
    heard = Heard()
    with pytest.raises(KeyboardInterrupt):
        scrub_of(cold, notes, heard, interrupt_after(HEADER / RATE)).run(once=True)
    assert (heard.begun, heard.left) == ([], [None])


def test_progress_is_saved_while_a_pass_runs(cold: Path, folder: Path, notes: Path) -> None:
    seen: list[int] = []

    def at(now: float) -> None:
        file = progress_file(notes, folder)
        if file.exists():
            seen.append(json.loads(file.read_text())["next_page"])

    clock = Clock(at)
    one = scrub_of(cold, notes, Heard(), clock)
    one.bytes_per_s = 5000
    assert one.run(once=True)
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] < 12


@pytest.mark.parametrize("text", [b"", b"{}", b"[", b'{"store_id":"x","next_page":-1}', b"\xff"])
def test_damaged_progress_is_a_pass_from_the_beginning(
    cold: Path, folder: Path, notes: Path, text: bytes
) -> None:
    file = progress_file(notes, folder)
    file.parent.mkdir(parents=True)
    file.write_bytes(text)
    heard = Heard()
    assert scrub_of(cold, notes, heard, Clock()).run(once=True)
    assert heard.begun == [0]


def test_progress_of_another_store_is_not_believed(cold: Path, folder: Path, notes: Path) -> None:
    scrub.save_progress(progress_file(notes, folder), Progress("00" * 16, next_page=9))
    heard = Heard()
    assert scrub_of(cold, notes, heard, Clock()).run(once=True)
    assert heard.begun == [0]


def test_a_page_that_was_written_anew_is_good_again(cold: Path, folder: Path, notes: Path) -> None:
    store_id = Heard()
    assert scrub_of(cold, notes, store_id, Clock()).run(once=True)
    name = store_id.reports[0].store_id
    scrub.save_progress(progress_file(notes, folder), Progress(name, 5, damaged=[1, 99]))
    heard = Heard()
    assert scrub_of(cold, notes, heard, Clock()).run(once=True)
    assert heard.damaged == []


def test_without_once_pass_follows_pass_with_a_pause(cold: Path, folder: Path, notes: Path) -> None:
    heard, clock = Heard(), Clock()

    def at(now: float) -> None:
        if clock.slept[-1] == PAUSE_SECONDS:
            open_store(cold).close()  # between passes the directory is free
            if len(heard.reports) == 3:
                flip_page(folder, 2, HEADER)

    clock._at = at
    assert not scrub_of(cold, notes, heard, clock).run(once=False)
    assert [len(report.damage) for report in heard.reports] == [0, 0, 0, 1]
    assert clock.slept.count(PAUSE_SECONDS) == 3


def test_the_command_names_what_it_finds(
    cold: Path, folder: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("scrub", cold, "--once", "--rate", "10GiB/s") == 0
    assert "ok: headers and payloads verify" in capsys.readouterr().out
    flip_page(folder, 9, HEADER + 100)
    assert run_command("scrub", cold, "--rate", "10GiB") == 1
    out = capsys.readouterr().out
    assert "segment-00000001.tkv" in out
    assert "payload of page 9" in out


def test_an_interrupted_command_is_130_and_says_how_far_it_got(
    cold: Path, notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Pace.take, []

    def take(self: Pace, size_bytes: int) -> None:
        calls.append(size_bytes)
        if len(calls) == 20 + 5:
            raise KeyboardInterrupt
        real(self, size_bytes)

    monkeypatch.setattr(Pace, "take", take)
    assert run_command("scrub", cold, "--once", "--rate", "10GiB") == 130
    done = capsys.readouterr()
    assert "stopped at page" in done.out
    assert "the next scrub goes on where this one was" in done.out
    assert done.err == "interrupted\n"
    assert run_command("scrub", cold, "--once", "--rate", "10GiB") == 0
    assert "goes on at page" in capsys.readouterr().out


def test_a_real_interrupt_of_a_real_process_is_130(cold: Path, notes: Path) -> None:
    command = [sys.executable, "-m", "tierkv.cli", "scrub", str(cold), "--rate", "200kB/s"]
    # A shell's background job ignores interrupts, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert b"begins" in process.stdout.readline()
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19, "others go first"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopped at page" in out
    assert err == b"interrupted\n"
    assert len(list(notes.iterdir())) == 1


@pytest.mark.parametrize("rate", ["fast", "0MB/s", "100", "-1MB", "100Mb/s", ""])
def test_a_bad_rate_is_two_and_a_word(
    cold: Path, rate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("scrub", cold, f"--rate={rate}") == 2
    assert capsys.readouterr().err.startswith("--rate: ")


def test_rates_are_sizes_a_second() -> None:
    assert parse_rate("100MB/s") == 100_000_000
    assert parse_rate("64 MiB") == 64 << 20


def test_no_home_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(self: Path) -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        scrub.default_progress_directory()
