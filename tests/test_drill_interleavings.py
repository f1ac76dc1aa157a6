"""The whole store in many orders: nothing wrong, and planted mistakes are found."""

from __future__ import annotations

import pytest

from tierkv import store
from tierkv.memory import Memory, Rows
from tierkv.plan import events as ev
from tierkv.plan.planner import Planner
from tierkv.runtime import Runtime
from tierkv.store import Store
from tierkv.testing.drills import interleavings
from tierkv.transfer.engine import TransferEngine

SEED = 1
#: `make reliability` does many times as many.
CASES, PARTS = 2_000, 4


def found_after(cases: int) -> set[str]:
    """The kinds of what is wrong in so many cases."""
    return set(interleavings.run(cases, SEED).wrong)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_order_of_events_gives_a_wrong_byte_or_costs_what_was_flushed(part: int) -> None:
    tally = interleavings.run(CASES // PARTS, SEED + part)

    assert tally.cases == CASES // PARTS
    assert tally.holds, "\n".join(line for lines in tally.wrong.values() for line in lines[:10])


def test_a_seed_replays_exactly() -> None:
    """Also what is wrong: a planted mistake is met again at the same step."""

    def steps() -> list[int]:
        seen = []
        for case in range(12):
            world = interleavings.World(interleavings.case_random(interleavings.NAME, SEED, case))
            world.run()
            seen.append(world.steps)
        return seen

    assert steps() == steps()


def test_a_block_that_is_published_before_its_bytes_are_there_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_early(
        runtime: Runtime, memory: Memory, out: list[ev.AnyInstruction], rows: Rows
    ) -> None:
        for item in out:
            if isinstance(item, ev.Fill):
                with runtime.lock:
                    runtime.handle(ev.Filled(item.ticket, True))
                memory.fill(item, rows)

    monkeypatch.setattr(store, "fill_all", too_early)
    assert "wrong bytes" in found_after(100)


def test_a_result_that_nobody_is_woken_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransferEngine, "wait", lambda *_arguments, **_named: False)
    assert found_after(200)


def test_a_flush_that_does_not_sync_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "_sync", lambda *_arguments: True)
    assert "durable and lost" in found_after(300)


def test_a_pin_that_is_not_given_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Planner._release

    def forgets_one(self: Planner, event: object, now_ns: int, out: list[object]) -> None:
        record = self.leases[event.lease]  # type: ignore[attr-defined]
        record.pins = record.pins[:-1]
        release(self, event, now_ns, out)  # type: ignore[arg-type]

    monkeypatch.setattr(Planner, "_release", forgets_one)
    assert "leaked" in found_after(30)
