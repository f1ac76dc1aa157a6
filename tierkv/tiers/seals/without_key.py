"""Looking into a sealed directory without its key: checksums are verified, tags are not.

For `check` and `scrub`. A store is never opened with this; it would write nothing that counts.
"""

from __future__ import annotations

from tierkv.core.errors import CorruptData
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.seals.base import SALT_BYTES, TAG_BYTES, Seal, SegmentSeal


class WithoutKey(Seal):
    """A seal of any name that takes every tag on trust."""

    hides = False

    def __init__(self, name: str) -> None:
        super().__init__(bytes(SALT_BYTES))
        self.name = name

    def close(
        self, key: bytes, said: Buffer, payload: Buffer, stored: Buffer
    ) -> tuple[bytes, bytes]:
        """Never asked for."""
        raise AssertionError("nothing is written without the key")

    def open(self, key: bytes, said: Buffer, nonce: bytes, tag: bytes, payload: Buffer) -> bool:
        """Never asked for: `SegmentSeal.has_key` is False."""
        raise AssertionError("nothing is revealed without the key")

    def segment(self, store_id: bytes, number: int, salt: bytes) -> SegmentSeal:
        """A segment whose pages are taken if their checksums are right."""
        del store_id, number
        return _Trusted(self, salt, b"")

    def new_segment(self, store_id: bytes, number: int) -> SegmentSeal:
        """A segment whose salt is lost: no page of it can be read again, whatever it says."""
        del store_id, number
        return _Lost(self, bytes(SALT_BYTES), b"")

    def is_manifest(self, store_id: bytes, line: bytes, tag: bytes) -> bool:
        """Yes."""
        del store_id, line, tag
        return True


class _Trusted(SegmentSeal):
    has_key = False

    def header_tag(self, header: Buffer) -> bytes:
        del header
        return bytes(TAG_BYTES)

    def expect_header(self, what: str, header: Buffer, tag: bytes) -> None:
        """Nothing can be said."""


class _Lost(_Trusted):
    def expect_header(self, what: str, header: Buffer, tag: bytes) -> None:
        raise CorruptData(f"{what}: its key is lost with the header of its segment")
