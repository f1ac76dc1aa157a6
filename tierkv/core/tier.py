"""The words that planner, tiers and transfers share: which tier, and what a page holds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Self


class TierId(IntEnum):
    """The tiers, fastest first. The number indexes the planner's tables."""

    DEVICE = 0
    HOST = 1
    COLD = 2

    label: str  # the name used in configuration, counters and reports

    def __new__(cls, number: int) -> Self:
        """The member of that number, with its label."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.label = ("device", "host", "cold")[number]
        return member


@dataclass(frozen=True, slots=True)
class BlockLabel:
    """Which block lies at one position of a page, as written into a cold page's header."""

    position: int
    key: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class PageLabel:
    """What a warm page holds: the tenant and its blocks, in position order."""

    namespace: str
    blocks: tuple[BlockLabel, ...]


@dataclass(frozen=True, slots=True)
class RecoveredPage:
    """A warm page found again in the cold tier when it was opened."""

    page: int
    generation: int
    label: PageLabel


class Span(NamedTuple):
    """`count` consecutive places of one page; they hold blocks `index ..` of the request."""

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody wants here
    page: int
    offset: int
    count: int  # type: ignore[assignment]  # shadows tuple.count


@dataclass(frozen=True, slots=True)
class ColdUsage:
    """What the tier takes and did since it was opened; pages unless named otherwise."""

    disk_bytes: int
    segments: int
    stored: int
    quarantined: int
    distrusted: int
    pages_read: int
    pages_written: int
    pages_corrupt: int
    pages_torn: int
    io_errors: int
    syncs: int
