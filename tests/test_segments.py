"""The cold tier keeps its contract on every engine, and its laws under faults and crashes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.core.errors import TierFailed, TierFull, TierKVError
from tierkv.core.tier import RecoveredPage
from tierkv.testing.file_engines import page_bytes
from tierkv.testing.files import (
    Fault,
    FaultyFiles,
    MemoryFiles,
    Schedule,
    at_rates,
    from_then_on,
    once,
)
from tierkv.testing.tiers import (
    FINGERPRINT,
    PAGE_BYTES,
    PLAN,
    ColdTierTests,
    page_label,
)
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.files.direct import DirectFiles
from tierkv.tiers.files.portable import PortableFiles
from tierkv.tiers.segments import SegmentTier


class TestSegmentsOnDirectFiles(ColdTierTests):
    def make(self, root: Path) -> FileEngine:
        reason = DirectFiles.probe(root)
        if reason is not None:
            pytest.skip(reason)
        return DirectFiles(root)

    def test_a_link_in_place_of_a_segment_is_never_followed(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0])
        tier.close()
        segment = self.root / "segment-00000000.tkv"
        elsewhere = self.root.parent / "elsewhere"
        segment.rename(elsewhere)
        before = elsewhere.read_bytes()
        segment.symlink_to(elsewhere)
        tier, found = self.open_tier()
        assert found == []
        assert any("segment 0" in finding for finding in tier.check())
        self.fill(tier, [1])
        assert self.verified(tier, [0, 1]) == [1]
        assert elsewhere.read_bytes() == before
        assert not segment.is_symlink()
        tier.close()

    def test_a_second_name_of_a_segment_is_refused_with_the_file_named(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0])
        tier.close()
        (self.root.parent / "elsewhere").hardlink_to(self.root / "segment-00000000.tkv")
        with pytest.raises(TierFailed, match=r"hard links.*segment-0{8}\.tkv"):
            self.open_tier()


class TestSegmentsOnPortableFiles(ColdTierTests):
    def make(self, root: Path) -> FileEngine:
        return PortableFiles(root)


class TestSegmentsOnMemoryFiles(ColdTierTests):
    def make(self, root: Path) -> FileEngine:
        return MemoryFiles(root)

    def restart(self, files: FileEngine, root: Path) -> FileEngine:
        del root
        files.shutdown()
        return files


def tier_on(files: FileEngine, *, pages_max: int = 20) -> SegmentTier:
    return SegmentTier(files, PLAN, FINGERPRINT, pages_max=pages_max, segment_cold_pages=2)


def memory(schedule: Schedule | None = None, *, seed: int = 0) -> FaultyFiles:
    return FaultyFiles(MemoryFiles(Path("disk"), seed=seed), schedule, seed=seed)


def fill(tier: SegmentTier, contents: dict[int, int]) -> None:
    """Write pages; the seed of each page's bytes and label is its value."""
    tier.write_pages(
        list(contents),
        [page_bytes(seed) for seed in contents.values()],
        [page_label(seed) for seed in contents.values()],
    )


def read(tier: SegmentTier, pages: list[int]) -> dict[int, bytes]:
    """What verified reads deliver."""
    outs = [aligned_array(PAGE_BYTES, 4096) for _ in pages]
    good = tier.read_pages(pages, outs)
    return {p: bytes(o) for p, o, g in zip(pages, outs, good, strict=True) if g}


def same(found: dict[int, bytes], contents: dict[int, int]) -> bool:
    return found == {page: bytes(page_bytes(seed)) for page, seed in contents.items()}


def test_consecutive_pages_cost_one_call() -> None:
    files = memory()
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0, 8: 8, 16: 16})
    before = files.calls
    fill(tier, {page: page for page in (3, 1, 2, 10, 11)})
    assert files.calls == before + 2
    assert same(read(tier, [11, 10, 1, 2, 3]), {p: p for p in (1, 2, 3, 10, 11)})
    assert files.calls == before + 4
    tier.close()


def test_one_unreadable_sector_costs_one_page() -> None:
    files = memory()
    tier = tier_on(files)
    tier.open()
    fill(tier, {page: page for page in range(4)})
    calls = iter([Fault.EIO, None, Fault.EIO, None, None])
    files.schedule = lambda _number, _operation: next(calls)
    assert same(read(tier, [0, 1, 2, 3]), {0: 0, 2: 2, 3: 3})
    files.schedule = None
    assert tier.quarantined == {1}
    assert tier.usage().io_errors == 1
    tier.close()


@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.EIO])
@pytest.mark.parametrize("run", [0, 1])
def test_a_failed_write_leaves_none_of_its_batch(fault: Fault, run: int) -> None:
    files = memory()
    tier = tier_on(files)
    tier.open()
    fill(tier, {1: 1, 9: 9, 2: 2})
    files.schedule = once(files.calls + run, fault)
    with pytest.raises(TierFailed, match="cannot write"):
        fill(tier, {1: 101, 9: 109})
    files.schedule = None
    assert same(read(tier, [1, 2, 9]), {2: 2})
    tier.close()


def test_a_full_disk_is_tier_full_and_leaves_no_segment() -> None:
    files = MemoryFiles(Path("disk"), capacity_bytes=200_000)
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0})
    with pytest.raises(TierFull, match="free space"):
        fill(tier, {8: 8})
    assert files.names() == ["lock", "manifest", "segment-00000000.tkv"]
    assert same(read(tier, [0, 8]), {0: 0})
    tier.close()


def test_after_a_failed_sync_what_was_not_durable_is_forgotten() -> None:
    files = memory(seed=1)
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0, 8: 8})
    tier.sync()
    fill(tier, {1: 1, 2: 2, 9: 9})
    files.schedule = once(files.calls, Fault.EIO)
    with pytest.raises(TierFailed, match="forgotten"):
        tier.sync()
    files.schedule = None
    (failed,) = {frozenset({1, 2}), frozenset({9})} & {tier.distrusted}
    alive = {page: page for page in (0, 8, 1, 2, 9) if page not in failed}
    assert same(read(tier, [0, 8, 1, 2, 9]), alive)
    tier.sync()
    fill(tier, {page: page for page in failed})
    tier.sync()
    assert tier.distrusted == frozenset()
    tier.close()


def test_a_stop_whose_sync_fails_is_not_a_clean_one() -> None:
    files = memory()
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0})
    files.schedule = lambda _number, operation: Fault.EIO if operation == "sync" else None
    with pytest.raises(TierFailed):
        tier.close()
    files.schedule = None
    after = tier_on(files)
    assert after._directory.open() is False
    after._directory.release()


def test_a_write_that_a_failed_sync_overtook_is_not_trusted() -> None:
    files = memory()
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0})

    def fail_a_sync_inside_the_write(_number: int, operation: str) -> Fault | None:
        if operation == "sync":
            return Fault.EIO
        with pytest.raises(TierFailed):
            tier.sync()
        return None

    files.schedule = fail_a_sync_inside_the_write
    with pytest.raises(TierFailed, match="while these pages"):
        fill(tier, {1: 1})
    files.schedule = None
    # The bytes of page 1 went to the device before or after the loss: nobody knows.
    assert read(tier, [0, 1]) == {}
    assert tier.distrusted == {0}
    tier.close()


def test_a_write_that_ended_while_a_sync_was_failing_is_not_trusted() -> None:
    files = memory()
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0, 8: 8})
    tier.sync()
    fill(tier, {1: 1})

    def write_inside_the_sync(_number: int, operation: str) -> Fault | None:
        if operation != "sync":
            return None
        fill(tier, {2: 2, 9: 9})
        return Fault.EIO

    files.schedule = write_inside_the_sync
    with pytest.raises(TierFailed):
        tier.sync()
    files.schedule = None
    assert tier.distrusted == {1, 2}
    assert same(read(tier, [0, 1, 2, 8, 9]), {0: 0, 8: 8, 9: 9})
    tier.close()


def test_a_sync_that_waited_for_a_failing_one_fails_too() -> None:
    files = memory()
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0})
    entered, go = threading.Event(), threading.Event()

    def slow_failure(_number: int, operation: str) -> Fault | None:
        if operation != "sync":
            return None
        entered.set()
        go.wait(10)
        return Fault.EIO

    files.schedule = slow_failure
    failed: list[str] = []

    def sync() -> None:
        try:
            tier.sync()
        except TierFailed:
            failed.append(threading.current_thread().name)

    threads = [threading.Thread(target=sync, name=name) for name in ("first", "second")]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    # The second cannot be seen to wait; were it not to, it would find nothing to sync and pass.
    threads[1].join(0.1)
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(failed) == ["first", "second"]
    files.schedule = None
    tier.close()


def test_a_damaged_manifest_is_made_again_from_the_segments() -> None:
    files = MemoryFiles(Path("disk"))
    tier = tier_on(files)
    tier.open()
    fill(tier, {3: 3, 12: 12})
    tier.close()
    handle = files.open("manifest")
    files.write(handle, 0, [page_bytes(9, size=4096).data])
    files.close(handle)
    tier = tier_on(files)
    found = tier.open()
    assert {p.page for p in found} == {3, 12}
    assert same(read(tier, [3, 12]), {3: 3, 12: 12})
    assert any("manifest was made again" in finding for finding in tier.check())
    tier.close()
    tier = tier_on(files)
    tier.open()
    assert tier.check(deep=True) == []
    tier.close()


def test_a_manifest_of_another_length_is_no_reason_to_fail() -> None:
    files = MemoryFiles(Path("disk"))
    tier = tier_on(files)
    tier.open()
    fill(tier, {3: 3})
    tier.close()
    files.unlink("manifest")
    files.close(files.open("manifest", create=True))
    tier = tier_on(files)
    assert [p.page for p in tier.open()] == [3]
    tier.close()


def test_a_damaged_segment_header_is_made_again() -> None:
    files = MemoryFiles(Path("disk"))
    tier = tier_on(files)
    tier.open()
    fill(tier, {3: 3})
    handle = files.open("segment-00000000.tkv")
    files.write(handle, 0, [page_bytes(9, size=4096).data])
    assert any("segment 0" in finding for finding in tier.check())
    tier.close()
    tier = tier_on(files)
    assert [p.page for p in tier.open()] == [3]
    assert any("header was made again" in finding for finding in tier.check())
    tier.close()


def test_a_segment_of_another_store_is_removed() -> None:
    ours, theirs = MemoryFiles(Path("ours")), MemoryFiles(Path("theirs"))
    for files in (ours, theirs):
        tier = tier_on(files)
        tier.open()
        fill(tier, {3: 3, 12: 12})
        tier.close()
    size = 4096 + 8 * (4096 + PAGE_BYTES)
    data = aligned_array(size, 4096)
    theirs.read(theirs.open("segment-00000000.tkv"), 0, [data.data])
    ours.write(ours.open("segment-00000000.tkv"), 0, [data.data])
    tier = tier_on(ours)
    assert [p.page for p in tier.open()] == [12]
    findings = tier.check()
    assert any("segment-00000000.tkv was removed" in finding for finding in findings)
    assert any("segment 0 of the manifest is missing" in finding for finding in findings)
    fill(tier, {3: 4})
    assert same(read(tier, [3, 12]), {3: 4, 12: 12})
    tier.close()


def test_a_write_that_failed_does_not_hide_an_older_copy_however_many_come_after_it() -> None:
    """After a crash only the newest pages are read in full: its header must be gone by then."""
    files = MemoryFiles(Path("disk"))
    faulty = FaultyFiles(files)

    def opened(engine: FileEngine) -> SegmentTier:
        sizes = {"pages_max": 16, "segment_cold_pages": 2, "inflight_max_bytes": PAGE_BYTES}
        return SegmentTier(engine, PLAN, FINGERPRINT, **sizes)

    tier = opened(faulty)
    tier.open()
    fill(tier, {0: 0, 5: 5})  # both segments' files are there
    tier.sync()
    faulty.schedule = once(faulty.calls, Fault.SHORT)
    with pytest.raises(TierFailed):
        tier.write_pages([1], [page_bytes(0, size=PAGE_BYTES)], [page_label(0)])
    faulty.schedule = None
    fill(tier, {2: 2, 3: 3, 4: 4})
    tier.sync()
    files.shutdown()

    again = opened(files)
    assert sorted(page.page for page in again.open()) == [0, 2, 3, 4, 5]
    assert same(read(again, [0]), {0: 0})
    again.close()


def test_a_generation_never_comes_back() -> None:
    files = MemoryFiles(Path("disk"))
    seen = [0]
    for _ in range(3):
        tier = tier_on(files)
        tier.open()
        fill(tier, {0: 0})
        files.shutdown()
        tier = tier_on(files)
        (page,) = tier.open()
        assert page.generation > seen[-1]
        seen.append(page.generation)
        # Without its highest generation on disk, the next epoch must still be above it.
        tier.erase([0])
        tier.close()


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_outlives_any_crash_even_with_no_page_left(seed: int) -> None:
    files = MemoryFiles(Path("disk"), seed=seed)
    last = 0
    for _ in range(3):
        tier = tier_on(files)
        tier.open()
        fill(tier, {0: 0})
        generation = int(tier._generations[0])
        assert generation > last
        last = generation
        tier.erase([0])
        tier.sync()
        files.crash()


@pytest.mark.parametrize("seed", range(20))
def test_a_segment_has_its_name_only_with_its_header(seed: int) -> None:
    files = MemoryFiles(Path("disk"), seed=seed)
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0})
    files.crash()
    tier = tier_on(files)
    tier.open()
    assert not any("header" in finding for finding in tier._directory.findings)
    tier.close()


def test_an_old_copy_of_a_segment_is_a_miss_while_running() -> None:
    files = MemoryFiles(Path("disk"))
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0, 1: 1})
    handle = files.open("segment-00000000.tkv")
    copy = aligned_array(files.size(handle), 4096)
    files.read(handle, 0, [copy.data])
    fill(tier, {0: 100})
    files.write(handle, 0, [copy.data])
    assert same(read(tier, [0, 1]), {1: 1})
    tier.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 63), max_size=60), st.integers(1, 5 * PAGE_BYTES))
def test_pieces_partition_any_batch(pages: list[int], piece_bytes: int) -> None:
    tier = tier_on(MemoryFiles(Path("disk")), pages_max=64)
    pieces = tier.pieces(pages, piece_bytes)
    assert sorted(index for piece in pieces for index in piece) == list(range(len(pages)))
    limit = max(1, piece_bytes // PAGE_BYTES)
    assert all(1 <= len(piece) <= limit for piece in pieces)
    flat = [pages[index] for piece in pieces for index in piece]
    assert flat == sorted(flat)


class Oracle:
    """What a page may and what it must read as, whatever happens to the disk."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.durable: dict[int, int] = {}
        self.ever: dict[int, set[int]] = {}
        #: Pages whose erasure is durable.
        self.gone: set[int] = set()

    def begin_write(self, page: int, seed: int) -> None:
        """From here on the page may be lost; it may turn out to be written, or not."""
        self.durable.pop(page, None)
        self.now.pop(page, None)
        self.gone.discard(page)
        self.ever.setdefault(page, set()).add(seed)

    def check_recovered(self, tier: SegmentTier, found: list[RecoveredPage]) -> None:
        """Every page said to be there is one that was put, or a miss; durable ones are there."""
        delivered = read(tier, [p.page for p in found])
        assert not self.gone & {p.page for p in found}, "an erased page came back"
        seeds = {
            page: {bytes(page_bytes(seed)): seed for seed in seeds}
            for page, seeds in self.ever.items()
        }
        self.now = {page: seeds[page][data] for page, data in delivered.items()}
        labels = {p.page: p.label for p in found}
        for page, seed in self.now.items():
            assert labels[page] == page_label(seed)
        for page, seed in self.durable.items():
            assert self.now.get(page) == seed, f"page {page} was durable and is lost"


def play(tier: SegmentTier, oracle: Oracle, rng: random.Random, steps: int) -> None:
    """Random writes, reads, erases and syncs against the oracle; TierKVError ends it."""
    erased: set[int] = set()
    for _ in range(steps):
        pages = rng.sample(range(20), rng.randint(1, 5))
        action = rng.random()
        if action < 0.5:
            seeds = {page: rng.randrange(1 << 20) for page in pages}
            for page, seed in seeds.items():
                oracle.begin_write(page, seed)
            fill(tier, seeds)
            oracle.now.update(seeds)
            erased -= set(seeds)
        elif action < 0.75:
            for page, data in read(tier, pages).items():
                assert data == bytes(page_bytes(oracle.now[page])), f"wrong bytes in page {page}"
        elif action < 0.85:
            for page in pages:
                oracle.durable.pop(page, None)
                oracle.now.pop(page, None)
            tier.erase(pages)
            erased |= set(pages)
        else:
            tier.sync()
            oracle.durable.update(oracle.now)
            oracle.gone |= erased


@pytest.mark.parametrize("seed", range(60))
def test_a_crash_never_gives_wrong_bytes_nor_loses_durable_ones(seed: int) -> None:
    rng = random.Random(seed)
    files = MemoryFiles(Path("disk"), seed=seed)
    oracle = Oracle()
    for _ in range(3):
        tier = tier_on(files)
        oracle.check_recovered(tier, tier.open())
        play(tier, oracle, rng, rng.randint(0, 12))
        if rng.random() < 0.2:
            tier.close()
            oracle.durable.update(oracle.now)
        else:
            files.crash()
    tier = tier_on(files)
    oracle.check_recovered(tier, tier.open())
    tier.close()


@pytest.mark.parametrize("seed", range(60))
def test_faults_at_rates_never_give_wrong_bytes(seed: int) -> None:
    rates = {Fault.EIO: 0.03, Fault.SHORT: 0.03, Fault.FLIP: 0.05, Fault.LOST: 0.05}
    files = memory(seed=seed)
    rng = random.Random(seed)
    oracle = Oracle()
    for _ in range(4):
        files.schedule = at_rates(rng.randrange(1 << 30), rates)
        tier = tier_on(files)
        try:
            tier.open()
            play(tier, oracle, rng, 15)
            tier.close()
        except TierKVError:
            files.crash()
        files.schedule = None
        # Lost writes and failed syncs may have cost any page, so nothing must be there now.
        oracle.durable.clear()
        oracle.gone.clear()
        tier = tier_on(files)
        oracle.check_recovered(tier, tier.open())
        tier.close()


def scripted_life(files: FaultyFiles) -> None:
    """Everything that a tier does in one life, small."""
    tier = tier_on(files)
    tier.open()
    try:
        fill(tier, {0: 0, 1: 1, 9: 9})
        tier.sync()
        read(tier, [0, 1, 9])
        fill(tier, {1: 101, 17: 17})
        tier.erase([0])
    finally:
        tier.close()


def calls_of_a_life() -> int:
    files = memory()
    scripted_life(files)
    return files.calls


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC, Fault.SHORT])
@pytest.mark.parametrize("lasting", [once, from_then_on])
def test_a_fault_at_any_call_is_a_typed_error_and_the_next_start_is_good(
    fault: Fault, lasting: Callable[[int, Fault], Schedule]
) -> None:
    """The loop of SQLite's tests: fail call 0, 1, 2, ... until a life ends without a fault."""
    for number in range(calls_of_a_life()):
        files = memory(lasting(number, fault), seed=number)
        try:
            scripted_life(files)
        except TierKVError:
            files.crash()
        files.schedule = None
        tier = tier_on(files)
        pages = [p.page for p in tier.open()]
        allowed = {0: [0], 1: [1, 101], 9: [9], 17: [17]}
        for page, data in read(tier, pages).items():
            assert data in [bytes(page_bytes(seed)) for seed in allowed[page]], (number, page)
        fill(tier, {5: 5})
        assert same(read(tier, [5]), {5: 5})
        tier.close()


def test_usage_counts_what_happened() -> None:
    tier = tier_on(MemoryFiles(Path("disk")))
    tier.open()
    fill(tier, {0: 0, 9: 9})
    read(tier, [0, 9, 10])
    tier.sync()
    usage = tier.usage()
    assert (usage.pages_written, usage.pages_read, usage.stored, usage.segments) == (2, 2, 2, 2)
    assert usage.disk_bytes == 2 * (4096 + 8 * (4096 + PAGE_BYTES))
    tier.close()


def test_a_batch_of_none_is_fine() -> None:
    tier = tier_on(MemoryFiles(Path("disk")))
    tier.open()
    tier.write_pages([], [], [])
    tier.erase([])
    assert tier.read_pages([], []) == []
    tier.close()
    tier.close()


@pytest.mark.parametrize("seed", range(8))
def test_an_erasure_that_a_failed_sync_dropped_is_covered_by_the_next_good_one(seed: int) -> None:
    """Found by the drill of the n-th fault: the page came back after a crash."""
    disk = MemoryFiles(Path("disk"), seed=seed)
    files = FaultyFiles(disk, seed=seed)
    tier = tier_on(files)
    tier.open()
    fill(tier, {0: 0, 1: 1})
    tier.sync()
    tier.erase([0])
    files.schedule = lambda _number, operation: Fault.EIO if operation == "sync" else None
    with pytest.raises(TierFailed):
        tier.sync()
    files.schedule = None
    tier.sync()
    disk.crash()
    tier = tier_on(files)
    assert 0 not in {found.page for found in tier.open()}
    tier.close()
