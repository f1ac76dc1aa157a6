"""Segments that cannot be made: a directory stands under their name.

A segment is made under another name and renamed; that replaces a file, a link or a pipe, but no
directory, and what is in one is not ours to remove. So its pages are given to nobody, and the rest
of the tier is used as ever: a write that always fails would open the breaker for all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tierkv.tiers.files.base import FileEngine

logger = logging.getLogger(__name__)


def blocked_segments(files: FileEngine, names: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Of segments by number and name those that a directory blocks, with a finding for each.

    Asks by opening, as an engine lists regular files alone; any other error is met when it matters.
    """
    blocked: dict[int, str] = {}
    for number, name in names:
        try:
            files.close(files.open(name))
        except IsADirectoryError:
            words = f"{name} is a directory, so this segment is not used"
            blocked[number] = f"{words}; cure: remove it and start again"
            logger.warning("cold segment blocked finding=%s", blocked[number])
        except OSError:
            continue
    return blocked
