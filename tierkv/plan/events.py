"""The planner's vocabulary: events go in, instructions come out.

All are plain values that msgspec can write, so that a log of events replays to the same
instructions. Times are monotonic nanoseconds and come with the event, never from a clock.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

from tierkv.core.tier import RecoveredPage, Span, TierId
from tierkv.core.transfer import Instruction, Outcome, Transfer, Urgency


class HintKind(StrEnum):
    """What an engine knows about the future of a prefix."""

    PIN = "pin"  # keep every resident copy until UNPIN, or until a read finds no other host page
    UNPIN = "unpin"
    PREFETCH = "prefetch"  # bring it to host memory now
    EXPECT = "expect"  # it returns at `at_ns`: prefetch in time (session pause, tool call)
    DEMOTE = "demote"  # it pauses: only the cold copy is worth keeping
    SAVE = "save"  # others will want it: write the cold copy now, and keep this one
    FORGET = "forget"  # it will not return
    TTL = "ttl"  # drop it at `at_ns`


class Event(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Something that happened."""


class Put(Event, frozen=True):
    """Blocks `first ..` of a chain are offered; the caller holds their bytes."""

    keys: list[bytes]
    first: int
    namespace: str


class Filled(Event, frozen=True):
    """The caller has written what a `Fill` asked for, or failed to."""

    ticket: int
    ok: bool


class Acquire(Event, frozen=True):
    """Blocks ``first .. first + count`` of a chain are wanted in memory, pinned."""

    keys: list[bytes]
    first: int
    count: int
    namespace: str


class Release(Event, frozen=True):
    """A reader is done with its lease."""

    lease: int


class Admit(Event, frozen=True):
    """The reader of a lease offers its blocks, whose bytes it holds, to the device tier."""

    lease: int


class TransferDone(Event, frozen=True):
    """A transfer ended; one outcome for each of its moves."""

    transfer: int
    outcomes: list[Outcome]


class Touch(Event, frozen=True):
    """A chain was used as a whole, after it was acquired in parts."""

    keys: list[bytes]


class Hint(Event, frozen=True):
    """An engine's word about a prefix; hints come before any prediction."""

    kind: HintKind
    keys: list[bytes]
    namespace: str = "default"
    at_ns: int = 0


class Clear(Event, frozen=True):
    """Nothing that is stored will be wanted: all is to be forgotten."""


class Flush(Event, frozen=True):
    """Everything in memory shall reach the cold tier, partial pages too."""


class Recovered(Event, frozen=True):
    """What the cold tier found when it was opened."""

    pages: list[RecoveredPage]
    #: Pages that cannot be written, and are never given out.
    withheld: list[int] = []


class Syncing(Event, frozen=True):
    """A sync of the cold tier begins; numbers rise."""

    number: int


class Synced(Event, frozen=True):
    """That sync has succeeded: what was written before it began is durable."""

    number: int


class Distrust(Event, frozen=True):
    """Cold pages whose durability was promised wrongly (a failed sync): forget them."""

    pages: list[int]


class Erased(Event, frozen=True):
    """An `Erase` was carried out, or failed for good."""

    pages: list[int]


class Tick(Event, frozen=True):
    """Time has passed."""


class Fill(Instruction, frozen=True, omit_defaults=True):
    """Write these blocks of the `Put` (or `Admit`) into a memory tier, then say `Filled`.

    `indices` are positions in the offered blocks; the i-th goes to the i-th place of `spans`.
    `fresh` are pages to be zeroed before, each with its opening: see `PagePool`.
    """

    ticket: int
    tier: TierId
    indices: list[int]
    spans: list[Span]
    fresh: tuple[tuple[int, int], ...] = ()


class Raise(Instruction, frozen=True):
    """A transfer that is already under way is now waited for."""

    transfer: int
    urgency: Urgency


class Cancel(Instruction, frozen=True):
    """A queued transfer is not wanted any more; it still ends with `TransferDone`."""

    transfer: int


class Grant(Instruction, frozen=True):
    """The answer to `Acquire`: the first `count` blocks are pinned or on their way.

    Read them with `Planner.located` when the transfers in `waits` are done.
    """

    lease: int
    count: int
    waits: list[int]


class Short(Instruction, frozen=True):
    """No place for block `index` and later ones of a `Put`.

    `waits` are transfers whose end may make room; empty if waiting is useless.
    """

    index: int
    waits: list[int]


class Erase(Instruction, frozen=True):
    """Make cold pages unfindable by a later recovery, then say `Erased`."""

    pages: list[int]


AnyEvent: TypeAlias = (
    Put
    | Filled
    | Acquire
    | Release
    | Admit
    | TransferDone
    | Touch
    | Hint
    | Clear
    | Flush
    | Recovered
    | Syncing
    | Synced
    | Distrust
    | Erased
    | Tick
)
AnyInstruction: TypeAlias = Fill | Transfer | Raise | Cancel | Grant | Short | Erase
