r"""The bytes of a segment file, formats 1 and 2: encoding, parsing, offsets; no I/O.

Grammar, all integers little-endian, every part a multiple of 4096 bytes
(`docs/segment_format.md` has a worked example and the downsides)::

    segment        = segment-header slot*                     one slot per page of the segment
    slot           = page-header payload                      header_bytes + warm_page_bytes
    segment-header = magic[8] "TIERKVS\0"  version:u32  header_bytes:u32  warm_page_bytes:u64
                     warm_page_blocks:u32  pages_per_segment:u32  segment_number:u64
                     store_id[16]  fingerprint[32]  zeros  checksum[16]               4096 bytes
    page-header    = magic[8] "TIERKVP\0"  version:u32  header_bytes:u32  page_number:u64
                     generation:u64  store_id[16]  fingerprint[32]  payload_bytes:u64
                     block_count:u32  namespace_bytes:u8  namespace[63]  entry*
                     zeros  seal  payload_checksum[16]  checksum[16]          header_bytes bytes
    entry          = position:u32  key[32]  parent[32]        ascending positions, no two equal
    seal           = nonce[12]  payload_tag[16]  header_tag[16]              nothing in format 1

In format 2 a segment header goes on behind the fingerprint, and ends, with::

    protection[16]  salt[32]  zeros  salt[32]  header_tag[16]  checksum[16]

``checksum`` is xxh3-128 of every byte before it in its header; ``payload_checksum`` is xxh3-128 of
the payload, seeded with xxh3-64 of every byte before it in its header. The seed binds a payload to
its header's identity: the right bytes under another key, layout, generation or page number do not
verify. Both digests are in xxHash's canonical (big-endian) order. A slot whose header is all zeros
was never written, or was erased.

Format 2 is for stores with a protection (`seals`): format 1 with tags that need a key beside its
checksums. ``payload_checksum`` is of what lies on the disk, so faults are found without the key;
the tags find forgers. ``payload_tag`` is over the header up to the seal and the payload,
``header_tag`` over all of its header before it. The salt is there twice, so that one fault in a
segment header costs nothing.

Encoding is canonical: one header has one form, and parsing refuses every other one. A reader
trusts no length, count or offset from the file: they must equal what the open store expects or lie
within bounds. In format 1 who can write to the directory can make bytes that verify.

A checksum per record, so that damage costs one record, is LevelDB's (`doc/log_format.md`); one for
the header apart from the body's, which the header carries, is TigerBeetle's
(`vsr/message_header.zig`).
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from tierkv.core.errors import CorruptData, TierFailed
from tierkv.core.geometry import ALIGN_BYTES, PagePlan, align_up
from tierkv.core.keys import KEY_BYTES
from tierkv.core.tier import BlockLabel, PageLabel
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.seals import NO_SEAL
from tierkv.tiers.seals.base import NONCE_BYTES, TAG_BYTES, SegmentSeal

FORMAT_PLAIN: Final = 1
FORMAT_SEALED: Final = 2
SEGMENT_HEADER_BYTES: Final = 4096
STORE_ID_BYTES: Final = 16
NAMESPACE_BYTES_MAX: Final = 63

_PAGE_MAGIC: Final = b"TIERKVP\0"
CHECKSUM_BYTES: Final = 16
# The identity comes first, so that a reader who knows it compares it in one step.
_IDENTITY: Final = struct.Struct("<8sIIQQ16s32s")
_CONTENT: Final = struct.Struct("<QIB63s")
_ENTRIES_AT: Final = _IDENTITY.size + _CONTENT.size
_ENTRY: Final = struct.Struct(f"<I{KEY_BYTES}s{KEY_BYTES}s")
# Format 2: what lies before the checksums of format 1.
_PAGE_SEAL: Final = struct.Struct(f"<{NONCE_BYTES}s{TAG_BYTES}s{TAG_BYTES}s")


@dataclass(frozen=True, slots=True)
class SegmentShape:
    """The sizes and the identity that all segments of one store share."""

    fingerprint: bytes
    store_id: bytes
    header_bytes: int
    warm_page_bytes: int
    warm_page_blocks: int
    pages_per_segment: int
    protection: str = NO_SEAL

    @classmethod
    def of(
        cls,
        plan: PagePlan,
        *,
        fingerprint: bytes,
        store_id: bytes,
        pages_per_segment: int,
        protection: str = NO_SEAL,
    ) -> SegmentShape:
        """The shape for a page plan."""
        return cls(
            fingerprint=fingerprint,
            store_id=store_id,
            header_bytes=page_header_bytes(plan.warm_page_blocks, protection),
            warm_page_bytes=plan.warm_page_bytes,
            warm_page_blocks=plan.warm_page_blocks,
            pages_per_segment=pages_per_segment,
            protection=protection,
        )

    @property
    def version(self) -> int:
        """The format's number."""
        return format_of(self.protection)

    @property
    def seal_at(self) -> int:
        """Where a page header's seal begins; where the checksums do, if it has none."""
        return self.header_bytes - _end_bytes(self.protection)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one page with its header."""
        return self.header_bytes + self.warm_page_bytes

    def segment_of(self, page: int) -> int:
        """The number of the segment that holds `page`."""
        return page // self.pages_per_segment

    def offset_of(self, page: int) -> int:
        """Where the slot of `page` begins in its segment."""
        return SEGMENT_HEADER_BYTES + page % self.pages_per_segment * self.slot_bytes

    def segment_bytes(self, pages: int) -> int:
        """The length of a segment file with `pages` slots."""
        return SEGMENT_HEADER_BYTES + pages * self.slot_bytes


def format_of(protection: str) -> int:
    """The format that a store with this protection writes."""
    return FORMAT_PLAIN if protection == NO_SEAL else FORMAT_SEALED


def page_header_bytes(warm_page_blocks: int, protection: str = NO_SEAL) -> int:
    """Bytes in front of every page, for pages of at most `warm_page_blocks` blocks."""
    used = _ENTRIES_AT + warm_page_blocks * _ENTRY.size + _end_bytes(protection)
    return align_up(used, ALIGN_BYTES)


def other_version(version: int) -> TierFailed:
    """Something whole is of another version of the format: in words that follow "it is"."""
    return TierFailed(
        f"of format {version}, this version reads {FORMAT_PLAIN} and {FORMAT_SEALED}; cure: "
        "another directory, the version that wrote this one, or remove its contents"
    )


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What a page header says: which write of which page it is, and what the page holds."""

    page: int
    generation: int
    label: PageLabel


def encode_page_header(
    shape: SegmentShape, header: PageHeader, payload: Buffer, out: Buffer
) -> None:
    """Fill `out`, `shape.header_bytes` long, with the header of a page that holds `payload`.

    For format 1. Raises ValueError for a label that the format cannot hold; `out` is then
    undefined.
    """
    _encode_said(shape, header, payload, out)
    _encode_checksums(out, payload)


def encode_sealed_page(
    shape: SegmentShape,
    header: PageHeader,
    payload: Buffer,
    out: Buffer,
    *,
    seal: SegmentSeal,
    stored: Buffer,
) -> None:
    """As `encode_page_header`, for format 2; what is to be written behind it goes to `stored`.

    `stored` is as long as `payload`, and the payload itself if the seal does not hide.
    """
    _encode_said(shape, header, payload, out)
    nonce, tag = seal.close(out[: shape.seal_at], payload, stored)
    _PAGE_SEAL.pack_into(out, shape.seal_at, nonce, tag, b"")
    tag_at = shape.seal_at + _PAGE_SEAL.size - TAG_BYTES
    out[tag_at : tag_at + TAG_BYTES] = seal.header_tag(out[:tag_at])
    _encode_checksums(out, stored)


def _encode_said(shape: SegmentShape, header: PageHeader, payload: Buffer, out: Buffer) -> None:
    """All of a page header but its end."""
    namespace = header.label.namespace.encode()
    blocks = header.label.blocks
    if len(namespace) > NAMESPACE_BYTES_MAX:
        raise ValueError(f"namespace is {len(namespace)} bytes, at most {NAMESPACE_BYTES_MAX} fit")
    if len(payload) != shape.warm_page_bytes:
        raise ValueError(f"payload is {len(payload)} bytes, a page is {shape.warm_page_bytes}")
    reason = _positions_fault([block.position for block in blocks], shape.warm_page_blocks)
    if reason is not None:
        raise ValueError(f"page {header.page}: {reason}")
    out[:] = bytes(shape.header_bytes)
    out[: _IDENTITY.size] = _identity(shape, header.page, header.generation)
    _CONTENT.pack_into(out, _IDENTITY.size, len(payload), len(blocks), len(namespace), namespace)
    for index, block in enumerate(blocks):
        if len(block.key) != KEY_BYTES or len(block.parent) != KEY_BYTES:
            raise ValueError(f"page {header.page}: a block key is {KEY_BYTES} bytes")
        _ENTRY.pack_into(
            out, _ENTRIES_AT + index * _ENTRY.size, block.position, block.key, block.parent
        )


def _encode_checksums(out: Buffer, payload: Buffer) -> None:
    out[-2 * CHECKSUM_BYTES : -CHECKSUM_BYTES] = _payload_checksum(out, payload)
    out[-CHECKSUM_BYTES:] = xxhash.xxh3_128_digest(out[:-CHECKSUM_BYTES])


def is_blank(header: Buffer) -> bool:
    """Whether a page header is all zeros: its slot was never written, or was erased."""
    return bytes(header) == bytes(len(header))


def parse_page_header(data: Buffer, shape: SegmentShape, page: int) -> PageHeader:
    """The header of the slot of `page` in a store of `shape`; its tag is not verified.

    Raises CorruptData; TierFailed for a whole header of a later version.
    """
    expect("page header bytes", shape.header_bytes, len(data))
    magic, version, _, _, generation, _, _ = _IDENTITY.unpack_from(data)
    if version > FORMAT_SEALED and magic == _PAGE_MAGIC and _is_checked(data):
        raise TierFailed(f"page {page} is {other_version(version)}")
    _expect_identity(data, shape, page, generation)
    expect_checksum(f"header of page {page}", data)
    payload_bytes, count, namespace_bytes, padded = _CONTENT.unpack_from(data, _IDENTITY.size)
    expect(f"payload bytes of page {page}", shape.warm_page_bytes, payload_bytes)
    if not 1 <= count <= shape.warm_page_blocks:
        raise CorruptData(f"page {page}: {count} blocks, expected 1..{shape.warm_page_blocks}")
    if namespace_bytes > NAMESPACE_BYTES_MAX:
        raise CorruptData(f"page {page}: namespace of {namespace_bytes} bytes")
    expect_zeros(f"namespace of page {page}", memoryview(padded)[namespace_bytes:])
    try:
        namespace = padded[:namespace_bytes].decode()
    except UnicodeDecodeError as error:
        raise CorruptData(f"page {page}: namespace is not UTF-8") from error
    end = _ENTRIES_AT + count * _ENTRY.size
    blocks = tuple(BlockLabel(*entry) for entry in _ENTRY.iter_unpack(data[_ENTRIES_AT:end]))
    reason = _positions_fault([block.position for block in blocks], shape.warm_page_blocks)
    if reason is not None:
        raise CorruptData(f"page {page}: {reason}")
    expect_zeros(f"header of page {page}", data[end : shape.seal_at])
    return PageHeader(page, generation, PageLabel(namespace, blocks))


def verify_page(
    data: Buffer, payload: Buffer, shape: SegmentShape, *, page: int, generation: int
) -> None:
    """Check that header `data` and `payload` are exactly that write of `page`.

    Reads the payload once and builds nothing. Raises CorruptData.
    """
    expect("page header bytes", shape.header_bytes, len(data))
    _expect_identity(data, shape, page, generation)
    expect_checksum(f"header of page {page}", data)
    expected = bytes(data[-2 * CHECKSUM_BYTES : -CHECKSUM_BYTES])
    found = _payload_checksum(data, payload)
    if found != expected:
        raise CorruptData(
            f"payload of page {page}, generation {generation}: "
            f"expected checksum {expected.hex()}, found {found.hex()}"
        )


def expect_page_tag(data: Buffer, shape: SegmentShape, page: int, seal: SegmentSeal) -> None:
    """CorruptData unless the key made this header of `page`."""
    tag_at = shape.seal_at + _PAGE_SEAL.size - TAG_BYTES
    tag = bytes(data[tag_at : tag_at + TAG_BYTES])
    seal.expect_header(f"header of page {page}", data[:tag_at], tag)


def open_sealed_page(
    data: Buffer,
    payload: Buffer,
    shape: SegmentShape,
    *,
    page: int,
    generation: int,
    seal: SegmentSeal,
) -> None:
    """As `verify_page`, for format 2; reveals `payload` in place. Raises CorruptData.

    A seal without its key verifies the checksums, and reveals nothing.
    """
    if not seal.has_key:
        verify_page(data, payload, shape, page=page, generation=generation)
        return expect_page_tag(data, shape, page, seal)
    expect("page header bytes", shape.header_bytes, len(data))
    _expect_identity(data, shape, page, generation)
    expect_checksum(f"header of page {page}", data)
    expect_page_tag(data, shape, page, seal)
    nonce, tag, _ = _PAGE_SEAL.unpack_from(data, shape.seal_at)
    if not seal.open(data[: shape.seal_at], nonce, tag, payload):
        raise CorruptData(
            f"payload of page {page}, generation {generation}: it was not made with this key, or "
            "was changed"
        )
    return None


def _payload_checksum(header: Buffer, payload: Buffer) -> bytes:
    seed = xxhash.xxh3_64_intdigest(header[: -2 * CHECKSUM_BYTES])
    return xxhash.xxh3_128_digest(payload, seed=seed)


def _identity(shape: SegmentShape, page: int, generation: int) -> bytes:
    return _IDENTITY.pack(
        _PAGE_MAGIC,
        shape.version,
        shape.header_bytes,
        page,
        generation,
        shape.store_id,
        shape.fingerprint,
    )


def _end_bytes(protection: str) -> int:
    """Bytes of a page header's end: seal and checksums."""
    seal_bytes = 0 if protection == NO_SEAL else _PAGE_SEAL.size
    return seal_bytes + 2 * CHECKSUM_BYTES


def _expect_identity(data: Buffer, shape: SegmentShape, page: int, generation: int) -> None:
    """CorruptData, naming the first field that differs, unless the header begins as expected."""
    expected = _identity(shape, page, generation)
    if bytes(data[: _IDENTITY.size]) == expected:
        return
    names = ("magic", "version", "header bytes", "number", "generation", "store id", "fingerprint")
    fields = zip(names, _IDENTITY.unpack(expected), _IDENTITY.unpack_from(data), strict=True)
    for name, wanted, found in fields:
        expect(f"{name} of page {page}", wanted, found)


def expect_checksum(what: str, data: Buffer) -> None:
    """CorruptData unless a header ends with the checksum of what is before it."""
    expect(
        f"checksum of {what}",
        xxhash.xxh3_128_digest(data[:-CHECKSUM_BYTES]),
        bytes(data[-CHECKSUM_BYTES:]),
    )


def _is_checked(data: Buffer) -> bool:
    return bytes(data[-CHECKSUM_BYTES:]) == xxhash.xxh3_128_digest(data[:-CHECKSUM_BYTES])


def expect_zeros(what: str, padding: Buffer) -> None:
    """CorruptData unless all is zero."""
    if bytes(padding) != bytes(len(padding)):
        raise CorruptData(f"{what}: padding is not zero")


def expect(what: str, expected: bytes | int, found: bytes | int) -> None:
    """CorruptData, with both values, unless they are equal."""
    if found != expected:
        shown = [v.hex() if isinstance(v, bytes) else str(v) for v in (expected, found)]
        raise CorruptData(f"{what}: expected {shown[0]}, found {shown[1]}")


def _positions_fault(positions: list[int], blocks_max: int) -> str | None:
    """Why these block positions are not canonical, or None."""
    if not positions:
        return "a stored page holds at least one block"
    if any(later <= sooner for sooner, later in itertools.pairwise(positions)):
        return f"block positions {positions} do not ascend"
    if positions[0] < 0 or positions[-1] >= blocks_max:
        return f"block positions {positions} are outside 0..{blocks_max - 1}"
    return None
