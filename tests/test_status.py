"""A living store tells other processes how its breaker stands, and `tierkv doctor` tells people."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

import psutil
import pytest

from tierkv.transfer.breaker import Breaker, State
from tierkv.transfer.status import StatusFile, living_stores

ENGINE = """
import errno
from pathlib import Path

from tierkv.tiers.files.portable import PortableFiles


class Failing(PortableFiles):
    name = "failing"

    def write(self, handle, offset, buffers):
        if (self._root.parent.parent / "broken").exists():
            raise OSError(errno.EIO, "broken")
        super().write(handle, offset, buffers)
"""

STORE = """
import sys

import numpy as np

from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.store import Store

config = Config.model_validate({
    "pages": {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"},
    "tiers": {
        "host": {"capacity": "4MiB"},
        "cold": {"capacity": "8MiB", "directory": sys.argv[1], "engine": "failing"},
    },
})
geometry = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
with Store.open(config, Layout(geometry, targets=config.pages.targets, model="m")) as store:
    rows = np.ones((3, 10, store.plan.block_layer_bytes), np.uint8)
    print("open", flush=True)
    for number, line in enumerate(sys.stdin):
        store.put([number] * 160, rows)
        print(store.flush(), flush=True)
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class StoreProcess:
    """A store in a process of its own, whose disk fails while there is a file `broken`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        point = "[tierkv.files]\nfailing = failing_files:Failing\n"
        write(place / "failing_files.py", ENGINE)
        (place / "failing_files-1.dist-info").mkdir()
        write(place / "failing_files-1.dist-info/METADATA", "Name: failing-files\nVersion: 1")
        write(place / "failing_files-1.dist-info/entry_points.txt", point)
        (place / "run").mkdir(mode=0o700)
        own = {"PYTHONPATH": str(place), "XDG_RUNTIME_DIR": str(place / "run")}
        self.environment = os.environ | own | {"TMPDIR": str(place), "HOME": str(place)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", STORE, str(place / "cold")],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = f"store, pid {self.process.pid}"
        assert self._line() == "open"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()

    def put_and_flush(self) -> bool:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._line() == "True"

    def found(self) -> dict[str, dict[str, str]]:
        """What `tierkv doctor` says, by name."""
        code = "import sys; sys.argv[0] = 'tierkv'; from tierkv.cli import main; main()"
        arguments = ["doctor", "--json", "--directory", str(self.place / "none")]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return {finding["name"]: finding for finding in json.loads(done.stdout)}

    @property
    def files(self) -> list[Path]:
        return sorted((self.place / "run" / "tierkv").iterdir())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def test_a_store_of_another_process_is_listed_with_its_breaker_until_it_is_closed(
    tmp_path: Path,
) -> None:
    with StoreProcess(tmp_path) as other:
        finding = other.found()[other.name]
        assert finding["state"] == "ok"
        assert finding["detail"].startswith(str(tmp_path / "cold"))
        assert "breaker closed since 2" in finding["detail"]
        assert "stores" not in other.found()
        (file,) = other.files
        assert file.name.startswith(f"{other.process.pid}-")
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)

        assert other.put_and_flush()
        write(tmp_path / "broken", "")
        for _ in range(8):
            assert not other.put_and_flush()
        finding = other.found()[other.name]
        assert finding["state"] == "note"
        assert "breaker open, not closed since 2" in finding["detail"]
        skipped = int(finding["detail"].split(" transfers skipped")[0].rsplit(" ", 1)[1])
        assert skipped > 0
        assert "dmesg" in finding["cure"]

        (tmp_path / "broken").unlink()
        for _ in range(3):
            other.put_and_flush()
        assert other.put_and_flush()
        assert "breaker closed since 2" in other.found()[other.name]["detail"]

        assert other.process.stdin is not None
        other.process.stdin.close()
        assert other.process.wait() == 0
        assert other.found()["stores"]["detail"] == "none of this user is open here"
        assert other.files == []


def test_what_a_killed_store_left_is_not_listed_and_removed(tmp_path: Path) -> None:
    with StoreProcess(tmp_path) as other:
        other.process.kill()
        found = other.found()  # before anybody waits for it: it is a zombie
        assert other.name not in found
        assert "stores" in found
        assert other.files == []


def test_a_process_that_took_a_dead_ones_pid_is_not_taken_for_a_store(tmp_path: Path) -> None:
    with StoreProcess(tmp_path) as other:
        (file,) = other.files
        began = psutil.Process(other.process.pid).create_time()
        os.utime(file, (began - 100, began - 100))
        assert other.name not in other.found()
        assert other.files == []


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where a status may be left, in order; neither is there yet."""
    (tmp_path / "run").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "run" / "tierkv", tmp_path / "tmp" / f"tierkv-{os.geteuid()}"


def spoil(folder: Path, how: str, elsewhere: Path) -> None:
    if how == "others may enter":
        folder.mkdir(mode=0o700)
        folder.chmod(0o710)
    elif how == "a link":
        elsewhere.mkdir(mode=0o700)
        folder.symlink_to(elsewhere)
    elif how == "a file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir(mode=0o700)
        os.chown(folder, 54321, 54321)


WAYS = ["others may enter", "a link", "a file", "another user's"]


@pytest.mark.parametrize("how", WAYS)
def test_a_directory_that_is_not_ours_alone_is_passed_over(
    places: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    if how == "another user's" and os.geteuid() != 0:
        how = "a file"  # only root can give a directory away
    first, second = places
    spoil(first, how, tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    status = StatusFile(tmp_path / "cold", Breaker("cold"))
    status.open()
    assert [found.pid for found in living_stores()] == [os.getpid()]
    assert stat.S_IMODE(second.stat().st_mode) == 0o700
    (file,) = second.iterdir()
    assert sorted(tmp_path.rglob("*")) == sorted([*before, second, file])
    status.close()
    assert living_stores() == []


@pytest.mark.parametrize("how", WAYS[:3])
def test_without_a_place_there_is_no_status_one_warning_and_no_harm(
    places: tuple[Path, Path], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number, folder in enumerate(places):
        spoil(folder, how, tmp_path / f"elsewhere{number}")
    before = sorted(tmp_path.rglob("*"))
    breaker = Breaker("cold", faults_max=1)
    status = StatusFile(tmp_path / "cold", breaker)
    with caplog.at_level(logging.WARNING, logger="tierkv.transfer.status"):
        status.open()
        fail(breaker)
        status.close()
    assert sorted(tmp_path.rglob("*")) == before
    assert [record.levelname for record in caplog.records if "status" in record.name] == ["WARNING"]


def fail(breaker: Breaker) -> None:
    number = breaker.begin()
    assert number is not None
    breaker.end(number, is_good=False, seconds=0)


def test_a_status_that_cannot_be_written_any_more_is_given_up_with_one_warning(
    places: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    breaker = Breaker("cold", faults_max=1, retry_s=0)
    status = StatusFile(tmp_path / "cold", breaker)
    status.open()
    (file,) = places[0].iterdir()
    file.unlink()
    places[0].rmdir()
    for _ in range(3):
        fail(breaker)
    status.close()
    assert breaker.state is not State.CLOSED
    assert len([record for record in caplog.records if "status" in record.name]) == 1


def test_a_disk_that_hangs_beneath_the_status_holds_one_thread_and_no_other(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = Breaker("cold", faults_max=1, retry_s=0)
    status = StatusFile(tmp_path / "cold", breaker)
    status.open()
    entered, may_go, replace = threading.Event(), threading.Event(), Path.replace

    def hanging(source: Path, target: Path) -> Path:
        entered.set()
        assert may_go.wait(60)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", hanging)
    held = threading.Thread(target=fail, args=(breaker,))
    held.start()
    assert entered.wait(60)
    number = breaker.begin()  # would hang here, and in `end`
    assert number is not None
    breaker.end(number, is_good=True, seconds=0)
    may_go.set()
    held.join()
    assert [found.state for found in living_stores()] == [State.CLOSED], "the newest was written"
    status.close()
    assert list(places[0].iterdir()) == []


def test_a_status_that_was_being_written_when_the_store_closed_is_removed(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = Breaker("cold", faults_max=1)
    status = StatusFile(tmp_path / "cold", breaker)
    status.open()
    entered, may_go, replace = threading.Event(), threading.Event(), Path.replace

    def hanging(source: Path, target: Path) -> Path:
        entered.set()
        assert may_go.wait(60)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", hanging)
    held = threading.Thread(target=fail, args=(breaker,))
    held.start()
    assert entered.wait(60)
    status.close()
    may_go.set()
    held.join()
    assert list(places[0].iterdir()) == []


def test_since_is_when_it_closed_or_when_it_first_opened(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    breaker = Breaker("cold", faults_max=1, retry_s=0)
    status = StatusFile(tmp_path / "cold", breaker)
    status.open()
    times = [living_stores()[0].since]
    for is_good in (False, False, True):
        time.sleep(0.01)
        number = breaker.begin()
        assert number is not None
        breaker.end(number, is_good=is_good, seconds=0)
        times.append(living_stores()[0].since)
    status.close()
    opened, failed, failed_again, closed = times
    assert opened < failed == failed_again < closed


@pytest.mark.parametrize("text", ["", "{}", '{"pid": 1}', "[" * 5000, "\0" * 100])
def test_a_status_that_is_none_is_passed_over(
    places: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    status = StatusFile(tmp_path / "cold", Breaker("cold"))
    status.open()
    (file,) = places[0].iterdir()
    whole = json.loads(file.read_text())
    other = places[0] / f"{os.getpid()}-x.json"
    assert len(living_stores()) == 1
    for part in ({"state": 7}, {"since": 1e300}, {"written": -1}, {"directory": 3}):
        write(other, json.dumps(whole | part))
        assert len(living_stores()) == 1, part
    write(other, json.dumps(whole))
    assert len(living_stores()) == 2
    write(other, text)
    assert len(living_stores()) == 1
    other.unlink()
    os.mkfifo(other)
    assert len(living_stores()) == 1
    status.close()
