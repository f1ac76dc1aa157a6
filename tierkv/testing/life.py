"""One life of an engine, in a process of its own: a program gets a `Life`, and gives `Said`.

A program that lives lives is a function of a `Life` and ends with ``main(live)``; it is called
with two files, the order and the answer::

    python an_engine_life.py ORDER.json ANSWER.json

It needs neither pytest nor the project's tests, so it runs where the engine is installed. The suite
that drives it is `tierkv.testing.engines`.
"""

from __future__ import annotations

import errno
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import msgspec

from tierkv.tiers.files.base import Buffer

#: Metadata, and what a file engine is tried with, are read in pieces of at most this; KV bytes in
#: larger ones. An engine that is troubled when it is tried would not be chosen.
_SMALL_BYTES: Final = 16384
_BAD: Final = "a bad sector"


class Trouble(StrEnum):
    """What is wrong with a life's tiers."""

    #: Every other read of KV bytes from the disk is an error.
    READS_FAIL = "reads_fail"
    #: Every other read of KV bytes has a bit wrong.
    READS_FLIP = "reads_flip"
    #: Every other write of KV bytes to the disk is an error.
    WRITES_FAIL = "writes_fail"
    #: The disk has no room for KV bytes from the start.
    DISK_FULL = "disk_full"
    #: Every third copy into host memory finds no memory.
    HOST_FAILS = "host_fails"
    #: Bytes from the disk have bits wrong and nobody verifies them: tokens have to change.
    BELIEVED = "believed"


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt as token ids; its answer is greedy."""

    tokens: list[int]
    #: New tokens to answer.
    count: int = 8
    #: Whose it is: tenants share nothing. "" is nobody's.
    tenant: str = ""
    #: The asker goes away in the middle, before `count` tokens were answered.
    is_cancelled: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The new tokens, and how many of the prompt's an earlier turn or life had computed."""

    tokens: list[int]
    reused: int = 0


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is to live through.

    `turns` are answered one after the other, the asks of one together. Between turns the engine
    loses what it keeps itself, so that what is reused comes from tierkv. At the end it is closed.
    """

    turns: list[list[Ask]]
    #: Where tierkv keeps its files; None: an engine without tierkv.
    directory: str | None = None
    host: str = "256MiB"
    cold: str = "1GiB"
    #: "first", or "second": a model of the same name and shapes with other weights.
    model: str = "first"
    #: What the KV is kept as: "float32" or "bfloat16".
    dtype: str = "float32"
    trouble: Trouble | None = None
    #: What else this engine is told, in its own words.
    settings: dict[str, Any] = {}


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """The answers by turn; a cancelled ask's has the tokens that had come."""

    turns: list[list[Answer]]
    #: How long each turn took.
    seconds: list[float] = []
    #: What the engine counted, by its own names.
    counters: dict[str, float] = {}


def main(live: Callable[[Life], Said]) -> None:
    """Read the order, live, write the answer."""
    order, answer = Path(sys.argv[1]), Path(sys.argv[2])
    life = msgspec.json.decode(order.read_bytes(), type=Life)
    with troubled(life.trouble):
        said = live(life)
    answer.write_bytes(msgspec.json.encode(said))


def troubled(trouble: Trouble | None) -> AbstractContextManager[object]:
    """Make the tiers of this process so, and whole again."""
    from tierkv.tiers import segment_io
    from tierkv.tiers.files.direct import DirectFiles
    from tierkv.tiers.host import HostTier

    if trouble is None:
        return nullcontext()
    stack = ExitStack()
    # A store tries a directory out before it is used; it would take another file engine then.
    stack.enter_context(patch.object(DirectFiles, "_write_and_read_back", lambda *_: None))
    if trouble is Trouble.HOST_FAILS:
        memory = _Failing(HostTier.write, every=3, error=MemoryError())
        stack.enter_context(patch.object(HostTier, "write", memory.call))
    elif trouble in (Trouble.WRITES_FAIL, Trouble.DISK_FULL):
        is_full = trouble is Trouble.DISK_FULL
        error = OSError(errno.ENOSPC, "no space left") if is_full else OSError(errno.EIO, _BAD)
        for name in ("write", "preallocate") if is_full else ("write",):
            real = getattr(DirectFiles, name)
            every = 1 if is_full else 2
            failing = _Failing(real, every=every, error=error, least_bytes=_SMALL_BYTES + 1)
            stack.enter_context(patch.object(DirectFiles, name, failing.call))
    else:
        reads = _WrongReads(DirectFiles.read, trouble)
        stack.enter_context(patch.object(DirectFiles, "read", reads.call))
        if trouble is Trouble.BELIEVED:
            stack.enter_context(patch.object(segment_io, "verify_page", lambda *_, **__: None))
    return stack


class _Failing:
    """A method of which each so-manieth call is an error; none of fewer bytes than the least."""

    def __init__(
        self, real: Callable[..., None], *, every: int, error: Exception, least_bytes: int = 0
    ) -> None:
        self._calls = itertools.count(1)

        def call(owner: object, *arguments: object) -> None:
            if _size(arguments[-1]) >= least_bytes and not next(self._calls) % every:
                raise error
            real(owner, *arguments)

        self.call = call


class _WrongReads:
    """Reads of KV bytes of which some are wrong."""

    def __init__(self, real: Callable[..., None], trouble: Trouble) -> None:
        self._calls = itertools.count(1)

        def call(files: object, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
            is_hit = sum(map(len, buffers)) > _SMALL_BYTES and (
                trouble is Trouble.BELIEVED or not next(self._calls) % 2
            )
            if is_hit and trouble is Trouble.READS_FAIL:
                raise OSError(errno.EIO, _BAD)
            real(files, handle, offset, buffers)
            if is_hit:
                _flip(buffers, every=256 if trouble is Trouble.BELIEVED else 1 << 20)

        self.call = call


def _size(what: object) -> int:
    """Bytes that a call is about: its last argument is their number, or has them."""
    if isinstance(what, int):
        return what
    return sum(map(len, what)) if isinstance(what, Sequence) else 0


def _flip(buffers: Sequence[Buffer], *, every: int) -> None:
    """Turn a bit over in one of every so many bytes."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        # The last byte of an element of any dtype: of the first, a float32 would hardly change.
        for at in range(min(every, len(view)) // 2 | 7, len(view), every):
            view[at] ^= 0x40
