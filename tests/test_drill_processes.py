"""Real processes die and real kernels refuse: nothing wrong, and planted mistakes are found.

What is planted is a function of this file: the drill's server imports it and calls it.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tierkv.core.errors import TierKVError
from tierkv.core.transfer import Urgency
from tierkv.plan import events as ev
from tierkv.reading import Match, Reader
from tierkv.runtime import Runtime
from tierkv.store import Store
from tierkv.testing.drills import processes
from tierkv.testing.drills.base import BROKEN, LEAKED, LOST, NOT_RUN, WRONG_BYTES, Tally, Wrong
from tierkv.testing.drills.life import label_of, page_bytes_of, tier_on
from tierkv.testing.drills.process_child import Journal, Life, Task, tokens_of
from tierkv.testing.drills.process_faults import KINDS
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles
from tierkv.tiers.files.root import RootedFiles
from tierkv.tiers.segment_directory import SegmentDirectory
from tierkv.tiers.segments import SegmentTier
from tierkv.transfer.lane import Job, Lane

HERE = "tests.test_drill_processes"
SEED = 1
#: Of these many; `make reliability` does many times as many.
CASES, PARTS = 100, 4


def expect_nothing_wrong(tally: Tally, cases: int) -> None:
    assert tally.cases == cases
    assert tally.holds, "\n".join(line for lines in tally.wrong.values() for line in lines[:5])


@pytest.mark.parametrize("part", range(PARTS))
def test_a_process_that_dies_or_is_refused_costs_misses_and_nothing_else(part: int) -> None:
    cases = CASES // PARTS
    assert cases >= 2 * len(KINDS), "a part has some of each kind"
    expect_nothing_wrong(processes.run(cases, SEED + part), cases)


def flush_without_waiting() -> None:
    def careless(self: Store, _deadline: float) -> bool:
        with self._runtime.lock:
            self._runtime.pump()
            self._runtime.handle(ev.Flush())
        return True

    Store._flush = careless  # type: ignore[method-assign]


def leave_half_made_files() -> None:
    SegmentDirectory._remove_stale_files = lambda _self: None  # type: ignore[method-assign]


def deliver_what_did_not_arrive() -> None:
    right = Reader.get

    def careless(self: Reader, match: Match, out: object, first_block: int) -> int:
        right(self, match, out, first_block)  # type: ignore[arg-type]
        return match.blocks - first_block

    Reader.get = careless  # type: ignore[method-assign, assignment]


def let_errors_of_a_sync_through() -> None:
    right = SegmentTier.sync

    def careless(self: SegmentTier, **options: int) -> None:
        try:
            right(self, **options)
        except TierKVError as error:
            raise OSError(errno.EIO, str(error)) from error

    SegmentTier.sync = careless  # type: ignore[method-assign]


def keep_descriptors() -> None:
    def careless(self: RootedFiles, handle: int) -> None:
        del self._files[handle]

    RootedFiles.close = careless  # type: ignore[method-assign]


def go_on_after_half_an_event() -> None:
    never = property(lambda _self: False, lambda _self, _value: None)
    Runtime.gave_up = never  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    ("plant", "fault", "cases", "kind", "words"),
    [
        (flush_without_waiting, "kill_at_a_moment", 12, LOST, "killed"),
        (leave_half_made_files, "kill_at_a_call", 16, LEAKED, "left behind"),
        (deliver_what_did_not_arrive, "error_at_a_call", 40, WRONG_BYTES, "that nobody put there"),
        (let_errors_of_a_sync_through, "error_at_a_call", 30, BROKEN, "OSError"),
        (keep_descriptors, "full_disk", 2, LEAKED, "descriptor"),
        (go_on_after_half_an_event, "no_memory", 10, BROKEN, "allocations"),
    ],
)
def test_the_drill_finds(plant: object, fault: str, cases: int, kind: str, words: str) -> None:
    planted = f"{HERE}:{plant.__name__}"  # type: ignore[attr-defined]
    tally = processes.run(cases, SEED, plant=planted, only=fault)

    assert any(words in line for line in tally.wrong.get(kind, [])), f"seed {SEED}: {tally.wrong}"


def test_a_case_can_be_had_again_by_its_number() -> None:
    plant = f"{HERE}:keep_descriptors"
    tally = processes.run(2, SEED, plant=plant)
    kind, lines = next(iter(tally.wrong.items()))
    case = int(lines[0].split("case ")[1].split(":")[0])

    with pytest.raises(Wrong, match=kind):
        processes.replay(SEED, case, plant=plant)


def test_a_case_without_its_means_is_said_not_to_have_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    tally = processes.run(1, SEED, only="kill_at_a_call")

    assert not tally.holds
    assert "strace" in tally.wrong[NOT_RUN][0]


def test_a_store_with_an_event_half_done_is_a_miss_until_it_is_opened_again(tmp_path: Path) -> None:
    life = Life(Task(str(tmp_path), SEED), Journal(lambda _word: None))
    life.open()
    life.put([1, 2, 3], "default")
    assert life.flush()
    lease = life.opened.lease(life.opened.match(tokens_of([1, 2])))

    def half(_event: object, _now_ns: int, _out: object) -> None:
        raise MemoryError

    life.opened._runtime.planner._handlers[ev.Tick] = half
    with pytest.raises(MemoryError):
        life.opened.step()
    life.put([2, 2], "default")
    with life.opened.lease(life.opened.match(tokens_of([1, 2, 3]))) as nothing:
        assert nothing.blocks == 0
    lease.release()

    assert life.get([1, 2, 3], "default") == life.get([2, 2], "default") == 0
    assert not life.opened.flush()
    assert life.opened.snapshot()["tiers"]["gave_up"] == 1
    life.reopen()
    assert life.get([1, 2, 3], "default") == 3
    life.opened.close()


def test_a_lane_without_memory_for_its_own_work_goes_on_and_says_so() -> None:
    said, done = threading.Event(), threading.Event()
    lane = Lane("starved", threads=1, inflight_bytes_max=1, on_failure=said.set)

    def starved() -> None:
        raise MemoryError

    lane.submit([Job(1, 0, starved), Job(2, 0, done.set)], Urgency.DEMAND)

    assert said.wait(10)
    assert done.wait(10)
    lane.close()


def test_the_header_of_a_write_that_failed_is_not_found_in_place_of_an_older_copy() -> None:
    """Found by the drill: files of at most 8192 bytes, a flush, a clean stop."""
    disk = MemoryFiles(Path("disk"))
    files = FaultyFiles(disk)
    tier = tier_on(files)
    tier.open()
    tier.write_pages([0], [page_bytes_of(1)], [label_of(1)])
    tier.sync()
    files.schedule = lambda _number, name: Fault.SHORT if name == "write" else None
    with pytest.raises(TierKVError):
        tier.write_pages([1], [page_bytes_of(1)], [label_of(1)])
    files.schedule = None
    tier.close()

    assert [one.page for one in tier_on(disk).open()] == [0]
