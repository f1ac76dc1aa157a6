"""Whatever lies in the cold directory: refused by name, or no wrong bytes, and nothing outside."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tierkv.core.errors import TierFailed
from tierkv.store import Store
from tierkv.testing.drills import flips, hostile
from tierkv.testing.drills.base import BROKEN, Wrong
from tierkv.tiers import segment_directory
from tierkv.tiers.files import portable, root

#: Cases after the entries one by one: one to three together.
TOGETHER = 100


def test_hostile_entries_are_refused_by_name_or_harm_nothing() -> None:
    known = len(hostile.entries())
    assert known >= 60
    tally = hostile.run(known + TOGETHER, seed=1)

    assert tally.holds, tally.wrong


def test_the_drill_finds_an_engine_that_takes_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "_refusal", lambda _status: None)

    _expect_found(monkeypatch, "a hard link to a file outside", "outside/witness")


def test_the_drill_finds_an_engine_that_follows_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "_OPEN_FLAGS", root._OPEN_FLAGS & ~os.O_NOFOLLOW)

    _expect_found(monkeypatch, "lock is a link to a file outside", "outside/witness")


def test_the_drill_finds_a_root_that_is_somebodys_link(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("only root can make a link in another user's name")
    monkeypatch.setattr(Path, "is_symlink", lambda _path: False)

    _expect_found(monkeypatch, "somebody's link to a directory outside", "outside/lock")


def test_the_drill_finds_an_open_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = root.RootedFiles.open

    def hanging(self: root.RootedFiles, name: str, *, create: bool = False) -> int:
        if name == "manifest":
            time.sleep(1)
        return real(self, name, create=create)

    monkeypatch.setattr(root.RootedFiles, "open", hanging)
    monkeypatch.setattr(hostile, "LIMIT_S", 0.3)
    _expect_found(monkeypatch, "stranger", "it hung")
    time.sleep(1.5)  # until the thread that hung has ended


def test_the_drill_finds_an_error_of_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(_self: object, _name: str) -> bytes:
        raise KeyError("segments")

    monkeypatch.setattr(segment_directory.SegmentDirectory, "_read_file", careless)

    _expect_found(monkeypatch, "a manifest of another layout", "KeyError")


def test_a_link_under_the_name_of_a_segment_in_the_making_does_not_stop_it(tmp_path: Path) -> None:
    config = hostile.config_at(tmp_path)
    at = tmp_path / flips.LAYOUT.fingerprint.hex()[:16]
    at.mkdir(mode=0o700)
    (at / "segment-00000000.tmp").symlink_to("/dev/zero")

    with Store.open(config, flips.LAYOUT) as store:
        first = flips.prompts()[0]
        assert store.put(first.tokens, first.rows) == len(first.keys)
        assert store.flush()
    assert (at / "segment-00000000.tkv").is_file()
    assert not (at / "segment-00000000.tmp").is_symlink()


def test_a_link_of_ours_in_the_roots_place_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir(mode=0o700)
    (tmp_path / "near").symlink_to("far")
    files = portable.PortableFiles(tmp_path / "near")
    files.close(files.open("x", create=True))
    files.shutdown()

    assert (tmp_path / "far" / "x").is_file()


def test_a_refusal_names_the_entry_and_the_cure(tmp_path: Path) -> None:
    at = tmp_path / flips.LAYOUT.fingerprint.hex()[:16]
    at.mkdir(mode=0o700)
    os.mkfifo(at / "lock")

    with pytest.raises(TierFailed, match=r"not a regular file: '.*/lock'; cure: remove"):
        Store.open(hostile.config_at(tmp_path), flips.LAYOUT)


def _expect_found(patch: pytest.MonkeyPatch, entry: str, words: str) -> None:
    """The drill tells of the entry, and the case that it names goes wrong again."""
    chosen = [known for known in hostile.entries() if entry in known.name][:1]
    patch.setattr(hostile, "entries", lambda: chosen)

    tally = hostile.run(1, seed=3)

    assert [line for line in tally.wrong[BROKEN] if line.startswith("seed 3, case 0: ")]
    with pytest.raises(Wrong, match=words):
        hostile.replay(3, 0)
