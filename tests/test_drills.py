"""Crashes at every call and faults at every call: nothing wrong, and planted mistakes are found."""

from __future__ import annotations

import pytest

from tierkv.testing.drills import Tally, crashes, nth_fault
from tierkv.tiers import segment_io
from tierkv.tiers.segments import SegmentTier

SEED = 1
#: Of each drill; `make reliability` does many times as many.
CRASHES, FAULTS = 20_000, 5_000

pytestmark = pytest.mark.usefixtures("quiet")


def expect_nothing_wrong(tally: Tally, cases: int) -> None:
    assert tally.cases == cases
    assert tally.holds, "\n".join(line for lines in tally.wrong.values() for line in lines[:20])


@pytest.mark.parametrize("part", range(2))
def test_a_crash_at_any_call_costs_no_durable_page_and_gives_no_wrong_byte(part: int) -> None:
    expect_nothing_wrong(crashes.run(CRASHES // 2, SEED + part), CRASHES // 2)


@pytest.mark.parametrize("part", range(2))
def test_a_fault_at_any_call_costs_no_durable_page_and_gives_no_wrong_byte(part: int) -> None:
    expect_nothing_wrong(nth_fault.run(FAULTS // 2, SEED + part), FAULTS // 2)


def test_a_sync_that_syncs_nothing_is_found_as_durable_and_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SegmentTier, "sync", lambda _self: None)
    tally = crashes.run(1_500, SEED)

    assert "durable and lost" in tally.wrong
    assert tally.wrong["durable and lost"][0].startswith("seed 1, case ")


def test_a_payload_that_is_not_verified_is_found_as_wrong_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segment_io, "_fault", lambda *_arguments: None)
    tally = crashes.run(3_000, SEED)

    assert "wrong bytes" in tally.wrong


def test_a_failed_sync_that_is_believed_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentTier, "_distrust", lambda *_arguments: None)
    tally = nth_fault.run(3_000, SEED)

    assert not tally.holds


def test_a_case_can_be_had_again_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentTier, "sync", lambda _self: None)
    line = crashes.run(1_500, SEED).wrong["durable and lost"][0]
    case = int(line.split("case ")[1].split(":")[0])

    with pytest.raises(Exception, match="durable and lost"):
        crashes.replay(SEED, case)
