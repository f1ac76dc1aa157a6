"""The manifest of a cold directory: what it holds, and its text; no I/O.

A line of JSON, its xxh3-128 in hex, in format 2 the tag of the line and the tag's xxh3-64 in hex,
blanks up to a multiple of 4096 bytes. Every version keeps the first two lines, so that an older
reader refuses a later one in words, and takes none for a damaged one. A damaged tag is a damaged
manifest; a whole one that does not verify is another key's.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.core.errors import CorruptData, TierFailed
from tierkv.core.geometry import ALIGN_BYTES, align_up
from tierkv.tiers.seals import NO_SEAL, expect_protection
from tierkv.tiers.seals.base import TAG_BYTES, Seal
from tierkv.tiers.segment_format import (
    FORMAT_PLAIN,
    FORMAT_SEALED,
    STORE_ID_BYTES,
    format_of,
    other_version,
)

MANIFEST_BYTES_MAX: Final = 1 << 20


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the directory holds. `segments` is as of the last open or close: a check, no truth."""

    format: int
    store_id: Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{{2 * STORE_ID_BYTES}}}$")]
    fingerprint: str
    layers: int
    block_tokens: int
    block_layer_bytes: int
    warm_page_blocks: int
    warm_page_bytes: int
    pages_per_segment: Annotated[int, msgspec.Meta(ge=1, le=(1 << 32) - 1)]
    segments: list[int]
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    clean: bool
    #: Left out of the text where there is none, as format 1 does not know it.
    protection: str = NO_SEAL


class _FormatOnly(msgspec.Struct):
    format: int


def manifest_text(manifest: Manifest, seal: Seal | None) -> npt.NDArray[np.uint8]:
    """What is written for `manifest`, whose tag `seal` makes."""
    line = msgspec.json.encode(manifest)
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode()
    if seal is not None:
        tag = seal.manifest_tag(bytes.fromhex(manifest.store_id), line)
        text += b"\n" + tag + xxhash.xxh3_64_hexdigest(tag).encode()
    return padded(text)


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in a text; its tag is not verified. CorruptData; TierFailed for a later one."""
    line, _, rest = text.partition(b"\n")
    if rest.split(b"\n")[0] != xxhash.xxh3_128_hexdigest(line).encode():
        raise CorruptData("manifest: wrong checksum")
    try:
        found = msgspec.json.decode(line, type=_FormatOnly).format
        if found not in (FORMAT_PLAIN, FORMAT_SEALED):
            raise TierFailed(f"the cold directory's manifest is {other_version(found)}")
        manifest = msgspec.json.decode(line, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptData(f"manifest: {error}") from error
    if format_of(manifest.protection) != found or not manifest.protection.isprintable():
        raise CorruptData(f"manifest: format {found} with protection {manifest.protection!r:.40}")
    if found == FORMAT_SEALED:
        _line_and_tag(text)
    return manifest


def expect_seal(text: bytes, manifest: Manifest, seal: Seal | None) -> None:
    """TierFailed, with the cure, unless a manifest is protected as expected, by this key."""
    try:
        expect_protection(manifest.protection, NO_SEAL if seal is None else seal.name)
    except TierFailed as error:
        raise TierFailed(f"the cold directory is {error}") from None
    if seal is None:
        return
    line, tag = _line_and_tag(text)
    if not seal.is_manifest(bytes.fromhex(manifest.store_id), line, tag):
        raise other_key("the manifest")


def _line_and_tag(text: bytes) -> tuple[bytes, bytes]:
    line, _, last = [*text.split(b"\n", 3), b"", b""][:3]
    tag, checksum = last[: 2 * TAG_BYTES], last[2 * TAG_BYTES :]
    if checksum != xxhash.xxh3_64_hexdigest(tag).encode():
        raise CorruptData("manifest: its tag is damaged")
    return line, tag


def other_key(what: str) -> TierFailed:
    """Something whole does not verify, and nothing yet has shown that the key is the right one."""
    return TierFailed(
        f"{what} of the cold directory was not made with this key, or was altered by somebody who "
        "has none; nothing was changed; cure: the key_file it was written with, another "
        "directory, or remove its contents"
    )


def padded(text: bytes) -> npt.NDArray[np.uint8]:
    """`text`, a line end, and blanks up to a multiple of 4096 bytes."""
    text += b"\n"
    return np.frombuffer(text.ljust(align_up(len(text), ALIGN_BYTES)), dtype=np.uint8)
