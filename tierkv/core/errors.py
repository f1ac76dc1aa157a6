"""The error tree.

TierKVError
├── ConfigError        a user's setting is wrong; carries file:line:col and the cure
├── GeometryMismatch   bytes or shapes do not fit the layout they are offered to
├── CorruptData        stored bytes fail their checksum or their identity; becomes a miss
├── TierFull           no place could be made within the deadline
├── TierFailed         a tier's device refuses to work (I/O error, out of memory, unsafe directory)
├── TransferFailed     a transfer ended without moving its bytes; carries the cause
├── StoreClosed        the store was used after `close()`
└── GaveUp             the planner cannot be trusted any more; ends inside of the store, as a miss

Expected outcomes (a miss, a full queue) are return values, never exceptions. What reaches a
caller of `Store` is only misuse and broken configuration: a fault of a tier is a miss.
"""

from __future__ import annotations


class TierKVError(Exception):
    """Base of every error that tierkv raises on purpose."""


class ConfigError(TierKVError):
    """A configuration that cannot be used; `str()` is one `file:line:col: path: message` a line."""


class GeometryMismatch(TierKVError):
    """Data or shapes that do not belong to the layout they were offered to."""


class CorruptData(TierKVError):
    """Stored bytes that are not what was put: wrong checksum, key, layout or generation."""


class TierFull(TierKVError):
    """No place could be made in a tier within the deadline."""


class TierFailed(TierKVError):
    """A tier's device or directory cannot be used; names it and the cure."""


class TransferFailed(TierKVError):
    """A transfer that ended without moving its bytes."""


class StoreClosed(TierKVError):
    """The store was used after `close()`."""


class GaveUp(TierKVError):
    """An event was left half done, so the planner's tables say nothing any more."""
