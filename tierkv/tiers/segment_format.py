r"""The bytes of a segment file, format 1: encoding, parsing, offsets; no I/O.

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
                     zeros  payload_checksum[16]  checksum[16]                header_bytes bytes
    entry          = position:u32  key[32]  parent[32]        ascending positions, no two equal

``checksum`` is xxh3-128 of every byte before it in its header; ``payload_checksum`` is xxh3-128 of
the payload, seeded with xxh3-64 of every byte before it in its header. The seed binds a payload to
its header's identity: the right bytes under another key, layout, generation or page number do not
verify. Both digests are in xxHash's canonical (big-endian) order. A slot whose header is all zeros
was never written, or was erased.

Encoding is canonical: one header has one form, and parsing refuses every other one. A reader
trusts no length, count or offset from the file: they must equal what the open store expects or lie
within bounds. The checksums find faults, not forgers: who can write to the directory can make
bytes that verify.

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

FORMAT_VERSION: Final = 1
SEGMENT_HEADER_BYTES: Final = 4096
STORE_ID_BYTES: Final = 16
NAMESPACE_BYTES_MAX: Final = 63

_SEGMENT_MAGIC: Final = b"TIERKVS\0"
_PAGE_MAGIC: Final = b"TIERKVP\0"
_CHECKSUM_BYTES: Final = 16
_SEGMENT_FIELDS: Final = struct.Struct("<8sIIQIIQ16s32s")
# The identity comes first, so that a reader who knows it compares it in one step.
_IDENTITY: Final = struct.Struct("<8sIIQQ16s32s")
_CONTENT: Final = struct.Struct("<QIB63s")
_ENTRIES_AT: Final = _IDENTITY.size + _CONTENT.size
_ENTRY: Final = struct.Struct(f"<I{KEY_BYTES}s{KEY_BYTES}s")


@dataclass(frozen=True, slots=True)
class SegmentShape:
    """The sizes and the identity that all segments of one store share."""

    fingerprint: bytes
    store_id: bytes
    header_bytes: int
    warm_page_bytes: int
    warm_page_blocks: int
    pages_per_segment: int

    @classmethod
    def of(
        cls, plan: PagePlan, *, fingerprint: bytes, store_id: bytes, pages_per_segment: int
    ) -> SegmentShape:
        """The shape for a page plan."""
        return cls(
            fingerprint=fingerprint,
            store_id=store_id,
            header_bytes=page_header_bytes(plan.warm_page_blocks),
            warm_page_bytes=plan.warm_page_bytes,
            warm_page_blocks=plan.warm_page_blocks,
            pages_per_segment=pages_per_segment,
        )

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


def page_header_bytes(warm_page_blocks: int) -> int:
    """Bytes in front of every page, for pages of at most `warm_page_blocks` blocks."""
    used = _ENTRIES_AT + warm_page_blocks * _ENTRY.size + 2 * _CHECKSUM_BYTES
    return align_up(used, ALIGN_BYTES)


def encode_segment_header(shape: SegmentShape, segment: int, out: Buffer) -> None:
    """Fill `out`, 4096 bytes, with the header of segment number `segment`."""
    out[:] = bytes(SEGMENT_HEADER_BYTES)
    _SEGMENT_FIELDS.pack_into(
        out,
        0,
        _SEGMENT_MAGIC,
        FORMAT_VERSION,
        shape.header_bytes,
        shape.warm_page_bytes,
        shape.warm_page_blocks,
        shape.pages_per_segment,
        segment,
        shape.store_id,
        shape.fingerprint,
    )
    out[-_CHECKSUM_BYTES:] = xxhash.xxh3_128_digest(out[:-_CHECKSUM_BYTES])


def parse_segment_header(data: Buffer) -> tuple[SegmentShape, int]:
    """The shape and number in a segment header. CorruptData; TierFailed for another version's.

    Every version keeps the checksum where it is, so that none is taken for a damaged one.
    """
    _expect("segment header bytes", SEGMENT_HEADER_BYTES, len(data))
    (magic, version, header_bytes, page_bytes, blocks, pages, segment, store_id, fingerprint) = (
        _SEGMENT_FIELDS.unpack_from(data)
    )
    _expect("segment magic", _SEGMENT_MAGIC, magic)
    _expect_checksum("segment header", data)
    if version > FORMAT_VERSION:
        raise other_version(version)
    _expect("segment format version", FORMAT_VERSION, version)
    _expect_zeros("segment header", data[_SEGMENT_FIELDS.size : -_CHECKSUM_BYTES])
    if not (blocks and pages and page_bytes) or page_bytes % ALIGN_BYTES:
        raise CorruptData(f"impossible segment: {blocks=} {pages=} {page_bytes=}")
    _expect("page header bytes", page_header_bytes(blocks), header_bytes)
    shape = SegmentShape(fingerprint, store_id, header_bytes, page_bytes, blocks, pages)
    return shape, segment


def other_version(version: int) -> TierFailed:
    """Something whole is of another version of the format: in words that follow "it is"."""
    return TierFailed(
        f"of format {version}, this version reads {FORMAT_VERSION}; cure: another directory, "
        "the version that wrote this one, or remove its contents"
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

    Raises ValueError for a label that the format cannot hold; `out` is then undefined.
    """
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
    out[-2 * _CHECKSUM_BYTES : -_CHECKSUM_BYTES] = _payload_checksum(out, payload)
    out[-_CHECKSUM_BYTES:] = xxhash.xxh3_128_digest(out[:-_CHECKSUM_BYTES])


def is_blank(header: Buffer) -> bool:
    """Whether a page header is all zeros: its slot was never written, or was erased."""
    return bytes(header) == bytes(len(header))


def parse_page_header(data: Buffer, shape: SegmentShape, page: int) -> PageHeader:
    """The header of the slot of `page` in a store of `shape`. Raises CorruptData."""
    _expect("page header bytes", shape.header_bytes, len(data))
    generation = _generation_of(data)
    _expect_identity(data, shape, page, generation)
    _expect_checksum(f"header of page {page}", data)
    payload_bytes, count, namespace_bytes, padded = _CONTENT.unpack_from(data, _IDENTITY.size)
    _expect(f"payload bytes of page {page}", shape.warm_page_bytes, payload_bytes)
    if not 1 <= count <= shape.warm_page_blocks:
        raise CorruptData(f"page {page}: {count} blocks, expected 1..{shape.warm_page_blocks}")
    if namespace_bytes > NAMESPACE_BYTES_MAX:
        raise CorruptData(f"page {page}: namespace of {namespace_bytes} bytes")
    _expect_zeros(f"namespace of page {page}", memoryview(padded)[namespace_bytes:])
    try:
        namespace = padded[:namespace_bytes].decode()
    except UnicodeDecodeError as error:
        raise CorruptData(f"page {page}: namespace is not UTF-8") from error
    end = _ENTRIES_AT + count * _ENTRY.size
    blocks = tuple(BlockLabel(*entry) for entry in _ENTRY.iter_unpack(data[_ENTRIES_AT:end]))
    reason = _positions_fault([block.position for block in blocks], shape.warm_page_blocks)
    if reason is not None:
        raise CorruptData(f"page {page}: {reason}")
    _expect_zeros(f"header of page {page}", data[end : -2 * _CHECKSUM_BYTES])
    return PageHeader(page, generation, PageLabel(namespace, blocks))


def verify_page(
    data: Buffer, payload: Buffer, shape: SegmentShape, *, page: int, generation: int
) -> None:
    """Check that header `data` and `payload` are exactly that write of `page`.

    Reads the payload once and builds nothing. Raises CorruptData.
    """
    _expect("page header bytes", shape.header_bytes, len(data))
    _expect_identity(data, shape, page, generation)
    _expect_checksum(f"header of page {page}", data)
    expected = bytes(data[-2 * _CHECKSUM_BYTES : -_CHECKSUM_BYTES])
    found = _payload_checksum(data, payload)
    if found != expected:
        raise CorruptData(
            f"payload of page {page}, generation {generation}: "
            f"expected checksum {expected.hex()}, found {found.hex()}"
        )


def _payload_checksum(header: Buffer, payload: Buffer) -> bytes:
    seed = xxhash.xxh3_64_intdigest(header[: -2 * _CHECKSUM_BYTES])
    return xxhash.xxh3_128_digest(payload, seed=seed)


def _identity(shape: SegmentShape, page: int, generation: int) -> bytes:
    return _IDENTITY.pack(
        _PAGE_MAGIC,
        FORMAT_VERSION,
        shape.header_bytes,
        page,
        generation,
        shape.store_id,
        shape.fingerprint,
    )


def _generation_of(data: Buffer) -> int:
    generation: int = _IDENTITY.unpack_from(data)[4]
    return generation


def _expect_identity(data: Buffer, shape: SegmentShape, page: int, generation: int) -> None:
    """CorruptData, naming the first field that differs, unless the header begins as expected."""
    expected = _identity(shape, page, generation)
    if bytes(data[: _IDENTITY.size]) == expected:
        return
    names = ("magic", "version", "header bytes", "number", "generation", "store id", "fingerprint")
    fields = zip(names, _IDENTITY.unpack(expected), _IDENTITY.unpack_from(data), strict=True)
    for name, wanted, found in fields:
        _expect(f"{name} of page {page}", wanted, found)


def _expect_checksum(what: str, data: Buffer) -> None:
    _expect(
        f"checksum of {what}",
        xxhash.xxh3_128_digest(data[:-_CHECKSUM_BYTES]),
        bytes(data[-_CHECKSUM_BYTES:]),
    )


def _expect_zeros(what: str, padding: Buffer) -> None:
    if bytes(padding) != bytes(len(padding)):
        raise CorruptData(f"{what}: padding is not zero")


def _expect(what: str, expected: bytes | int, found: bytes | int) -> None:
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
