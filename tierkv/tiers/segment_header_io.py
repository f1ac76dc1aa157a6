"""Segment headers to and from their files, held against the store's shape and its key. Any thread.

Damaged means that a checksum says so, or that this key did not make it; what that costs, and when
the key is known to be the right one, is for `segment_directory` to say.
"""

from __future__ import annotations

from collections.abc import Iterable

from tierkv.core.errors import CorruptData, GeometryMismatch, TierFailed
from tierkv.core.geometry import ALIGN_BYTES
from tierkv.tiers.files.base import Buffer, FileEngine, aligned_array
from tierkv.tiers.seals import expect_protection
from tierkv.tiers.seals.base import Seal, SegmentSeal
from tierkv.tiers.segment_format import SEGMENT_HEADER_BYTES, SegmentShape
from tierkv.tiers.segment_header import (
    SegmentHeader,
    encode_segment_header,
    expect_segment_tag,
    parse_segment_header,
    salvaged_seal,
)
from tierkv.tiers.segment_manifest import other_key


class HeaderIO:
    """Reads, writes and repairs headers; `seal` is None in a store without protection."""

    def __init__(self, files: FileEngine, seal: Seal | None) -> None:
        self._files = files
        self._seal = seal

    def read(self, handle: int) -> Buffer:
        """The bytes of a segment's header. CorruptData if there are too few."""
        if self._files.size(handle) < SEGMENT_HEADER_BYTES:
            raise CorruptData("the file is shorter than a segment header")
        header = aligned_array(SEGMENT_HEADER_BYTES, ALIGN_BYTES)
        self._files.read(handle, 0, [header.data])
        return header.data

    def expect(self, handle: int, shape: SegmentShape, number: int) -> SegmentSeal | None:
        """The keys of segment `number`. GeometryMismatch if it is not of our store.

        CorruptData if its header is damaged, TierFailed if it is of another version or protection.
        """
        data = self.read(handle)
        header = parse_segment_header(data)
        expect_protection(header.shape.protection, shape.protection)
        if (header.shape, header.number) != (shape, number):
            raise GeometryMismatch(
                f"expected segment {number} of store {shape.store_id.hex()}, "
                f"found segment {header.number} of store {header.shape.store_id.hex()}"
            )
        return self._keys_of(data, header)

    def write(
        self, handle: int, shape: SegmentShape, number: int, keys: SegmentSeal | None
    ) -> None:
        """Write a header, durably."""
        header = aligned_array(SEGMENT_HEADER_BYTES, ALIGN_BYTES)
        encode_segment_header(shape, number, header.data, keys)
        self._files.write(handle, 0, [header.data])
        self._files.sync(handle)

    def write_new(self, handle: int, shape: SegmentShape, number: int) -> SegmentSeal | None:
        """Write the header of a segment that is being made; its keys."""
        keys = None if self._seal is None else self._seal.new_segment(shape.store_id, number)
        self.write(handle, shape, number, keys)
        return keys

    def write_again(self, handle: int, shape: SegmentShape, number: int) -> SegmentSeal | None:
        """Make a damaged header whole; the segment's keys, as far as they can be had."""
        keys = None
        if self._seal is not None:
            is_whole = self._files.size(handle) >= SEGMENT_HEADER_BYTES
            data = self.read(handle) if is_whole else memoryview(b"")
            keys = salvaged_seal(data, shape, number, self._seal)
        self.write(handle, shape, number, keys)
        return keys

    def first_shape(self, names: Iterable[str], expected: SegmentShape) -> SegmentShape:
        """What the first header says that can be believed; `expected` where none is whole.

        TierFailed if one is of another version or protection, or if none is of this key.
        """
        unproven: list[str] = []
        for name in names:
            handle = self._files.open(name)
            try:
                data = self.read(handle)
                header = parse_segment_header(data)
                expect_protection(header.shape.protection, expected.protection)
                unproven.append(name)
                self._keys_of(data, header)
            except TierFailed as error:
                raise TierFailed(f"{name} is {error}") from None
            except (CorruptData, OSError):
                continue
            else:
                return header.shape
            finally:
                self._files.close(handle)
        if unproven:  # whole, and not of this key: for all we know the key is wrong
            raise other_key(unproven[0])
        return expected

    def _keys_of(self, data: Buffer, header: SegmentHeader) -> SegmentSeal | None:
        """CorruptData unless the key made this header."""
        if self._seal is None:
            return None
        keys = self._seal.segment(header.shape.store_id, header.number, header.salt)
        expect_segment_tag(data, header, keys)
        return keys
