"""Protections of the cold tier: nothing that was not made with the key is taken, and none leaks."""

from __future__ import annotations

import struct
from collections.abc import Callable
from hmac import digest
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tierkv.core.errors import ConfigError, CorruptData, TierFailed
from tierkv.testing.drills.flips_site import disk_of
from tierkv.testing.file_engines import page_bytes
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles
from tierkv.testing.tiers import (
    FINGERPRINT,
    PAGE_BYTES,
    PLAN,
    SLOT_BYTES,
    ColdTierTests,
    page_label,
)
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.files.direct import DirectFiles
from tierkv.tiers.seals import SEALS, load_seal
from tierkv.tiers.seals.aes_gcm import AesGcmSeal
from tierkv.tiers.seals.base import Seal, hkdf_sha256
from tierkv.tiers.seals.hmac_sha256 import HmacSeal
from tierkv.tiers.segment_format import (
    PageHeader,
    SegmentShape,
    encode_sealed_page,
    expect_page_tag,
    open_sealed_page,
    parse_page_header,
)
from tierkv.tiers.segment_header import encode_segment_header, parse_segment_header
from tierkv.tiers.segments import SegmentTier

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
KINDS: list[type[Seal]] = [HmacSeal, AesGcmSeal]
STORE_ID = bytes(range(100, 116))
SALT = bytes(range(200, 232))
HEADER = PageHeader(11, (3 << 40) + 7, page_label(5, namespace="tenant-ä"))

Image = dict[str, bytes]

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)

pytestmark = pytest.mark.usefixtures("quiet")


class TestHmacKeepsTheContract(ColdTierTests):
    seal = HmacSeal(KEY)

    def make(self, root: Path) -> FileEngine:
        return MemoryFiles(root)

    def restart(self, files: FileEngine, root: Path) -> FileEngine:
        del root
        files.shutdown()
        return files


class TestAesGcmKeepsTheContract(TestHmacKeepsTheContract):
    seal = AesGcmSeal(KEY)


class TestAesGcmKeepsTheContractOnDirectFiles(ColdTierTests):
    seal = AesGcmSeal(KEY)

    def make(self, root: Path) -> FileEngine:
        reason = DirectFiles.probe(root)
        if reason is not None:
            pytest.skip(reason)
        return DirectFiles(root)


# ---- known answers


def test_keys_are_derived_as_rfc_5869_says() -> None:
    """Its test cases 1 and 3."""
    key = bytes([0x0B]) * 22
    first = hkdf_sha256(key, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert first.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    third = hkdf_sha256(key, b"", b"", 42)
    assert third.hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


def test_hmac_is_rfc_4231s() -> None:
    """Its test case 2, in the two pieces that a page is; with the nonce that this seal has."""
    tag = bytes.fromhex("5bdcc146bf60754e6a042426089575c7")
    payload = memoryview(bytearray(b"for nothing?"))
    said = memoryview(b"what do ya want ")
    seal = HmacSeal(KEY)
    assert seal.close(b"Jefe", said, payload, payload) == (bytes(12), tag)
    assert seal.open(b"Jefe", said, bytes(12), tag, payload)
    assert not seal.open(b"Jefe", said, b"\1" + bytes(11), tag, payload)


def test_aes_gcm_is_nists() -> None:
    """Test case 16 of McGrew and Viega, "The Galois/Counter Mode of Operation"."""
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    plain = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    payload = memoryview(
        bytearray.fromhex(
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
            "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        )
    )
    said = memoryview(bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2"))
    nonce = bytes.fromhex("cafebabefacedbaddecaf888")
    tag = bytes.fromhex("76fc6ece0f4e1768cddf8853bb2d551b")
    assert AesGcmSeal(KEY).open(key, said, nonce, tag, payload)
    assert payload == plain


def test_aes_gcm_leaves_nothing_of_what_does_not_verify() -> None:
    seal = AesGcmSeal(KEY)
    payload = page_bytes(1)
    stored = aligned_array(PAGE_BYTES, 4096)
    nonce, tag = seal.close(KEY, memoryview(b"said"), payload.data, stored.data)
    assert not seal.open(KEY, memoryview(b"else"), nonce, tag, stored.data)
    assert not stored.any()


# ---- the format


def shape_of(kind: type[Seal]) -> SegmentShape:
    return SegmentShape.of(
        PLAN,
        fingerprint=FINGERPRINT,
        store_id=STORE_ID,
        pages_per_segment=8,
        protection=kind.name,
    )


def sealed(kind: type[Seal], payload: np.ndarray) -> tuple[memoryview, np.ndarray]:
    """A page header of `HEADER`, and what is written behind it."""
    shape = shape_of(kind)
    out = memoryview(bytearray(b"\xff" * shape.header_bytes))
    stored = aligned_array(PAGE_BYTES, 4096) if kind.hides else payload.copy()
    keys = kind(KEY).segment(STORE_ID, 1, SALT)
    source = payload.data if kind.hides else stored.data
    encode_sealed_page(shape, HEADER, source, out, seal=keys, stored=stored.data)
    return out, stored


def opened(kind: type[Seal], header: memoryview, stored: np.ndarray) -> np.ndarray:
    """The payload that is revealed; CorruptData if it does not verify."""
    keys = kind(KEY).segment(STORE_ID, 1, SALT)
    place = HEADER.page, HEADER.generation
    out = stored.copy()
    shape = shape_of(kind)
    open_sealed_page(header, out.data, shape, page=place[0], generation=place[1], seal=keys)
    return out


def believed(kind: type[Seal], header: memoryview) -> PageHeader:
    """What recovery takes from a header; CorruptData if it does not verify."""
    found = parse_page_header(header, shape_of(kind), 11)
    expect_page_tag(header, shape_of(kind), 11, kind(KEY).segment(STORE_ID, 1, SALT))
    return found


@kinds
def test_a_page_round_trips_and_the_callers_bytes_stay_as_they_are(kind: type[Seal]) -> None:
    payload = page_bytes(3)
    before = payload.copy()
    header, stored = sealed(kind, payload)
    assert np.array_equal(payload, before)
    assert np.array_equal(opened(kind, header, stored), before)
    assert believed(kind, header) == HEADER
    assert np.array_equal(stored, before) != kind.hides


@kinds
def test_the_grammar_written_down_gives_a_page_header_of_format_2(kind: type[Seal]) -> None:
    header, stored = sealed(kind, page_bytes(3))
    name = "tenant-ä".encode()
    said = b"TIERKVP\0" + struct.pack("<IIQQ", 2, 4096, 11, (3 << 40) + 7) + STORE_ID + FINGERPRINT
    said += struct.pack("<QIB", PAGE_BYTES, 2, len(name)) + name.ljust(63, b"\0")
    for block in HEADER.label.blocks:
        said += struct.pack("<I", block.position) + block.key + block.parent
    said = said.ljust(4096 - 76, b"\0")
    assert header[: 4096 - 76] == said
    info = b"tierkv/segment/" + kind.name.encode() + b"/" + STORE_ID + struct.pack("<Q", 1)
    keys = hkdf_sha256(KEY, SALT, info, 64)
    nonce, tag = bytes(header[-76:-64]), bytes(header[-64:-48])
    out = stored.copy()
    assert kind(KEY).open(keys[:32], memoryview(said), nonce, tag, out.data)
    assert np.array_equal(out, page_bytes(3))
    end = digest(keys[32:], said + nonce + tag, "sha256")[:16]
    before = said + nonce + tag + end
    end += xxhash.xxh3_128_digest(stored, seed=xxhash.xxh3_64_intdigest(before))
    end += xxhash.xxh3_128_digest(said + nonce + tag + end)
    assert header[-48:] == end


@kinds
def test_the_grammar_written_down_gives_a_segment_header_of_format_2(kind: type[Seal]) -> None:
    out = memoryview(bytearray(4096))
    encode_segment_header(shape_of(kind), 5, out, kind(KEY).segment(STORE_ID, 5, SALT))
    said = b"TIERKVS\0" + struct.pack("<IIQIIQ", 2, 4096, PAGE_BYTES, 8, 8, 5)
    said += STORE_ID + FINGERPRINT + kind.name.encode().ljust(16, b"\0") + SALT
    said = said.ljust(4096 - 64, b"\0") + SALT
    info = b"tierkv/segment/" + kind.name.encode() + b"/" + STORE_ID + struct.pack("<Q", 5)
    said += digest(hkdf_sha256(KEY, SALT, info, 64)[32:], said, "sha256")[:16]
    assert out == said + xxhash.xxh3_128_digest(said)
    found = parse_segment_header(out)
    assert (found.shape, found.number, found.salt) == (shape_of(kind), 5, SALT)


@kinds
def test_every_flipped_byte_of_a_sealed_header_is_a_miss(kind: type[Seal]) -> None:
    """Also where the flip's own checksum is made right: nonce and tags need the key."""
    header, stored = sealed(kind, page_bytes(3))
    good = bytes(header)
    for index in range(4096):
        for is_forged in (False, True):
            header[:] = good
            header[index] ^= 1 << index % 8
            if is_forged:
                header[-32:-16] = xxhash.xxh3_128_digest(
                    stored, seed=xxhash.xxh3_64_intdigest(header[:-32])
                )
                header[-16:] = xxhash.xxh3_128_digest(header[:-16])
                if bytes(header) == good:
                    continue  # a flip in a checksum, made right
            with pytest.raises(CorruptData):
                opened(kind, header, stored)
            with pytest.raises((CorruptData, TierFailed)):  # TierFailed: a later version's
                believed(kind, header)


@kinds
def test_every_flipped_byte_of_a_sealed_payload_is_a_miss(kind: type[Seal]) -> None:
    header, stored = sealed(kind, page_bytes(3))
    for index in range(PAGE_BYTES):
        stored[index] ^= 1 << index % 8
        with pytest.raises(CorruptData, match="not made with this key, or was changed"):
            opened(kind, header, stored)
        stored[index] ^= 1 << index % 8
    opened(kind, header, stored)


def test_the_same_page_is_never_encrypted_the_same_way_twice() -> None:
    pairs = [sealed(AesGcmSeal, page_bytes(3)) for _ in range(64)]
    assert len({bytes(header[-76:-64]) for header, _ in pairs}) == 64
    assert len({stored[:16].tobytes() for _, stored in pairs}) == 64


# ---- a tier


def tier_on(disk: FileEngine, seal: Seal | None, *, pages_max: int = 20) -> SegmentTier:
    return SegmentTier(
        disk, PLAN, FINGERPRINT, pages_max=pages_max, segment_cold_pages=2, seal=seal
    )


def image_of(seal: Seal | None, *, seeds: int = 0, is_clean: bool = True) -> Image:
    """The files of a tier with twenty pages; page `p` holds what `p + seeds` seeds."""
    disk = MemoryFiles(Path("disk"))
    tier = tier_on(disk, seal)
    tier.open()
    values = [page + seeds for page in range(20)]
    tier.write_pages(range(20), [page_bytes(v) for v in values], [page_label(v) for v in values])
    tier.sync()
    if is_clean:
        tier.close()
    return files_of(disk)


def files_of(disk: MemoryFiles) -> Image:
    return {name: bytes(inode.seen) for name, inode in disk._names.items() if name != "lock"}


def found_in(image: Image, seal: Seal | None, *, seeds: int = 0) -> set[int]:
    """Pages that a start finds and a read gives; other bytes or labels than were put fail here."""
    tier = tier_on(disk_of(image), seal)
    recovered = {one.page: one.label for one in tier.open()}
    outs = [aligned_array(PAGE_BYTES, 4096) for _ in range(20)]
    good = {page for page, is_good in enumerate(tier.read_pages(range(20), outs)) if is_good}
    for page in good:
        assert bytes(outs[page]) == bytes(page_bytes(page + seeds)), f"wrong bytes in page {page}"
        assert recovered[page] == page_label(page + seeds)
    tier.close()
    return good


ALL = set(range(20))


def slot_at(page: int) -> tuple[str, int]:
    return f"segment-{page // 8:08d}.tkv", 4096 + page % 8 * SLOT_BYTES


def with_slot(image: Image, page: int, slot: bytes) -> Image:
    name, at = slot_at(page)
    return image | {name: image[name][:at] + slot + image[name][at + SLOT_BYTES :]}


def slot_of(image: Image, page: int) -> bytes:
    name, at = slot_at(page)
    return image[name][at : at + SLOT_BYTES]


@kinds
def test_pages_in_each_others_place_are_misses(kind: type[Seal]) -> None:
    """Of one segment, of two; of another store with the same key; as they are in this one."""
    image, other = image_of(kind(KEY)), image_of(kind(KEY), seeds=100)
    for one, two in ((1, 2), (1, 9)):
        swapped = with_slot(image, one, slot_of(image, two))
        swapped = with_slot(swapped, two, slot_of(image, one))
        assert found_in(swapped, kind(KEY)) == ALL - {one, two}
    assert found_in(with_slot(image, 3, slot_of(other, 3)), kind(KEY)) == ALL - {3}
    assert found_in(other, kind(KEY), seeds=100) == ALL


@kinds
def test_another_stores_page_is_a_miss_even_with_all_names_made_right(kind: type[Seal]) -> None:
    """Store id, generation and checksums are put right; its segment had another salt."""
    image, other = image_of(kind(KEY)), image_of(kind(KEY), seeds=100)
    slot = bytearray(slot_of(other, 3))
    slot[8:80] = slot_of(image, 3)[8:80]
    payload = bytes(slot[4096:])
    slot[4064:4080] = xxhash.xxh3_128_digest(payload, xxhash.xxh3_64_intdigest(slot[:4064]))
    slot[4080:4096] = xxhash.xxh3_128_digest(slot[:4080])
    assert found_in(with_slot(image, 3, bytes(slot)), kind(KEY)) == ALL - {3}


@kinds
def test_swapped_segments_and_segments_of_another_store_give_nothing(kind: type[Seal]) -> None:
    image, other = image_of(kind(KEY)), image_of(kind(KEY), seeds=100)
    names = "segment-00000000.tkv", "segment-00000001.tkv"
    swapped = image | {names[0]: image[names[1]], names[1]: image[names[0]]}
    assert found_in(swapped, kind(KEY)) == {16, 17, 18, 19}
    assert found_in(image | {names[0]: other[names[0]]}, kind(KEY)) == ALL - set(range(8))


@pytest.mark.parametrize("kind", [None, *KINDS], ids=["none", "hmac", "aes-256-gcm"])
@pytest.mark.parametrize("part", ["payload", "block", "namespace"])
def test_a_forged_page_with_checksums_made_right_is_a_miss_where_there_is_a_key(
    kind: type[Seal] | None, part: str
) -> None:
    """Without a protection the same forgery is taken: that is what one is for."""
    seal = None if kind is None else kind(KEY)
    image = image_of(seal)
    slot = bytearray(slot_of(image, 5))
    at = {"payload": 4096 + 77, "block": 156 + 4 + 5, "namespace": 93}[part]
    slot[at] ^= 1
    payload = bytes(slot[4096:])
    slot[4064:4080] = xxhash.xxh3_128_digest(payload, xxhash.xxh3_64_intdigest(slot[:4064]))
    slot[4080:4096] = xxhash.xxh3_128_digest(slot[:4080])
    forged = with_slot(image, 5, bytes(slot))
    if seal is not None:
        assert found_in(forged, seal) == ALL - {5}
    else:
        tier = tier_on(disk_of(forged), None)
        tier.open()
        assert tier.read_pages([5], [aligned_array(PAGE_BYTES, 4096)]) == [True]


@kinds
def test_a_page_written_over_while_the_tier_is_open_is_a_miss_if_it_is_old(
    kind: type[Seal],
) -> None:
    disk = MemoryFiles(Path("disk"))
    tier = tier_on(disk, kind(KEY))
    tier.open()
    tier.write_pages([3], [page_bytes(1)], [page_label(1)])
    old = slot_of(files_of(disk), 3)
    tier.write_pages([3], [page_bytes(2)], [page_label(2)])
    name, at = slot_at(3)
    disk._names[name].seen[at : at + SLOT_BYTES] = old
    assert tier.read_pages([3], [aligned_array(PAGE_BYTES, 4096)]) == [False]


@kinds
def test_a_page_of_a_life_that_was_undone_is_a_miss(kind: type[Seal]) -> None:
    """The directory is put back, lives on, and is given a page of the life that is no more.

    Both lives have the same epoch, and write the same page first: only chance tells them apart.
    """
    disk = disk_of(image_of(kind(KEY)))
    first, second = disk.copy(seed=0), disk.copy(seed=0)
    lives = []
    for copy, value in ((first, 1), (second, 2)):
        tier = tier_on(copy, kind(KEY))
        tier.open()
        tier.write_pages([3], [page_bytes(value)], [page_label(value)])
        lives.append(tier)
    out = aligned_array(PAGE_BYTES, 4096)
    assert lives[1].read_pages([3], [out]) == [True]
    name, at = slot_at(3)
    second._names[name].seen[at : at + SLOT_BYTES] = slot_of(files_of(first), 3)
    assert lives[1].read_pages([3], [out]) == [False]


@kinds
def test_what_is_put_back_whole_is_believed_at_a_start(kind: type[Seal]) -> None:
    """What the docs say is not held: the old directory, or an old page of it, was made by us."""
    disk = MemoryFiles(Path("disk"))
    tier = tier_on(disk, kind(KEY))
    tier.open()
    tier.write_pages([3], [page_bytes(3)], [page_label(3)])
    tier.sync()
    old = slot_of(files_of(disk), 3)
    tier.erase([3])
    tier.close()
    image = files_of(disk)
    assert found_in(image, kind(KEY)) == set()
    assert found_in(with_slot(image, 3, old), kind(KEY)) == {3}


def test_no_piece_of_a_payload_is_on_the_disk_but_in_the_clear_with_hmac() -> None:
    payload = bytes(page_bytes(4))
    pieces = {payload[at : at + 16] for at in range(0, PAGE_BYTES, 16)}
    for kind in KINDS:
        text = b"".join(image_of(kind(KEY)).values())
        there = {piece for piece in pieces if piece in text}
        assert there == (set() if kind.hides else pieces)


# ---- segment headers


def with_byte_flipped(image: Image, name: str, index: int) -> Image:
    data = bytearray(image[name])
    data[index] ^= 1 << index % 8
    return image | {name: bytes(data)}


@kinds
def test_a_flipped_byte_of_a_segment_header_costs_nothing(kind: type[Seal]) -> None:
    image = image_of(kind(KEY))
    name = "segment-00000001.tkv"
    for index in [*range(140), 2000, *range(4096 - 64, 4096)]:
        assert found_in(with_byte_flipped(image, name, index), kind(KEY)) == ALL, index


@kinds
def test_a_forged_segment_header_costs_at_most_its_segment(kind: type[Seal]) -> None:
    """Its checksum is right; its salt, its number or its length was changed."""
    image = image_of(kind(KEY))
    name = "segment-00000001.tkv"
    for index in (28, 32, 40, 56, 105, 4096 - 50, 4096 - 20):
        data = bytearray(with_byte_flipped(image, name, index)[name])
        data[4080:4096] = xxhash.xxh3_128_digest(bytes(data[:4080]))
        assert found_in(image | {name: bytes(data)}, kind(KEY)) >= ALL - set(range(8, 16)), index


@kinds
def test_a_segment_without_its_salt_is_erased_and_can_be_used_again(kind: type[Seal]) -> None:
    image = image_of(kind(KEY))
    name = "segment-00000001.tkv"
    disk = disk_of(image | {name: bytes(4096) + image[name][4096:]})
    tier = tier_on(disk, kind(KEY))
    assert {one.page for one in tier.open()} == ALL - set(range(8, 16))
    tier.write_pages([9], [page_bytes(9)], [page_label(9)])
    tier.close()
    assert found_in(files_of(disk), kind(KEY)) == ALL - set(range(8, 16)) | {9}


@kinds
def test_a_segment_header_that_cannot_be_read_now_costs_nothing_later(kind: type[Seal]) -> None:
    disk = disk_of(image_of(kind(KEY)))
    reads = iter(range(1000))
    failing = FaultyFiles(
        disk,
        # The manifest is read first, then the headers of segments 0, 1, 2.
        lambda _n, operation: Fault.EIO if operation == "read" and next(reads) == 2 else None,
    )
    tier = tier_on(failing, kind(KEY))
    assert {one.page for one in tier.open()} == ALL - set(range(8, 16))
    assert tier.withheld == list(range(8, 16))
    with pytest.raises(TierFailed, match="its header could not be read"):
        tier.write_pages([9], [page_bytes(9)], [page_label(9)])
    tier.close()
    assert found_in(files_of(disk), kind(KEY)) == ALL


# ---- the wrong key


def lost_manifest(image: Image) -> Image:
    return {name: data for name, data in image.items() if name != "manifest"}


def damaged_manifest(image: Image) -> Image:
    return with_byte_flipped(image, "manifest", 20)


def damaged_tag(image: Image) -> Image:
    at = image["manifest"].index(b"\n", image["manifest"].index(b"\n") + 1) + 5
    return with_byte_flipped(image, "manifest", at)


def damaged_header(image: Image) -> Image:
    return with_byte_flipped(image, "segment-00000000.tkv", 110)


def damaged_header_and_manifest(image: Image) -> Image:
    return damaged_header(damaged_manifest(image))


def half_made(image: Image) -> Image:
    return image | {"segment-00000009.tmp": bytes(4096), "segment-00000077.tkv": bytes(8192)}


CHANGES: list[Callable[[Image], Image]] = [
    dict,
    lost_manifest,
    damaged_manifest,
    damaged_tag,
    damaged_header,
    damaged_header_and_manifest,
    half_made,
]


@kinds
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("is_clean", [True, False], ids=["clean", "killed"])
def test_a_wrong_key_is_refused_and_changes_nothing(
    kind: type[Seal], change: Callable[[Image], Image], is_clean: bool
) -> None:
    image = change(image_of(kind(KEY), is_clean=is_clean))
    others: list[Seal | None] = [None, kind(OTHER_KEY)]
    others += [other(KEY) for other in KINDS if other is not kind]
    for seal in others:
        disk = disk_of(image)
        with pytest.raises(TierFailed, match=r"cure: .*key_file it was written with"):
            tier_on(disk, seal).open()
        assert files_of(disk) == image
    assert found_in(image, kind(KEY)) == ALL


@kinds
def test_a_directory_without_protection_is_refused_with_one(kind: type[Seal]) -> None:
    image = image_of(None)
    for change in (dict, lost_manifest):
        disk = disk_of(change(image))
        with pytest.raises(TierFailed, match=f"not protected, and .* is {kind.name}; cure: "):
            tier_on(disk, kind(KEY)).open()
        assert files_of(disk) == change(image)


@kinds
@pytest.mark.parametrize("field", [b'"epoch":1', b'"clean":true'])
def test_a_forged_manifest_is_refused_and_nothing_changed(kind: type[Seal], field: bytes) -> None:
    image = image_of(kind(KEY))
    line, _, tag = image["manifest"].split(b"\n", 3)[:3]
    assert field in line
    line = line.replace(field, {b'"epoch":1': b'"epoch":9'}.get(field, b'"clean":false'))
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n" + tag + b"\n"
    image |= {"manifest": text.ljust(4096)}
    disk = disk_of(image)
    with pytest.raises(TierFailed, match="was altered by somebody who has none"):
        tier_on(disk, kind(KEY)).open()
    assert files_of(disk) == image


# ---- key files


def key_file(folder: Path, text: bytes = KEY.hex().encode(), mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_bytes(text)
    path.chmod(mode)
    return path


@kinds
def test_a_key_file_is_64_digits_with_or_without_a_line_end(
    kind: type[Seal], tmp_path: Path
) -> None:
    image = image_of(kind(KEY))
    for text in (KEY.hex(), KEY.hex() + "\n", KEY.hex().upper() + "\r\n"):
        seal = load_seal(kind.name, key_file(tmp_path, text.encode()))
        assert found_in(image, seal) == ALL


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", KEY, KEY.hex().encode()[:-1], KEY.hex().encode() + b"0", b"g" * 64, b"0" * 9999],
)
def test_what_is_no_key_is_refused_and_not_shown(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits and nothing else; cure") as caught:
        load_seal("hmac", key_file(tmp_path, text))
    assert not text.strip() or text.decode("latin-1") not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o601, 0o777])
def test_a_key_that_others_may_use_is_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"others may use it \(mode 0{mode:o}\); cure: chmod"):
        load_seal("hmac", key_file(tmp_path, mode=mode))
    for good in (0o600, 0o400):
        load_seal("hmac", key_file(tmp_path, mode=good))


def test_a_key_file_that_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(key_file(tmp_path))
    with pytest.raises(ConfigError, match="links are not followed"):
        load_seal("hmac", tmp_path / "link")
    with pytest.raises(ConfigError, match="no plain file"):
        load_seal("hmac", tmp_path)
    with pytest.raises(ConfigError, match=r"No such file.*cure: make one with: tierkv keygen"):
        load_seal("hmac", tmp_path / "none")


def test_every_seal_is_in_the_registry_and_has_a_name_that_the_header_holds() -> None:
    assert [SEALS.load(name) for name in SEALS] == KINDS
    assert all(SEALS.load(name).name == name and len(name) <= 16 for name in SEALS)
