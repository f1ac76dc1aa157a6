"""The command `drill`: faults in a copy are noticed, all of them, and a check that lies is told."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tierkv import cli
from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.store import Store
from tierkv.testing.files import FaultyFiles
from tierkv.tiers import segment_io
from tierkv.tiers.files.portable import PortableFiles
from tierkv.tiers.segment_format import page_header_bytes
from tierkv.tiers.segments import SegmentTier
from tierkv.upkeep import DrillKind
from tierkv.upkeep.drill import COPY_PREFIX, Outcome, run_drill

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
HEADER = page_header_bytes(5)
SLOT = HEADER + 32768


def open_store(directory: Path, model: str = "m") -> Store:
    pages = {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"}
    cold = {"capacity": "4MiB", "directory": str(directory), "segment_cold_pages": 2}
    tiers = {
        "host": {"capacity": "512KiB"},
        "device": {"capacity": 0, "device": "cpu"},
        "cold": cold,
    }
    config = Config.model_validate({"pages": pages, "tiers": tiers})
    return Store.open(config, Layout(GEOMETRY, targets=config.pages.targets, model=model))


def fill(directory: Path, blocks: int = 60, model: str = "m") -> None:
    with open_store(directory, model) as store:
        rng = np.random.default_rng(blocks)
        shape = (store.plan.layers, blocks, store.plan.block_layer_bytes)
        tokens = [int(n) for n in rng.integers(0, 1000, blocks * 16)]
        store.put(tokens, rng.integers(0, 256, shape, dtype=np.uint8))
        assert store.flush()


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A cold directory with one layout of 12 full pages, closed cleanly."""
    fill(tmp_path / "cold")
    return tmp_path / "cold"


@pytest.fixture
def folder(cold: Path) -> Path:
    (found,) = cold.iterdir()
    return found


def slot_of(folder: Path, page: int) -> tuple[Path, int]:
    """The file of a page and where in it the page's header begins: 8 pages a segment."""
    return folder / f"segment-{page // 8:08d}.tkv", 4096 + page % 8 * SLOT


def flip(folder: Path, page: int, at: int) -> None:
    path, offset = slot_of(folder, page)
    data = bytearray(path.read_bytes())
    data[offset + at] ^= 1
    path.write_bytes(data)


def run_command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tierkv", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


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
    flip(folder, 3, HEADER + 7)
    flip(folder, 5, 30)
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
    fill(cold, 20, "other")
    assert run_command("drill", kind.value, cold, "--seed", 7) == 0
    done = capfd.readouterr()
    assert done.err == ""
    assert done.out.count("held: every fault was noticed") == 2
    assert done.out.count("(seed 7)") == 2


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
