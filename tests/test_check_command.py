"""The command `check`: names every damage by file and page, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.cold_directories import (
    HEADER,
    NAMESPACES,
    SLOT,
    fill,
    flip,
    flip_page,
    open_store,
    run_command,
    slot_of,
    tokens_of,
)
from tierkv.core.errors import ConfigError
from tierkv.store import Store
from tierkv.testing.store import abandon
from tierkv.tiers.segment_io import Fault, SegmentIO, Wanted
from tierkv.upkeep.report import examine

Command: TypeAlias = Callable[..., "Result"]
#: A layout's part of the JSON.
Report: TypeAlias = dict[str, Any]


class Result:
    """What a run of the command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> Result:
        code = run_command(*arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)

    return run


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A cold directory with one layout, closed cleanly."""
    fill(tmp_path / "cold", 40, namespaces=NAMESPACES)
    return tmp_path / "cold"


@pytest.fixture
def folder(cold: Path) -> Path:
    (found,) = cold.iterdir()
    return found


def state_of(directory: Path) -> dict[str, tuple[str, int, int, int]]:
    """Bytes, times and modes of everything beneath, links not followed."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (digest, status.st_mtime_ns, status.st_mode, status.st_ctime_ns)
    return found


@pytest.fixture
def report_of(command: Command, tmp_path: Path) -> Callable[..., Report]:
    """The only layout's part of the JSON of a check, after making sure that nothing changed."""

    def run(path: Path, *options: str, code: int) -> Report:
        before = state_of(path)
        done = command("check", path, *options, "--json", tmp_path / "report.json")
        assert (done.code, done.err) == (code, "")
        assert state_of(path) == before
        whole = json.loads((tmp_path / "report.json").read_text())
        assert whole["ok"] is (code == 0)
        (layout,) = whole["layouts"]
        for flaw in layout["flaws"]:  # whatever the JSON names, the words name too
            assert flaw["file"] in done.out
        return layout

    return run


Reporter: TypeAlias = Callable[..., Report]


def pages_in(folder: Path, report_of: Reporter) -> int:
    return report_of(folder, code=0)["recovery"]["pages_kept"]


@pytest.mark.parametrize("options", [(), ("--deep",)], ids=["headers", "deep"])
def test_a_good_directory_is_ok_and_not_changed(
    cold: Path, folder: Path, report_of: Reporter, options: tuple[str, ...]
) -> None:
    for path in (cold, folder):
        found = report_of(path, *options, code=0)
        assert found["flaws"] == []
        assert found["clean_stop"]
        assert found["directory"] == str(folder)
        spaces = found["namespaces"]
        assert [spaces[name]["blocks"] for name in ("default", "tenant")] == [40, 40]
        recovery = found["recovery"]
        assert recovery["pages_dropped"] == 0
        assert recovery["pages_refused_when_read"] == (0 if options else None)
        assert recovery["pages_kept"] + found["pages_free"] == found["pages"]
        assert recovery["pages_kept"] == sum(space["pages"] for space in spaces.values())


def test_the_json_has_these_keys(cold: Path, command: Command, tmp_path: Path) -> None:
    assert command("check", cold, "--json", tmp_path / "r.json").code == 0
    whole = json.loads((tmp_path / "r.json").read_text())
    assert set(whole) == {"version", "directory", "deep", "ok", "layouts"}
    assert whole["version"] == 1
    assert set(whole["layouts"][0]) == {
        "directory", "fingerprint", "store_id", "clean_stop", "segments", "disk_bytes",
        "warm_page_bytes", "pages", "pages_free", "recovery", "namespaces", "flaws",
        "protection", "key_used",
    }  # fmt: skip


def test_a_report_that_cannot_be_written_is_two(cold: Path, command: Command) -> None:
    done = command("check", cold, "--json", cold / "none" / "r.json")
    assert done.code == 2
    assert done.err.startswith("--json: ")


def test_two_layouts_are_both_reported(cold: Path, command: Command) -> None:
    fill(cold, 10, model="other")
    done = command("check", cold, "--deep")
    assert done.code == 0
    assert all(str(folder) in done.out for folder in cold.iterdir())
    assert done.out.count("ok: headers and payloads verify") == 2


def test_every_flipped_payload_is_named_with_file_and_page(
    folder: Path, report_of: Reporter
) -> None:
    count = pages_in(folder, report_of)
    assert count > 8
    for page in range(count):
        flip_page(folder, page, HEADER + 997 * page, 1 << page % 8)
    assert report_of(folder, code=0)["flaws"] == []  # payloads are not read
    found = report_of(folder, "--deep", code=1)
    named = {(flaw["file"], flaw["page"]) for flaw in found["flaws"]}
    assert named == {(slot_of(folder, page)[0].name, page) for page in range(count)}
    assert all(flaw["what"].startswith("payload of page") for flaw in found["flaws"])
    assert sum(flaw["blocks_lost"] for flaw in found["flaws"]) == 80
    assert all(flaw["cure"] and flaw["blocks_lost_is_exact"] for flaw in found["flaws"])
    assert found["recovery"]["pages_refused_when_read"] == count
    assert found["recovery"]["blocks_refused_when_read"] == 80


@pytest.mark.parametrize("at", [0, 20, 24, 33, 50, 90, 100, 160, 2000, HEADER - 20, HEADER - 1])
def test_a_flipped_header_is_dropped_and_named(folder: Path, report_of: Reporter, at: int) -> None:
    flip_page(folder, 3, at)
    found = report_of(folder, code=1)
    (flaw,) = found["flaws"]
    file, _ = slot_of(folder, 3)
    assert (flaw["file"], flaw["page"], flaw["weight"]) == (file.name, 3, "damage")
    assert "page 3" in flaw["what"]
    assert not flaw["blocks_lost_is_exact"]
    assert found["recovery"]["pages_dropped"] == 1


def test_a_page_in_the_wrong_slot_is_named(folder: Path, report_of: Reporter) -> None:
    file, first = slot_of(folder, 0)
    _, second = slot_of(folder, 1)
    data = bytearray(file.read_bytes())
    data[second : second + SLOT] = data[first : first + SLOT]
    file.write_bytes(data)
    (flaw,) = report_of(folder, "--deep", code=1)["flaws"]
    assert flaw["page"] == 1
    assert "number of page 1: expected 1, found 0" in flaw["what"]


@pytest.mark.parametrize("page", range(8))
def test_what_check_says_of_the_next_start_is_what_it_finds(
    cold: Path, folder: Path, report_of: Reporter, page: int
) -> None:
    flip_page(folder, page, 40)
    flip(folder / "segment-00000001.tkv", 100)
    flip(folder / "manifest", 5)
    foretold = report_of(folder, code=1)
    with open_store(cold) as store:
        stored = store.snapshot()["tiers"]["cold,blocks"]
    assert stored < 80
    # Without the tenant's salt nobody can tell its root from the key of a block that is lost.
    assert foretold["recovery"]["blocks_kept"] >= stored
    assert not foretold["recovery"]["blocks_kept_is_exact"]
    after = report_of(folder, "--deep", code=0)
    assert after["recovery"]["blocks_kept"] >= stored
    assert not after["recovery"]["blocks_kept_is_exact"]


@pytest.mark.parametrize("page", range(8))
def test_blocks_behind_a_lost_page_are_counted_as_the_store_does(
    tmp_path: Path, report_of: Reporter, page: int
) -> None:
    fill(tmp_path / "one", 40)
    (folder,) = (tmp_path / "one").iterdir()
    flip_page(folder, page, 40)
    foretold = report_of(folder, code=1)["recovery"]
    with open_store(tmp_path / "one") as store:
        stored = store.snapshot()["tiers"]["cold,blocks"]
    assert foretold["blocks_kept_is_exact"] is (page != 0)
    if page != 0:
        assert foretold["blocks_kept"] == stored
        assert stored + foretold["blocks_let_go"] == 35


def lose_manifest(folder: Path) -> tuple[str, str]:
    (folder / "manifest").unlink()
    return "manifest", "missing"


def break_manifest(folder: Path) -> tuple[str, str]:
    flip(folder / "manifest", 30)
    return "manifest", "wrong checksum"


def break_segment_header(folder: Path) -> tuple[str, str]:
    flip(folder / "segment-00000000.tkv", 24)
    return "segment-00000000.tkv", "checksum of segment header"


def lose_segment(folder: Path) -> tuple[str, str]:
    (folder / "segment-00000000.tkv").unlink()
    return "segment-00000000.tkv", "missing"


def swap_segments(folder: Path) -> tuple[str, str]:
    (folder / "segment-00000001.tkv").write_bytes((folder / "segment-00000000.tkv").read_bytes())
    return "segment-00000001.tkv", "it is segment 0 of store"


def cut_segment(folder: Path) -> tuple[str, str]:
    os.truncate(folder / "segment-00000000.tkv", 4096 + 2 * SLOT + 4096)
    return "segment-00000000.tkv", "cut off after 2 whole pages"


def link_segment(folder: Path) -> tuple[str, str]:
    (folder.parent.parent / "other").hardlink_to(folder / "segment-00000000.tkv")
    return "segment-00000000.tkv", "2 names (hard links)"


def open_segment(folder: Path) -> tuple[str, str]:
    (folder / "segment-00000000.tkv").chmod(0o666)
    return "segment-00000000.tkv", "others may write to it"


@pytest.mark.parametrize(
    "damage",
    [
        lose_manifest,
        break_manifest,
        break_segment_header,
        lose_segment,
        swap_segments,
        cut_segment,
        link_segment,
        open_segment,
    ],
)
def test_damage_of_a_file_is_named_with_its_cure(
    folder: Path, report_of: Reporter, damage: Callable[[Path], tuple[str, str]]
) -> None:
    file, what = damage(folder)
    flaws = [f for f in report_of(folder, "--deep", code=1)["flaws"] if f["weight"] == "damage"]
    (flaw,) = flaws
    assert (flaw["file"], flaw["page"]) == (file, None)
    assert what in flaw["what"]
    assert flaw["cure"]


def test_a_link_out_of_the_directory_is_not_followed(
    folder: Path, report_of: Reporter, tmp_path: Path
) -> None:
    segment = folder / "segment-00000000.tkv"
    target = tmp_path / "elsewhere"
    segment.rename(target)
    segment.symlink_to(target)
    flip(target, 4096 + HEADER + 5)
    flaws = report_of(folder, "--deep", code=1)["flaws"]
    assert [(f["weight"], f["file"]) for f in flaws] == [
        ("note", segment.name),
        ("damage", segment.name),
    ]
    assert "links are not followed" in flaws[0]["what"]
    assert flaws[1]["what"] == "it is missing"


def test_names_cannot_reach_the_terminal_as_commands(folder: Path, command: Command) -> None:
    (folder / "\x1b[31mred[bold]").write_text("x")
    done = command("check", folder)
    assert done.code == 0
    assert "\\x1b[31mred[bold]" in done.out
    assert "\x1b" not in done.out


def test_stray_files_are_notes_and_cost_nothing(folder: Path, report_of: Reporter) -> None:
    (folder / "manifest.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    flaws = report_of(folder, code=0)["flaws"]
    assert [(f["file"], f["weight"], f["blocks_lost"]) for f in flaws] == [
        ("manifest.tmp", "note", 0),
        ("notes.txt", "note", 0),
    ]


def test_an_unclean_stop_is_a_note(cold: Path, folder: Path, report_of: Reporter) -> None:
    abandon(open_store(cold))
    found = report_of(folder, "--deep", code=0)
    assert not found["clean_stop"]
    assert [f["weight"] for f in found["flaws"]] == ["note"]


def test_a_device_error_is_named_with_its_page(
    folder: Path, report_of: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SegmentIO.read_run

    def failing(self: SegmentIO, run: Sequence[Wanted]) -> list[Fault]:
        return [OSError(5, "Input/output error")] if run[0].page == 4 else real(self, run)

    monkeypatch.setattr(SegmentIO, "read_run", failing)
    (flaw,) = report_of(folder, "--deep", code=1)["flaws"]
    assert (flaw["page"], "Input/output error" in flaw["what"]) == (4, True)
    assert "dmesg" in flaw["cure"]


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_is_a_finding_or_a_word_and_never_more(folder: Path, seed: int) -> None:
    """Bytes changed, zeroed or cut anywhere; what was stored is found good or named."""
    rng = random.Random(seed)
    (before,) = examine(folder, deep=True)
    path = rng.choice(sorted(folder.glob("*[0-9t]*")))
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if seed % 4 == 0:
        del data[at:]
    elif seed % 4 == 1:
        data[at : at + 5000] = bytes(len(data[at : at + 5000]))
    else:
        data[at : at + seed] = rng.randbytes(len(data[at : at + seed]))
    path.write_bytes(data)
    try:
        (after,) = examine(folder, deep=True)
    except ConfigError:
        return
    good = after.pages_kept - after.pages_refused
    assert good == before.pages_kept or after.damage
    assert after.pages_kept + after.pages_dropped + after.pages_free == after.pages


def no_such(tmp_path: Path, cold: Path) -> tuple[Path, str]:
    return tmp_path / "none", "there is no such directory"


def no_directory(tmp_path: Path, cold: Path) -> tuple[Path, str]:
    (tmp_path / "file").write_text("x")
    return tmp_path / "file", "is not a directory"


def no_cold(tmp_path: Path, cold: Path) -> tuple[Path, str]:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    return tmp_path / "empty", "is not a cold directory"


def only_a_link(tmp_path: Path, cold: Path) -> tuple[Path, str]:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "x").symlink_to(next(cold.iterdir()), target_is_directory=True)
    return tmp_path / "linked", "is not a cold directory"


def shared(tmp_path: Path, cold: Path) -> tuple[Path, str]:
    next(cold.iterdir()).chmod(0o777)
    return cold, "others may write to it"


def other_format(tmp_path: Path, cold: Path) -> tuple[Path, str]:
    import xxhash

    (folder,) = cold.iterdir()
    line = (folder / "manifest").read_bytes().split(b"\n")[0].replace(b'"format":1', b'"format":9')
    digest = xxhash.xxh3_128_hexdigest(line).encode()
    (folder / "manifest").write_bytes((line + b"\n" + digest + b"\n").ljust(4096))
    return cold, "of format 9, this version reads 1"


def nothing_left(tmp_path: Path, cold: Path) -> tuple[Path, str]:
    (folder,) = cold.iterdir()
    (folder / "manifest").unlink()
    for path in folder.glob("segment-*"):
        flip(path, 0)
    return cold, "nothing in it can be recovered"


@pytest.mark.parametrize(
    "mistake",
    [no_such, no_directory, no_cold, only_a_link, shared, other_format, nothing_left],
)
def test_a_mistake_is_two_and_a_word_and_changes_nothing(
    tmp_path: Path, cold: Path, command: Command, mistake: Callable[..., tuple[Path, str]]
) -> None:
    path, message = mistake(tmp_path, cold)
    before = state_of(tmp_path)
    done = command("check", path)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert str(path) in done.err
    assert state_of(tmp_path) == before


@pytest.fixture
def running(cold: Path) -> Iterator[Store]:
    with open_store(cold) as store:
        yield store


@pytest.mark.parametrize("name", ["check", "scrub"])
def test_a_running_store_is_left_alone(
    cold: Path, running: Store, command: Command, name: str
) -> None:
    done = command(name, cold)
    assert done.code == 2
    assert f"is in use by pid {os.getpid()}" in done.err
    assert "stop that store" in done.err
    running.check()


def test_a_store_starts_after_a_check(cold: Path, command: Command) -> None:
    assert command("check", cold, "--deep").code == 0
    with open_store(cold) as store:
        assert store.match(tokens_of(40, 0)).blocks == 40
