"""Blocks on their way between pages of an arena and the device, as vectors: see `staging`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import GeometryMismatch

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(slots=True)
class PageBatch:
    """Blocks sorted by place; page n has the blocks ``first[n]`` up to ``first[n + 1]``."""

    within: Numbers  # offset of each block in its page
    frames: Numbers  # where its frame begins on the device
    pages: Numbers  # each once
    first: Numbers

    @classmethod
    def of(cls, places: Numbers, frames: Numbers, page_blocks: int) -> Self:
        """Places of the arena, ``page * page_blocks + offset`` and none twice, and their frames."""
        if not (places[1:] > places[:-1]).all():
            order = np.argsort(places, kind="stable")
            places, frames = places[order], frames[order]
            if (places[1:] == places[:-1]).any():
                raise GeometryMismatch("a place is named twice in one transfer")
        page = places // page_blocks
        starts = np.flatnonzero(page[1:] != page[:-1]) + 1
        first = np.concatenate(([0], starts, [len(page)]))
        return cls(places - page * page_blocks, frames, page[first[:-1]], first)

    @property
    def count(self) -> Numbers:
        """Blocks of each page."""
        return self.first[1:] - self.first[:-1]

    def only(self, chosen: Flags) -> PageBatch:
        """The blocks of some of the pages."""
        if chosen.all():
            return self
        count = self.count
        blocks = np.repeat(chosen, count)
        first = np.concatenate(([0], np.cumsum(count[chosen])))
        return PageBatch(self.within[blocks], self.frames[blocks], self.pages[chosen], first)

    def runs(self) -> tuple[Numbers, Numbers, Numbers]:
        """Neighbours joined: the position of their page, their first offset, how many they are."""
        starts = np.diff(self.within, prepend=-2) != 1
        starts[self.first[:-1]] = True
        begin = np.flatnonzero(starts)
        page = np.searchsorted(self.first, begin, side="right") - 1
        return page, self.within[begin], np.diff(np.append(begin, len(self.within)))
