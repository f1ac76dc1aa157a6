"""Whatever lies in the cold directory: refused by name, or no wrong bytes, and nothing outside."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tierkv.core.errors import TierFailed
from tierkv.store import Store
from tierkv.testing.drills import flips_site, hostile
from tierkv.testing.drills.base import BROKEN, Wrong
from tierkv.tiers import segment_directory
from tierkv.tiers.files import portable, root
from tierkv.transfer.breaker import State

#: Cases after the entries one by one: one to three together.
TOGETHER = 100


@pytest.mark.usefixtures("quiet")
def test_hostile_entries_are_refused_by_name_or_harm_nothing() -> None:
    known = len(hostile.entries())
    assert known >= 60
    tally = hostile.run(known + TOGETHER, seed=1)

    assert tally.holds, tally.wrong


def test_the_drill_finds_an_engine_that_takes_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "_refusal", lambda _status: None)

    _expect_found(monkeypatch, "a hard link to a file outside", "outside/witness")


def test_the_drill_finds_an_engine_that_follows_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "open_beneath", _following)

    _expect_found(monkeypatch, "lock is a link to a file outside", "outside/witness")


def test_the_drill_finds_a_root_that_is_somebodys_link(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("only root can make a link in another user's name")
    monkeypatch.setattr(root, "_link_refusal", lambda _status: None)

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
    at = tmp_path / flips_site.LAYOUT.fingerprint.hex()[:16]
    at.mkdir(mode=0o700)
    (at / "segment-00000000.tmp").symlink_to("/dev/zero")

    with Store.open(config, flips_site.LAYOUT) as store:
        first = flips_site.prompts()[0]
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
    at = tmp_path / flips_site.LAYOUT.fingerprint.hex()[:16]
    at.mkdir(mode=0o700)
    os.mkfifo(at / "lock")

    with pytest.raises(TierFailed, match=r"not a regular file: '.*/lock'; cure: remove"):
        Store.open(hostile.config_at(tmp_path), flips_site.LAYOUT)


@pytest.mark.parametrize("blocked", [[0], [3], [1, 2]])
def test_a_directory_under_a_segments_name_costs_that_segment_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, blocked: list[int]
) -> None:
    at = tmp_path / flips_site.LAYOUT.fingerprint.hex()[:16]
    at.mkdir(mode=0o700)
    names = [f"segment-{number:08d}.tkv" for number in blocked]
    for name in names:
        (at / name).mkdir()
    config = hostile.config_at(tmp_path)
    prompts = flips_site.prompts()[:2]  # of two pages each, and two segments are left

    with caplog.at_level(logging.WARNING), Store.open(config, flips_site.LAYOUT) as store:
        for prompt in prompts:
            assert store.put(prompt.tokens, prompt.rows) == len(prompt.keys)
            assert store.flush(), "it is durable in the other segments"
        tier = store._parts.cold
        assert tier is not None
        findings = tier.check()
        assert len(tier.withheld) == len(blocked) * flips_site.PER_SEGMENT
        assert store.snapshot()["tiers"]["cold,breaker_state"] == State.CLOSED
        assert "cold,failed" not in str(store.snapshot())
    for name in names:
        words = f"{name} is a directory, so this segment is not used; cure: remove it"
        assert any(words in finding for finding in findings), findings
        assert any(words in message for message in caplog.messages)
    assert all((at / name).is_dir() for name in names)

    (at / names[0]).rmdir()
    with Store.open(config, flips_site.LAYOUT) as store:
        for prompt in prompts:
            assert store.match(prompt.tokens).blocks == len(prompt.keys)
        tier = store._parts.cold
        assert tier is not None
        assert len(tier.withheld) == (len(blocked) - 1) * flips_site.PER_SEGMENT


def test_a_tier_whose_segments_are_all_blocked_leaves_memory_as_it_is(tmp_path: Path) -> None:
    at = tmp_path / flips_site.LAYOUT.fingerprint.hex()[:16]
    for number in range(4):
        (at / f"segment-{number:08d}.tkv").mkdir(parents=True)
    at.chmod(0o700)
    with Store.open(hostile.config_at(tmp_path), flips_site.LAYOUT) as store:
        for prompt in flips_site.prompts():
            store.put(prompt.tokens, prompt.rows, namespace=prompt.namespace)
            match = store.match(prompt.tokens, namespace=prompt.namespace)
            rows = np.zeros_like(prompt.rows)
            assert store.get(match, rows) == len(prompt.keys)
            assert np.array_equal(rows, prompt.rows)
        assert not store.flush(deadline_s=1)
        store.check()


def test_a_root_that_becomes_another_after_it_was_probed_is_a_failed_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = root._open_root
    opened: list[Path] = []

    def once(path: Path) -> int:
        opened.append(path)
        if len(opened) == 2:  # the first was the probe's
            path.chmod(0o777)
        return real(path)

    monkeypatch.setattr(root, "_open_root", once)
    with pytest.raises(TierFailed, match=r"others may write to it.*; cure: chmod 700"):
        Store.open(hostile.config_at(tmp_path, "portable"), flips_site.LAYOUT)


def test_the_drill_finds_a_root_that_is_looked_at_by_name_and_opened_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if os.geteuid():
        pytest.skip("only root can make a link in another user's name")

    def by_name(path: str, refusal: Callable[[os.stat_result], str | None]) -> int:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) and refusal(status):
            raise OSError(errno.EPERM, refusal(status), path)
        time.sleep(1e-3)  # as on a busy machine
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    monkeypatch.setattr(root, "open_directory", by_name)
    chosen = [known for known in hostile.entries() if known.name == "the root is swapped"]
    monkeypatch.setattr(hostile, "entries", lambda: chosen)
    tallies = [hostile.run(1, seed) for seed in range(60)]

    found = [line for tally in tallies for line in tally.wrong.get(BROKEN, [])]
    assert any("outside of the root was changed" in line for line in found), found


def _following(name: str, flags: int, at: int) -> int:
    return os.open(name, flags, 0o600, dir_fd=at)


def _expect_found(patch: pytest.MonkeyPatch, entry: str, words: str) -> None:
    """The drill tells of the entry, and the case that it names goes wrong again."""
    chosen = [known for known in hostile.entries() if entry in known.name][:1]
    patch.setattr(hostile, "entries", lambda: chosen)

    tally = hostile.run(1, seed=3)

    assert [line for line in tally.wrong[BROKEN] if line.startswith("seed 3, case 0: ")]
    with pytest.raises(Wrong, match=words):
        hostile.replay(3, 0)
