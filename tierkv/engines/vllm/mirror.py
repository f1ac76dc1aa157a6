"""The scheduler's copy of what the workers have stored, as they last said.

vLLM's scheduler and its workers may be processes, and a worker is a rank that has its own part of
each block. So stores are a worker's, one for each group of layers, and after each step a worker
tells what changed in them (`Report`). What can be loaded is what every rank has in every group. The
copy may be late: what it has and a store has lost meanwhile is noticed when it is loaded, and
computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from tierkv.core.keys import BlockKey
from tierkv.core.tier import TierId

#: Tiers in a report, where less is faster and 0 is none.
MEMORY: Final = 1
DISK: Final = 2
_CODES: Final = {None: 0, TierId.DEVICE: MEMORY, TierId.HOST: MEMORY, TierId.COLD: DISK}


@dataclass(slots=True)
class Report:
    """What one rank tells the scheduler after a step."""

    rank: int
    #: By group: keys and the tier of each, 0 where it is gone; None: nothing can be read any more.
    changes: list[dict[bytes, int] | None] = field(default_factory=list)
    #: The last step of which all that was to be saved is.
    saved_step: int = 0
    #: Steps so far in which a load was missing.
    failed_steps: int = 0
    #: Bytes a second from memory and from disk to the engine's cache; 0 where not known.
    memory_bytes_s: float = 0.0
    disk_bytes_s: float = 0.0
    #: Tokens a second that the engine computes; 0 where not known.
    prefill_tokens_s: float = 0.0


def changes_of(changed: Mapping[BlockKey, TierId | None] | None) -> dict[bytes, int] | None:
    """A store's changes as a report has them."""
    return None if changed is None else {key: _CODES[tier] for key, tier in changed.items()}


class Mirror:
    """See the module. Single owner: the scheduler's thread."""

    def __init__(self, ranks: int, groups: int = 1) -> None:
        self._tiers: list[list[dict[bytes, int]]] = [
            [{} for _ in range(groups)] for _ in range(ranks)
        ]
        self.reports: dict[int, Report] = {}

    def take(self, report: Report) -> None:
        """A rank has told."""
        self.reports[report.rank] = report
        for tiers, changes in zip(self._tiers[report.rank], report.changes, strict=True):
            if changes is None:
                tiers.clear()
                continue
            for key, tier in changes.items():
                if tier:
                    tiers[key] = tier
                else:
                    tiers.pop(key, None)

    @property
    def saved_step(self) -> int:
        """The last step of which every rank has saved all."""
        told = [report.saved_step for report in self.reports.values()]
        return min(told) if len(told) == len(self._tiers) else 0

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The tiers of the longest prefix that all have; of a block the slowest of theirs."""
        slowest: list[int] = []
        for number, tiers in enumerate(chain.from_iterable(self._tiers)):
            found = list(map(tiers.get, keys))
            end = found.index(None) if None in found else len(found)
            row: list[int] = found[:end]  # type: ignore[assignment]
            keys = keys[:end]
            slowest = list(map(max, slowest, row)) if number else row
        return slowest
