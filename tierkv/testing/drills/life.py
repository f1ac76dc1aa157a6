"""A cold tier's life as a script, and what may be found of it at any moment.

`Life` plays a script drawn from a seed on a `SegmentTier` and keeps book: for each page what a
reader may find there, and what must be found because a sync that covered it returned. An operation
that raises leaves its pages open: written, not written, or gone.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import TierKVError
from tierkv.core.tier import PageLabel, RecoveredPage
from tierkv.testing.drills.base import LEAKED, LOST, WRONG_BYTES, Wrong
from tierkv.testing.file_engines import page_bytes
from tierkv.testing.tiers import FINGERPRINT, PAGE_BYTES, PLAN, page_label
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.segments import SegmentTier

Bytes = npt.NDArray[np.uint8]

PAGES: Final = 20
#: What stands for "nothing" among the values that a page may have.
_NOTHING: Final = -1


class Step(NamedTuple):
    """One operation: on these pages, where it writes with these values."""

    action: str
    pages: tuple[int, ...] = ()
    values: tuple[int, ...] = ()


def script(rng: random.Random, steps: int = 12) -> list[Step]:
    """Writes and rewrites, reads, erasures, syncs and clean restarts."""
    actions = rng.choices(
        ("write", "read", "erase", "sync", "reopen"), weights=(9, 3, 2, 4, 1), k=steps
    )
    made = []
    for action in actions:
        pages = tuple(sorted(rng.sample(range(PAGES), rng.randint(1, 5))))
        values = tuple(rng.randrange(_VALUES) for _ in pages)
        made.append(Step(action, pages, values))
    return made


class Life:
    """See the module. One thread.

    Without `trusts_disk` the disk lies (it loses writes and says nothing): then nothing that was
    durable is asked for, and any value that a page ever had is as good as the last, as it comes
    with its own keys. Wrong bytes are wrong all the same.
    """

    def __init__(self, files: FileEngine, *, trusts_disk: bool = True) -> None:
        self._trusts_disk = trusts_disk
        self._files = files
        self.tier = tier_on(files)
        self._may: dict[int, set[int]] = {page: {_NOTHING} for page in range(PAGES)}
        self._ever: dict[int, set[int]] = {page: set() for page in range(PAGES)}
        self._must: dict[int, int] = {}
        self._now: dict[int, int] = {}
        self._is_open = False
        self._unsure: set[int] = set()  # an operation on them raised, and none has succeeded since

    def play(self, steps: list[Step], *, goes_on: bool = False) -> None:
        """Open the tier and carry the steps out. `goes_on`: also after one that raised."""
        try:
            self.tier.open()
        except TierKVError:
            if goes_on:
                return
            raise
        self._is_open = True
        for step in steps:
            try:
                self._carry_out(step)
            except TierKVError:
                if step.action in ("sync", "reopen"):
                    self._must.clear()  # what a failed sync covered is nobody's to promise
                else:
                    self._unsure.update(step.pages)
                if not goes_on:
                    raise

    def check(self, files: FileEngine) -> None:
        """Open what is there, and hold it against the book. Raises `Wrong`."""
        tier = tier_on(files)
        found = tier.open()
        delivered = self._read(tier, found)
        for page, value in delivered.items():
            if value not in (self._may if self._trusts_disk else self._ever)[page]:
                raise Wrong(WRONG_BYTES, f"page {page} holds value {value}")
        if self._trusts_disk:
            for page, value in self._must.items():
                if delivered.get(page) != value:
                    raise Wrong(LOST, f"page {page} held {value}, found {delivered.get(page)}")
        self._use(tier)
        tier.close()
        self._expect_no_rest(files)

    def _carry_out(self, step: Step) -> None:
        tier = self.tier
        if step.action == "write":
            for page, value in zip(step.pages, step.values, strict=True):
                self._must.pop(page, None)
                self._now.pop(page, None)
                self._may[page] = self._may[page] | {value, _NOTHING}
                self._ever[page].add(value)
            payloads = [page_bytes_of(value) for value in step.values]
            labels = [label_of(value) for value in step.values]
            gives_way = sum(step.values) % 2 == 1  # half of them in small requests
            tier.write_pages(step.pages, payloads, labels, gives_way=gives_way)
            self._now.update(zip(step.pages, step.values, strict=True))
            self._unsure.difference_update(step.pages)
        elif step.action == "read":
            self._expect_now([page for page in step.pages if page in self._now])
        elif step.action == "erase":
            for page in step.pages:
                self._must.pop(page, None)
                self._now.pop(page, None)
                self._may[page] = self._may[page] | {_NOTHING}
            tier.erase(step.pages)
            self._unsure.difference_update(step.pages)
        else:
            self._sync_or_reopen(step.action)

    def _sync_or_reopen(self, action: str) -> None:
        was_open, self._is_open = self._is_open, action == "sync" and self._is_open
        if action == "sync":
            self.tier.sync()
        else:
            self.tier.close()
        if was_open:  # closing what a failure has closed syncs nothing
            self._settle()
        if action == "reopen":
            self.tier = tier_on(self._files)
            there = {one.page for one in self.tier.open()}
            self._is_open = True
            for page in set(self._now) - there:
                del self._now[page]  # if it had to be there, `check` will say so
                self._unsure.add(page)

    def _expect_now(self, pages: list[int]) -> None:
        outs = [aligned_array(PAGE_BYTES, 4096) for _ in pages]
        for page, out, good in zip(pages, outs, self.tier.read_pages(pages, outs), strict=True):
            if not good:  # from here on it is quarantined: a miss, and one that stays
                self._must.pop(page, None)
                self._now.pop(page, None)
                self._may[page] = self._may[page] | {_NOTHING}
                self._unsure.add(page)
            elif not self._is_right(page, bytes(out)):
                raise Wrong(WRONG_BYTES, f"page {page} while it was in use")

    def _is_right(self, page: int, found: bytes) -> bool:
        values = {self._now[page]} if self._trusts_disk else self._ever[page]
        return found in [bytes(page_bytes_of(value)) for value in values]

    def _settle(self) -> None:
        """A sync has returned: what is there now must be found, and nothing else may be."""
        lost = self.tier.quarantined | self.tier.distrusted | self._unsure
        self._must = {page: value for page, value in self._now.items() if page not in lost}
        for page in range(PAGES):
            if page not in lost:
                self._may[page] = {self._now.get(page, _NOTHING)}

    def _read(self, tier: SegmentTier, found: list[RecoveredPage]) -> dict[int, int]:
        """The value of every page that verifies; its bytes and its label must be that value's."""
        pages = [one.page for one in found]
        outs = [aligned_array(PAGE_BYTES, 4096) for _ in pages]
        values: dict[int, int] = {}
        for one, out, good in zip(found, outs, tier.read_pages(pages, outs), strict=True):
            if not good:
                continue
            value = _value_of(bytes(out[:8]))
            if value is None or bytes(out) != bytes(page_bytes_of(value)):
                raise Wrong(WRONG_BYTES, f"page {one.page} holds bytes that nobody wrote")
            if one.label != label_of(value):
                raise Wrong(WRONG_BYTES, f"page {one.page} holds {value} under another's keys")
            values[one.page] = value
        return values

    def _use(self, tier: SegmentTier) -> None:
        """A tier that was recovered takes and gives pages."""
        value = _VALUES
        out = aligned_array(PAGE_BYTES, 4096)
        tier.write_pages([7], [page_bytes_of(value)], [label_of(value)])
        if tier.read_pages([7], [out]) != [True] or bytes(out) != bytes(page_bytes_of(value)):
            raise Wrong(WRONG_BYTES, "a page that was written after recovery")

    def _expect_no_rest(self, files: FileEngine) -> None:
        """Nothing but the manifest, the lock and segments; no temporary file, no handle."""
        names = [name for name in files.names() if not name.startswith("segment-")]
        odd = [name for name in names if name.endswith(".tmp")]
        if odd:
            raise Wrong(LEAKED, f"left behind: {odd}")


#: Values are drawn from so many, so that their bytes are made once.
_VALUES: Final = 64


@lru_cache(maxsize=_VALUES + 1)
def page_bytes_of(value: int) -> Bytes:
    """The bytes of a value."""
    return page_bytes(value, size=PAGE_BYTES)


@lru_cache(maxsize=_VALUES + 1)
def label_of(value: int) -> PageLabel:
    """The label of a value."""
    return page_label(value)


@lru_cache(maxsize=1)
def _heads() -> dict[bytes, int]:
    return {bytes(page_bytes_of(value)[:8]): value for value in range(_VALUES + 1)}


def _value_of(head: bytes) -> int | None:
    return _heads().get(head)


def tier_on(files: FileEngine) -> SegmentTier:
    """A tier of a few small pages in segments of eight."""
    return SegmentTier(files, PLAN, FINGERPRINT, pages_max=PAGES, segment_cold_pages=2)
