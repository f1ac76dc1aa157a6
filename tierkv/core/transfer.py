"""A transfer: the one instruction that planner and transfer engine share."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from tierkv.core.tier import PageLabel, TierId


class Urgency(IntEnum):
    """Who waits for a transfer. Lower goes first."""

    DEMAND = 0
    PREFETCH = 1
    DEMOTE = 2


class Outcome(IntEnum):
    """How one move of a transfer ended."""

    SKIPPED = 0  # it did not begin: cancelled, or past its deadline
    ARRIVED = 1
    FAILED = 2  # nobody can tell what the target holds; a cold source is lost


class Instruction(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Something to be done."""


class Move(msgspec.Struct, frozen=True, gc=False):
    """One page (host ↔ cold) or one block (device ↔ host: places) of a transfer."""

    source: int
    target: int
    label: PageLabel | None = None  # what the page holds, where the target is the cold tier
    unused: tuple[int, ...] = ()  # offsets to zero before they reach a disk


class Transfer(Instruction, frozen=True, omit_defaults=True):
    """Copy pages or blocks between two tiers, then say `TransferDone`.

    `fresh` are host pages to be zeroed before, each with its opening, whether it begins or not.
    """

    id: int
    source: TierId
    target: TierId
    moves: list[Move]
    urgency: Urgency
    fresh: tuple[tuple[int, int], ...] = ()
