"""The header of a segment file: encoding, parsing, and what can be saved of a damaged one; no I/O.

Its grammar is in `segment_format`.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import xxhash

from tierkv.core.errors import CorruptData
from tierkv.core.geometry import ALIGN_BYTES
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.seals import NO_SEAL
from tierkv.tiers.seals.base import SALT_BYTES, TAG_BYTES, Seal, SegmentSeal
from tierkv.tiers.segment_format import (
    CHECKSUM_BYTES,
    FORMAT_PLAIN,
    FORMAT_SEALED,
    SEGMENT_HEADER_BYTES,
    SegmentShape,
    expect,
    expect_checksum,
    expect_zeros,
    other_version,
    page_header_bytes,
)

_MAGIC: Final = b"TIERKVS\0"
_FIELDS: Final = struct.Struct("<8sIIQIIQ16s32s")
# Format 2: behind the fields, and before the checksum.
_SEAL: Final = struct.Struct(f"<16s{SALT_BYTES}s")
_END: Final = struct.Struct(f"<{SALT_BYTES}s{TAG_BYTES}s")
_END_AT: Final = SEGMENT_HEADER_BYTES - CHECKSUM_BYTES - _END.size


class SegmentHeader(NamedTuple):
    """What a segment header says; `tag` is verified by whoever has the key. Both empty without."""

    shape: SegmentShape
    number: int
    salt: bytes = b""
    tag: bytes = b""


def encode_segment_header(
    shape: SegmentShape, segment: int, out: Buffer, seal: SegmentSeal | None = None
) -> None:
    """Fill `out`, 4096 bytes, with the header of segment number `segment`; `seal` if protected."""
    out[:] = bytes(SEGMENT_HEADER_BYTES)
    _FIELDS.pack_into(
        out,
        0,
        _MAGIC,
        shape.version,
        shape.header_bytes,
        shape.warm_page_bytes,
        shape.warm_page_blocks,
        shape.pages_per_segment,
        segment,
        shape.store_id,
        shape.fingerprint,
    )
    if seal is not None:
        name = shape.protection.encode()
        _SEAL.pack_into(out, _FIELDS.size, name, seal.salt)
        _END.pack_into(out, _END_AT, seal.salt, b"")
        tag_at = _END_AT + SALT_BYTES
        out[tag_at:-CHECKSUM_BYTES] = seal.header_tag(out[:tag_at])
    out[-CHECKSUM_BYTES:] = xxhash.xxh3_128_digest(out[:-CHECKSUM_BYTES])


def parse_segment_header(data: Buffer) -> SegmentHeader:
    """What a segment header says. CorruptData; TierFailed for a later version's.

    Every version keeps the checksum where it is, so that none is taken for a damaged one.
    """
    expect("segment header bytes", SEGMENT_HEADER_BYTES, len(data))
    (magic, version, header_bytes, page_bytes, blocks, pages, segment, store_id, fingerprint) = (
        _FIELDS.unpack_from(data)
    )
    expect("segment magic", _MAGIC, magic)
    expect_checksum("segment header", data)
    if version > FORMAT_SEALED:
        raise other_version(version)
    if version == FORMAT_SEALED:
        protection, salt, tag = _parse_segment_seal(data)
    else:
        expect("segment format version", FORMAT_PLAIN, version)
        expect_zeros("segment header", data[_FIELDS.size : -CHECKSUM_BYTES])
        protection, salt, tag = NO_SEAL, b"", b""
    if not (blocks and pages and page_bytes) or page_bytes % ALIGN_BYTES:
        raise CorruptData(f"impossible segment: {blocks=} {pages=} {page_bytes=}")
    expect("page header bytes", page_header_bytes(blocks, protection), header_bytes)
    shape = SegmentShape(fingerprint, store_id, header_bytes, page_bytes, blocks, pages, protection)
    return SegmentHeader(shape, segment, salt, tag)


def _parse_segment_seal(data: Buffer) -> tuple[str, bytes, bytes]:
    """Protection, salt and tag of a segment header of format 2."""
    padded, salt = _SEAL.unpack_from(data, _FIELDS.size)
    again, tag = _END.unpack_from(data, _END_AT)
    expect("second salt of a segment header", salt, again)
    zeros_at = _FIELDS.size + _SEAL.size
    expect_zeros("segment header", data[zeros_at:_END_AT])
    protection = padded.rstrip(b"\0").decode("latin-1")
    if not (protection.isascii() and protection.isprintable()) or protection in ("", NO_SEAL):
        raise CorruptData(f"segment header: impossible protection {protection!r}")
    return protection, salt, tag


def expect_segment_tag(data: Buffer, header: SegmentHeader, seal: SegmentSeal) -> None:
    """CorruptData unless the key made this segment header."""
    said = data[: _END_AT + SALT_BYTES]
    seal.expect_header(f"header of segment {header.number}", said, header.tag)


def salvaged_seal(data: Buffer, shape: SegmentShape, number: int, seal: Seal) -> SegmentSeal:
    """The keys of our segment `number` whose header, `data`, is damaged or was forged.

    They follow from a salt that is there: from both if they agree, else from the one that the tag
    fits. Where none is left, new ones, and no page of it will verify; nor will any if the salt is
    wrong, so nothing is believed here.
    """
    if len(data) == SEGMENT_HEADER_BYTES:
        _, first = _SEAL.unpack_from(data, _FIELDS.size)
        second, tag = _END.unpack_from(data, _END_AT)
        if first == second and any(first):
            return seal.segment(shape.store_id, number, first)
        for salt in (first, second):
            keys = seal.segment(shape.store_id, number, salt)
            whole = memoryview(bytearray(SEGMENT_HEADER_BYTES))
            encode_segment_header(shape, number, whole, keys)
            if keys.has_key and whole[_END_AT + SALT_BYTES : -CHECKSUM_BYTES] == tag:
                return keys
    return seal.new_segment(shape.store_id, number)
