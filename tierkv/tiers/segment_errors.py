"""What an engine's OSError means for the cold tier."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tierkv.core.errors import TierFailed, TierFull


@contextmanager
def tier_errors(doing: str, count: Callable[[], None]) -> Iterator[None]:
    """Count an engine's OSError, and raise it as the tier's."""
    try:
        yield
    except OSError as error:
        count()
        raise tier_error(doing, error) from error


def tier_error(doing: str, error: OSError) -> TierFailed | TierFull:
    """What an engine's OSError means for the tier."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TierFull(f"{doing}: {error}; cure: free space, or lower cold.capacity")
    return TierFailed(f"{doing}: {error}")


def open_error(error: OSError) -> TierFailed:
    """What an engine's OSError means for a tier that is being opened."""
    return TierFailed(
        f"cannot open the cold directory: {error}; cure: remove what is named, or if the device "
        "fails, choose another directory"
    )
