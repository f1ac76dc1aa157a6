"""Preemption: places inside of copies and calls to the disk where another thread may go on.

For code under `tierkv.testing.scheduler`: a copy of many blocks, or a write of many sectors, is not
one moment, and what others see in the middle of it is where stores go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tierkv.core.tier import Span
from tierkv.testing.scheduler import Scheduler
from tierkv.tiers.files.base import Buffer, FileEngine


class PreemptibleFiles:
    """`inner`, where others may go on before each call, and in the middle of reads and writes.

    `hang` is called before each call too: it may wait.
    """

    def __init__(self, inner: FileEngine, scheduler: Scheduler, hang: Callable[[], None]) -> None:
        self.name = inner.name
        self.align_bytes = inner.align_bytes
        self._inner = inner
        self._scheduler = scheduler
        self._hang = hang

    def __getattr__(self, name: str) -> Callable[..., Any]:
        work: Callable[..., Any] = getattr(self._inner, name)

        def call(*arguments: object, **named: object) -> Any:  # noqa: ANN401
            self._scheduler.pause()
            self._hang()
            return work(*arguments, **named)

        return call

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """In two parts."""
        self._in_parts(self._inner.read, handle, offset, buffers)

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """In two parts."""
        self._in_parts(self._inner.write, handle, offset, buffers)

    def _in_parts(
        self,
        work: Callable[[int, int, Sequence[Buffer]], None],
        handle: int,
        offset: int,
        buffers: Sequence[Buffer],
    ) -> None:
        self._scheduler.pause()
        self._hang()
        sectors = sum(map(len, buffers)) // 4096
        cut = self._scheduler.rng.randint(0, sectors) * 4096 if sectors > 1 else 0
        left, right = _split(buffers, cut)
        if left:
            work(handle, offset, left)
            self._scheduler.pause()
        if right:
            work(handle, offset + cut, right)
            self._scheduler.pause()


def _split(buffers: Sequence[Buffer], at: int) -> tuple[list[Buffer], list[Buffer]]:
    left: list[Buffer] = []
    right: list[Buffer] = []
    for view in buffers:
        here = min(at, len(view))
        if here:
            left.append(view[:here])
        if here < len(view):
            right.append(view[here:])
        at -= here
    return left, right


def cut_copies(tier: object, scheduler: Scheduler, *, page: int = 0, offset: int = 0) -> None:
    """Have a memory tier copy block by block; others may go on in between."""

    def cut(work: Callable[[list[Span], object], None]) -> Callable[..., None]:
        def copy(spans: Sequence[Span], rows: object) -> None:
            for span in spans:
                for n in range(span.count):
                    scheduler.pause()
                    at = span.page + n * page, span.offset + n * offset
                    work([Span(span.index + n, *at, 1)], rows)

        return copy

    for name in ("read", "write"):
        setattr(tier, name, cut(getattr(tier, name)))
