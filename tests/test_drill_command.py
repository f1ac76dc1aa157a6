"""The command `drill`: faults in a copy are noticed, all of them, and a check that lies is told."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.cold_directories import (
    HEADER,
    fill,
    flip_page,
    open_store,
    run_command,
    tokens_of,
)
from tierkv.testing.files import FaultyFiles
from tierkv.tiers import segment_io
from tierkv.tiers.files.portable import PortableFiles
from tierkv.tiers.segments import SegmentTier
from tierkv.upkeep import DrillKind
from tierkv.upkeep.drill import COPY_PREFIX, Outcome, run_drill
from tierkv.upkeep.report import examine


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A cold directory with one layout of 12 full pages, closed cleanly."""
    fill(tmp_path / "cold")
    return tmp_path / "cold"


@pytest.fixture
def folder(cold: Path) -> Path:
    (found,) = cold.iterdir()
    return found


KINDS = list(DrillKind)


def state_of(directory: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def drilled(cold: Path, kind: DrillKind, seed: int = 0, count: int = 4) -> Outcome:
    before = state_of(cold)
    (found,) = run_drill(cold, kind, seed=seed, count=count)
    assert state_of(cold) == before
    assert list(cold.glob(f"{COPY_PREFIX}*")) == []
    return found


@pytest.mark.parametrize("seed", range(12))
def test_every_corrupted_page_is_noticed(cold: Path, seed: int) -> None:
    found = drilled(cold, DrillKind.CORRUPT, seed)
    assert (found.pages, found.broken, found.noticed) == (12, 4, 4)
    assert found.held


def test_all_pages_may_be_corrupted(cold: Path) -> None:
    found = drilled(cold, DrillKind.CORRUPT, count=1000)
    assert (found.broken, found.noticed, found.held) == (12, 12, True)


@pytest.mark.parametrize("seed", range(3))
def test_without_room_what_is_stored_is_served(cold: Path, seed: int) -> None:
    found = drilled(cold, DrillKind.ENOSPC, seed)
    # Four pages that are overwritten, and one in a segment that would have to be made.
    assert (found.broken, found.noticed, found.held) == (5, 5, True)


@pytest.mark.parametrize("count", [1, 4, 100])
def test_a_dead_disk_is_misses_and_comes_back(cold: Path, count: int) -> None:
    found = drilled(cold, DrillKind.KILL_DISK, count=count)
    # All that was asked for after the disk died, and one write.
    assert found.broken == 12 - min(count, 11) + 1
    assert (found.noticed, found.held) == (found.broken, True)


def test_what_was_damaged_before_is_left_out(cold: Path, folder: Path) -> None:
    flip_page(folder, 3, HEADER + 7)
    flip_page(folder, 5, 30)
    for kind in KINDS:
        found = drilled(cold, kind, count=100)
        assert (found.pages, found.damaged_before, found.held) == (10, 2, True)


def test_a_lost_manifest_keeps_no_drill_from_running(cold: Path, folder: Path) -> None:
    (folder / "manifest").unlink()
    for kind in KINDS:
        assert drilled(cold, kind).held


def believe_all(*args: object, **named: object) -> None:
    """A comparison of checksums that finds everything right."""


def test_checksums_that_are_not_compared_are_told(
    cold: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(segment_io, "verify_page", believe_all)
    (found,) = run_drill(cold, DrillKind.CORRUPT, seed=1, count=12)
    assert found.noticed < found.broken
    assert found.wrong
    assert not found.held
    assert run_command("drill", "corrupt", cold, "--seed", 1) == 1
    out = capsys.readouterr().out
    assert "NOT held" in out
    assert list(cold.glob(f"{COPY_PREFIX}*")) == []


def test_a_write_that_is_lost_in_silence_is_told(
    cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegmentTier, "write_pages", believe_all)
    for kind in (DrillKind.ENOSPC, DrillKind.KILL_DISK):
        (found,) = run_drill(cold, kind, seed=0, count=4)
        assert not found.held


def test_a_read_that_makes_bytes_up_is_told(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_pages(self: SegmentTier, pages: Sequence[int], outs: object) -> list[bool]:
        return [True for _ in pages]

    monkeypatch.setattr(SegmentTier, "read_pages", read_pages)
    for kind in KINDS:
        (found,) = run_drill(cold, kind, seed=0, count=4)
        assert len(found.wrong) >= 8
        assert not found.held


def test_unharmed_pages_that_are_not_served_are_told(
    cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_pages(self: SegmentTier, pages: Sequence[int], outs: object) -> list[bool]:
        return [False for _ in pages]

    monkeypatch.setattr(SegmentTier, "read_pages", read_pages)
    for kind in KINDS:
        (found,) = run_drill(cold, kind, seed=0, count=4)
        assert found.lost
        assert not found.held


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_says_what_held(
    cold: Path, kind: DrillKind, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(cold, 20, model="other")
    assert run_command("drill", kind.value, cold, "--seed", 7) == 0
    done = capfd.readouterr()
    assert done.err == ""
    assert done.out.count("held: every fault was noticed") == 2
    assert done.out.count("(seed 7)") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_copy_is_kept_where_it_is_wanted(
    cold: Path, kind: DrillKind, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(cold, 20, model="other")
    before = state_of(cold)
    kept = cold.parent / "away" / "broken"
    assert run_command("drill", kind.value, cold, "--keep", kept, "--seed", 7) == 0
    assert f"the broken copy is kept in {kept}" in capfd.readouterr().out
    assert state_of(cold) == before
    assert {path.name for path in kept.iterdir()} == {path.name for path in cold.iterdir()}
    assert list(kept.parent.iterdir()) == [kept]
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.rglob("*"))
    assert list(cold.glob(f"{COPY_PREFIX}*")) == []


@pytest.mark.parametrize("seed", range(4))
def test_the_kept_copy_has_the_damage_that_was_made(cold: Path, folder: Path, seed: int) -> None:
    kept = cold.parent / "broken"
    (found,) = run_drill(cold, DrillKind.CORRUPT, seed=seed, count=4, keep=kept)
    assert found.held
    (report,) = examine(kept, deep=True)
    assert len(report.damage) == 4
    assert report.directory == kept / folder.name
    (whole,) = examine(cold, deep=True)
    assert whole.damage == []
    # A store on it gives what was put, or fewer blocks, and takes the rest anew.
    (expected,) = blocks_of(cold)
    blocks = expect_right(kept)
    assert blocks < expected
    fill(kept)
    assert expect_right(kept) == expected


def blocks_of(cold: Path) -> list[int]:
    with open_store(cold) as store:
        return [store.match(tokens_of(60, 0)).blocks]


def expect_right(cold: Path) -> int:
    """How many blocks a store gives; each byte of them is the one that was put."""
    with open_store(cold) as store:
        shape = (store.plan.layers, 60, store.plan.block_layer_bytes)
        data = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        out = np.empty_like(data)
        blocks = store.get(store.match(tokens_of(60, 0)), out)
        assert np.array_equal(out[:, :blocks], data[:, :blocks])
        return blocks


@pytest.mark.parametrize("kind", [DrillKind.ENOSPC, DrillKind.KILL_DISK])
def test_the_kept_copy_is_as_the_fault_left_it(cold: Path, kind: DrillKind) -> None:
    kept = cold.parent / "broken"
    (found,) = run_drill(cold, kind, seed=3, count=4, keep=kept)
    assert found.held
    (report,) = examine(kept, deep=True)
    assert not report.is_clean, "no start has put it right"
    assert expect_right(kept) <= 60


def test_one_folder_is_kept_as_one_folder(cold: Path, folder: Path) -> None:
    kept = cold.parent / "broken"
    (found,) = run_drill(folder, DrillKind.CORRUPT, seed=0, count=4, keep=kept)
    assert found.held
    (report,) = examine(kept, deep=True)
    assert (report.directory, len(report.damage)) == (kept, 4)


def test_what_exists_or_is_drilled_is_no_place_to_keep(
    cold: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cold.parent / "link").symlink_to(cold.parent / "nowhere")
    (cold.parent / "file").write_text("mine")
    before = state_of(cold.parent)
    places = (cold, folder, cold.parent / "link", cold.parent / "file")
    for place, word in [*((place, "exists") for place in places), (cold / "new", "lies in")]:
        assert run_command("drill", "corrupt", cold, "--keep", place) == 2
        err = capsys.readouterr().err
        assert f"--keep {place}: it {word}" in err
        assert "cure: " in err
    assert run_command("drill", "corrupt", cold, "--keep", cold.parent / "file" / "new") == 2
    assert "it cannot be made" in capsys.readouterr().err
    assert state_of(cold.parent) == before


def test_a_drill_that_cannot_be_done_leaves_no_folder(
    cold: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(cold):
        assert run_command("drill", "corrupt", cold, "--keep", cold.parent / "a" / "new") == 2
    assert "is in use by pid" in capsys.readouterr().err
    assert list(cold.parent.iterdir()) == [cold]


def test_a_copy_that_does_not_fit_is_refused(
    cold: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage(NamedTuple):
        total: int = 1 << 30
        used: int = 1 << 30
        free: int = 300_000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    assert run_command("drill", "corrupt", cold) == 2
    err = capsys.readouterr().err
    assert "a copy takes" in err
    assert "cure: free some space" in err
    assert list(cold.glob(f"{COPY_PREFIX}*")) == []


def test_a_copy_that_cannot_be_written_is_one_and_leaves_nothing(
    cold: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PortableFiles, "write", full)
    assert run_command("drill", "corrupt", cold) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(cold.glob(f"{COPY_PREFIX}*")) == []


def test_an_interrupted_drill_leaves_no_copy(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    for place in ("read", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(FaultyFiles, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_drill(cold, DrillKind.ENOSPC, seed=0)
        assert list(cold.glob(f"{COPY_PREFIX}*")) == []


def test_mistakes_are_two_and_a_word(
    cold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("drill", "corrupt", tmp_path / "none") == 2
    assert "there is no such directory" in capsys.readouterr().err
    assert run_command("drill", "flood", cold) == 2
    assert "kill-disk" in capsys.readouterr().err
    with open_store(cold):
        assert run_command("drill", "corrupt", cold) == 2
    assert "is in use by pid" in capsys.readouterr().err
    empty = tmp_path / "empty"
    open_store(empty).close()
    assert run_command("drill", "enospc", empty) == 2
    assert "nothing to drill with" in capsys.readouterr().err
