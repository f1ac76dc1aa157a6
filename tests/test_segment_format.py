"""The bytes on disk: golden files, round trips, and that nothing damaged or foreign parses."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.core.errors import CorruptData, TierFailed
from tierkv.core.tier import BlockLabel, PageLabel
from tierkv.testing.file_engines import page_bytes
from tierkv.testing.tiers import FINGERPRINT, PLAN, page_label
from tierkv.tiers.segment_format import (
    PageHeader,
    SegmentShape,
    encode_page_header,
    is_blank,
    page_header_bytes,
    parse_page_header,
    verify_page,
)
from tierkv.tiers.segment_header import (
    SegmentHeader,
    encode_segment_header,
    parse_segment_header,
)

FORMAT = Path(__file__).parent / "format"
STORE_ID = bytes(range(100, 116))
SHAPE = SegmentShape.of(PLAN, fingerprint=FINGERPRINT, store_id=STORE_ID, pages_per_segment=8)
PAYLOAD = np.arange(PLAN.warm_page_bytes, dtype=np.uint32).astype(np.uint8)
HEADER = PageHeader(
    page=11,
    generation=(3 << 40) + 7,
    label=PageLabel(
        "tenant-ä",
        (
            BlockLabel(0, bytes([1]) * 32, bytes([2]) * 32),
            BlockLabel(5, bytes([3]) * 32, bytes([1]) * 32),
        ),
    ),
)


def encoded(header: PageHeader, payload: np.ndarray, shape: SegmentShape = SHAPE) -> memoryview:
    out = memoryview(bytearray(b"\xff" * shape.header_bytes))
    encode_page_header(shape, header, payload.data, out)
    return out


def segment_header() -> memoryview:
    out = memoryview(bytearray(b"\xff" * 4096))
    encode_segment_header(SHAPE, 5, out)
    return out


def test_format_1_segment_header_is_these_bytes_for_ever() -> None:
    golden = (FORMAT / "segment_header_1.bin").read_bytes()
    assert segment_header() == golden
    assert parse_segment_header(memoryview(golden)) == SegmentHeader(SHAPE, 5)


def test_format_1_page_header_is_these_bytes_for_ever() -> None:
    golden = (FORMAT / "page_header_1.bin").read_bytes()
    assert encoded(HEADER, PAYLOAD) == golden
    assert parse_page_header(memoryview(golden), SHAPE, 11) == HEADER
    verify_page(memoryview(golden), PAYLOAD.data, SHAPE, page=11, generation=HEADER.generation)


def test_the_grammar_written_down_gives_the_golden_page_header() -> None:
    name = "tenant-ä".encode()
    head = b"TIERKVP\0" + struct.pack("<IIQQ", 1, 4096, 11, (3 << 40) + 7) + STORE_ID + FINGERPRINT
    head += struct.pack("<QIB", PLAN.warm_page_bytes, 2, len(name)) + name.ljust(63, b"\0")
    head += struct.pack("<I", 0) + bytes([1]) * 32 + bytes([2]) * 32
    head += struct.pack("<I", 5) + bytes([3]) * 32 + bytes([1]) * 32
    head = head.ljust(4096 - 32, b"\0")
    head += xxhash.xxh3_128_digest(PAYLOAD, seed=xxhash.xxh3_64_intdigest(head))
    head += xxhash.xxh3_128_digest(head)
    assert head == (FORMAT / "page_header_1.bin").read_bytes()


def test_every_flipped_bit_of_a_header_is_found() -> None:
    for good, parse in (
        (segment_header(), parse_segment_header),
        (encoded(HEADER, PAYLOAD), lambda data: parse_page_header(data, SHAPE, 11)),
    ):
        for index in range(len(good)):
            good[index] ^= 1 << index % 8
            with pytest.raises(CorruptData):
                parse(good)
            good[index] ^= 1 << index % 8
        parse(good)


@pytest.mark.parametrize(
    ("at", "name"),
    [
        (0, "magic"),
        (8, "version"),
        (12, "header bytes"),
        (16, "number"),
        (24, "generation"),
        (32, "store id"),
        (48, "fingerprint"),
    ],
)
def test_the_first_field_that_differs_is_named(at: int, name: str) -> None:
    header = encoded(HEADER, PAYLOAD)
    header[at] ^= 1
    header[79] ^= 1  # the end of the fingerprint
    with pytest.raises(CorruptData, match=f"^{name} of page 11: "):
        verify_page(header, PAYLOAD.data, SHAPE, page=HEADER.page, generation=HEADER.generation)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, PLAN.warm_page_bytes - 1), st.integers(1, 255))
def test_every_changed_byte_of_a_payload_is_found(index: int, mask: int) -> None:
    header = encoded(HEADER, PAYLOAD)
    damaged = PAYLOAD.copy()
    damaged[index] ^= mask
    with pytest.raises(CorruptData, match="expected checksum"):
        verify_page(header, damaged.data, SHAPE, page=11, generation=HEADER.generation)


@pytest.mark.parametrize(
    "other",
    [
        replace(HEADER, page=12),
        replace(HEADER, generation=8),
        replace(HEADER, label=page_label(1)),
        replace(HEADER, label=replace(HEADER.label, namespace="tenant-b")),
    ],
    ids=["page", "generation", "key", "namespace"],
)
def test_a_payload_does_not_verify_under_another_header(other: PageHeader) -> None:
    # The header is given the payload checksum of the first one, and its own header checksum.
    header = encoded(other, PAYLOAD)
    header[-32:-16] = encoded(HEADER, PAYLOAD)[-32:-16]
    header[-16:] = xxhash.xxh3_128_digest(header[:-16])
    assert parse_page_header(header, SHAPE, other.page) == other
    with pytest.raises(CorruptData, match="expected checksum"):
        verify_page(header, PAYLOAD.data, SHAPE, page=other.page, generation=other.generation)


@pytest.mark.parametrize("field", ["fingerprint", "store_id"])
def test_a_page_of_another_layout_or_store_does_not_parse(field: str) -> None:
    other = replace(SHAPE, **{field: bytes(len(getattr(SHAPE, field)))})
    with pytest.raises(
        CorruptData, match=r"(fingerprint|store id) of page 11: expected \w+, found"
    ):
        parse_page_header(encoded(HEADER, PAYLOAD, other), SHAPE, 11)


namespaces = st.text(max_size=63).filter(lambda text: len(text.encode("utf-8", "replace")) <= 63)
keys = st.binary(min_size=32, max_size=32)
labels = st.builds(
    lambda namespace, blocks: PageLabel(
        namespace, tuple(BlockLabel(p, *pair) for p, pair in sorted(blocks.items()))
    ),
    namespaces.filter(lambda text: text.isprintable()),
    st.dictionaries(st.integers(0, 7), st.tuples(keys, keys), min_size=1),
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), labels)
def test_a_page_header_round_trips(page: int, generation: int, label: PageLabel) -> None:
    header = PageHeader(page, generation, label)
    assert parse_page_header(encoded(header, PAYLOAD), SHAPE, page) == header


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_never_parse(noise: bytes, with_checksum: bool) -> None:
    data = memoryview(bytearray(noise.ljust(4096, noise[-1:] or b"\0")))
    if with_checksum:
        data[-16:] = xxhash.xxh3_128_digest(data[:-16])
    with pytest.raises(CorruptData):
        parse_page_header(data, SHAPE, 0)
    with pytest.raises(CorruptData):
        parse_segment_header(data)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 4096 - 33), st.binary(min_size=1, max_size=12))
def test_a_crafted_header_parses_to_itself_or_not_at_all(at: int, patch: bytes) -> None:
    """Fields are overwritten and the header checksum fixed up: only canonical forms may pass."""
    data = encoded(HEADER, PAYLOAD)
    data[at : min(at + len(patch), 4096 - 32)] = patch[: 4096 - 32 - at]
    data[-16:] = xxhash.xxh3_128_digest(data[:-16])
    try:
        header = parse_page_header(data, SHAPE, 11)
    except (CorruptData, TierFailed):  # TierFailed: another version's
        return
    again = encoded(header, PAYLOAD)
    assert again[:-32] == data[:-32]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 4096 - 17), st.binary(min_size=1, max_size=12))
def test_a_crafted_segment_header_parses_to_itself_or_not_at_all(at: int, patch: bytes) -> None:
    data = segment_header()
    data[at : min(at + len(patch), 4096 - 16)] = patch[: 4096 - 16 - at]
    data[-16:] = xxhash.xxh3_128_digest(data[:-16])
    try:
        shape, segment, salt, tag = parse_segment_header(data)
    except (CorruptData, TierFailed):  # TierFailed: another version's
        return
    assert salt == tag == b""  # a salt and a tag cannot be crafted in so few bytes
    again = memoryview(bytearray(4096))
    encode_segment_header(shape, segment, again)
    assert again == data


@pytest.mark.parametrize("version", [3, 4, 2**32 - 1])
def test_a_whole_header_of_a_later_version_is_refused_and_a_damaged_one_is_damage(
    version: int,
) -> None:
    for data, parse in (
        (segment_header(), parse_segment_header),
        (encoded(HEADER, PAYLOAD), lambda data: parse_page_header(data, SHAPE, 11)),
    ):
        data[8:12] = struct.pack("<I", version)
        with pytest.raises(CorruptData):
            parse(data)
        data[-16:] = xxhash.xxh3_128_digest(data[:-16])
        with pytest.raises(TierFailed, match=f"of format {version}, this version reads 1 and 2"):
            parse(data)


@pytest.mark.parametrize("length", [0, 16, 80, 4095, 8192])
def test_a_header_of_another_length_does_not_parse(length: int) -> None:
    with pytest.raises(CorruptData, match="header bytes"):
        parse_page_header(memoryview(bytes(length)), SHAPE, 0)
    with pytest.raises(CorruptData, match="header bytes"):
        parse_segment_header(memoryview(bytes(length)))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (PageLabel("a", ()), "at least one block"),
        (PageLabel("a", (BlockLabel(8, bytes(32), bytes(32)),)), r"outside 0\.\.7"),
        (PageLabel("a", (BlockLabel(1, bytes(32), bytes(32)),) * 2), "ascend"),
        (PageLabel("a", (BlockLabel(0, bytes(31), bytes(32)),)), "32 bytes"),
        (PageLabel("ä" * 32, (BlockLabel(0, bytes(32), bytes(32)),)), "64 bytes"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(label: PageLabel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(PageHeader(0, 1, label), PAYLOAD)


def test_a_payload_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="payload is"):
        encoded(HEADER, page_bytes(0)[:-1])


@pytest.mark.parametrize(("blocks", "size"), [(1, 4096), (57, 4096), (58, 8192), (1000, 69632)])
def test_header_sizes_are_whole_sectors(blocks: int, size: int) -> None:
    assert page_header_bytes(blocks) == size


def test_a_seal_may_take_another_sector() -> None:
    sizes = [(page_header_bytes(n), page_header_bytes(n, "hmac")) for n in range(1, 3000)]
    assert {sealed - plain for plain, sealed in sizes} == {0, 4096}
    assert all(sealed >= 156 + 68 * n + 76 for n, (_, sealed) in enumerate(sizes, 1))


def test_slots_lie_one_after_another() -> None:
    assert SHAPE.offset_of(0) == SHAPE.offset_of(8) == 4096
    assert SHAPE.offset_of(9) == 4096 + SHAPE.slot_bytes
    assert SHAPE.segment_of(8) == 1
    assert SHAPE.segment_bytes(8) == SHAPE.offset_of(7) + SHAPE.slot_bytes


def test_a_slot_of_zeros_is_blank() -> None:
    assert is_blank(memoryview(bytes(4096)))
    assert not is_blank(memoryview(bytes(4095) + b"\1"))
