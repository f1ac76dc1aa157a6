"""What a seal promises, and how its keys are made.

A seal stands between a page and a directory that others can read or write. Whatever it does, format
2 keeps the checksums of format 1 beside it: they find faults without a key.

Keys. One master key of 32 bytes, from the user's file. From it, by HKDF-SHA256 (RFC 5869):

- per segment 64 bytes, the first half for payloads, the second for headers; salt: 32 random bytes
  in the segment's header; info: the seal's name, the store's id, the segment's number.
- per store 32 bytes for the manifest; salt: the store's id.

So what one segment's key made verifies in no other segment, store or protection. Without the key
file nothing can be read or made again; without a segment's salt, nothing of that segment.

What is held: a page, header or manifest that was not made with the key is not taken for one that
was. What is not held: something old put back. A whole directory, a segment or a page as it was
earlier verifies at a start, since it was made with the key. (While a store is open its generations
in RAM tell.) It holds what was put under its keys at that time, so no get gives wrong bytes by it,
but what was erased since can come back that way. Whoever can write can also always destroy.

Tags are 16 bytes of HMAC-SHA256, or GCM's. Nothing here wipes keys from memory: Python cannot.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from abc import ABC, abstractmethod
from typing import ClassVar, Final

from tierkv.core.errors import CorruptData
from tierkv.tiers.files.base import Buffer

MASTER_BYTES: Final = 32
SALT_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16

_KEY_BYTES: Final = 32
_DIGEST_BYTES: Final = 32


class SegmentSeal:
    """A seal with the keys of one segment. Any thread."""

    #: False where nothing can be verified but checksums.
    has_key: ClassVar[bool] = True

    def __init__(self, seal: Seal, salt: bytes, keys: bytes) -> None:
        self.salt = salt
        self._seal = seal
        self._payload_key = keys[:_KEY_BYTES]
        self._header_key = keys[_KEY_BYTES:]

    @property
    def hides(self) -> bool:
        """Whether `close` needs another place than `payload` for what goes to the disk."""
        return self._seal.hides

    def header_tag(self, header: Buffer) -> bytes:
        """The tag of a header, of all its bytes before the tag."""
        return hmac.digest(self._header_key, header, "sha256")[:TAG_BYTES]

    def expect_header(self, what: str, header: Buffer, tag: bytes) -> None:
        """CorruptData unless this is the tag of these bytes."""
        if not hmac.compare_digest(self.header_tag(header), tag):
            raise CorruptData(f"{what}: it was not made with this key")

    def close(self, said: Buffer, payload: Buffer, stored: Buffer) -> tuple[bytes, bytes]:
        """See `Seal.close`."""
        return self._seal.close(self._payload_key, said, payload, stored)

    def open(self, said: Buffer, nonce: bytes, tag: bytes, payload: Buffer) -> bool:
        """See `Seal.open`."""
        return self._seal.open(self._payload_key, said, nonce, tag, payload)


class Seal(ABC):
    """One kind of protection, with a store's master key. Any thread."""

    #: The name in the registry, in the configuration, and on the disk: at most 16 bytes.
    name: str
    #: Whether what lies on the disk is something else than the payload.
    hides: bool

    def __init__(self, master: bytes) -> None:
        if len(master) != MASTER_BYTES:
            raise ValueError(f"a key is {MASTER_BYTES} bytes, got {len(master)}")
        self._master = master

    @abstractmethod
    def close(
        self, key: bytes, said: Buffer, payload: Buffer, stored: Buffer
    ) -> tuple[bytes, bytes]:
        """Put into `stored`, as long as `payload`, what may go to the disk; nonce and tag of it.

        The tag binds it to `said`, the header up to where the seal begins. A seal that does not
        hide leaves `stored` alone, and is given the payload in it.
        """

    @abstractmethod
    def open(self, key: bytes, said: Buffer, nonce: bytes, tag: bytes, payload: Buffer) -> bool:
        """Verify and reveal in place; False where it does not verify, `payload` is then undefined.

        Never leaves in `payload` what was revealed and not verified.
        """

    def segment(self, store_id: bytes, number: int, salt: bytes) -> SegmentSeal:
        """The keys of a segment whose header says `salt`."""
        info = self._info("segment", store_id) + number.to_bytes(8, "little")
        return SegmentSeal(self, salt, hkdf_sha256(self._master, salt, info, 2 * _KEY_BYTES))

    def new_segment(self, store_id: bytes, number: int) -> SegmentSeal:
        """The keys of a segment that is being made."""
        return self.segment(store_id, number, secrets.token_bytes(SALT_BYTES))

    def is_manifest(self, store_id: bytes, line: bytes, tag: bytes) -> bool:
        """Whether this is the tag of a manifest's line."""
        return hmac.compare_digest(self.manifest_tag(store_id, line), tag)

    def manifest_tag(self, store_id: bytes, line: bytes) -> bytes:
        """The tag of a manifest's line, in hex."""
        info = self._info("manifest", store_id)
        key = hkdf_sha256(self._master, store_id, info, _KEY_BYTES)
        return hmac.digest(key, line, "sha256")[:TAG_BYTES].hex().encode()

    def _info(self, purpose: str, store_id: bytes) -> bytes:
        return f"tierkv/{purpose}/{self.name}/".encode() + store_id


def hkdf_sha256(key: bytes, salt: bytes, info: bytes, size_bytes: int) -> bytes:
    """RFC 5869: `size_bytes`, at most 255 x 32, of key material."""
    pseudorandom = hmac.digest(salt, key, hashlib.sha256)
    blocks, block = b"", b""
    for count in range(1, -(-size_bytes // _DIGEST_BYTES) + 1):
        block = hmac.digest(pseudorandom, block + info + bytes([count]), hashlib.sha256)
        blocks += block
    return blocks[:size_bytes]
