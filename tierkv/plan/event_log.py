"""Event log: what happened to a planner, one JSON line an event, so that it replays exactly.

The first line is the `PlanSpec`; every other line is ``[now_ns, event, digest]``, where digest
is xxh3-64 of the instructions that came out. Tokens are not in it, only keys; keys are salted
hashes. Reading and writing files is the caller's part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import xxhash

from tierkv.core.errors import CorruptData
from tierkv.plan.events import AnyEvent, AnyInstruction
from tierkv.plan.planner import Planner
from tierkv.plan.spec import PlanSpec

_encoder = msgspec.json.Encoder()
_packer = msgspec.msgpack.Encoder()
_entry = msgspec.json.Decoder(tuple[int, AnyEvent, int])
_spec = msgspec.json.Decoder(PlanSpec)


def head_line(spec: PlanSpec) -> bytes:
    """The first line of a log."""
    return _encoder.encode(spec) + b"\n"


def entry_line(now_ns: int, event: AnyEvent, out: list[AnyInstruction]) -> bytes:
    """One event and the digest of its instructions."""
    return _encoder.encode((now_ns, event, digest_of(out))) + b"\n"


def digest_of(out: list[AnyInstruction]) -> int:
    """xxh3-64 over the instructions, in order."""
    return xxhash.xxh3_64_intdigest(_packer.encode(out))


@dataclass(frozen=True, slots=True)
class Replay:
    """How a replay went: lines whose instructions differed, by line number from 1."""

    planner: Planner
    events: int
    different: list[int]


def replay(lines: Iterable[bytes]) -> Replay:
    """Feed a log to a fresh planner. Raises CorruptData naming the line that cannot be read."""
    planner: Planner | None = None
    different: list[int] = []
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            if planner is None:
                planner = Planner(_spec.decode(line))
                continue
            now_ns, event, digest = _entry.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptData(f"event log, line {number}: {error}") from error
        if digest_of(planner.handle(event, now_ns)) != digest:
            different.append(number)
    if planner is None:
        raise CorruptData("event log, line 1: the log is empty")
    return Replay(planner, number - 1, different)
