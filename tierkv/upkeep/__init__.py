"""Looking after a cold directory that no store has open: check, scrub and drill.

None needs the model: a directory says its own page sizes. `reading` opens one without changing it,
`report` counts what is there and names what is damaged, `scrub` reads it all at a bounded rate,
and `drill` breaks a copy to show what a store would serve from it.
"""

from __future__ import annotations

from enum import StrEnum


class DrillKind(StrEnum):
    """What a drill does to its copy."""

    CORRUPT = "corrupt"
    ENOSPC = "enospc"
    KILL_DISK = "kill-disk"
