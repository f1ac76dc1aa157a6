"""A bound on a rate, kept by waiting; the clock and the sleep come in."""

from __future__ import annotations

import time
from collections.abc import Callable

from tierkv.core.errors import ConfigError
from tierkv.core.units import parse_size


class Pace:
    """At most `bytes_per_s`, from the first byte on. Single owner.

    A stretch in which less was asked for is not made up for later: after a pause there is no burst.
    """

    def __init__(
        self,
        bytes_per_s: int,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._now = now
        self._sleep = sleep
        self._free_at = now()

    def take(self, size_bytes: int) -> None:
        """Wait until all that was taken before has had its time; then `size_bytes` may be read."""
        wait = self._free_at - self._now()
        if wait > 0:
            self._sleep(wait)
        self._free_at = max(self._free_at, self._now()) + size_bytes / self._bytes_per_s


def parse_rate(text: str) -> int:
    """Bytes per second of ``100MB/s`` or ``64MiB``. Raises ConfigError, which says the cure."""
    try:
        rate = parse_size(text.strip().removesuffix("/s"))
    except ValueError as error:
        raise ConfigError(f"--rate: {error}") from None
    if not rate:
        raise ConfigError("--rate: must be more than 0, for example 100MB/s")
    return rate
