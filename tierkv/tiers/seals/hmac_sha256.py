"""`hmac`: for a directory that others can write to. Payloads stay readable.

HMAC-SHA256 (RFC 2104, FIPS 198-1) over header and payload, cut to 16 bytes as FIPS allows; the
standard library has it, and it runs at the speed of SHA-256.
"""

from __future__ import annotations

import hmac

from tierkv.tiers.files.base import Buffer
from tierkv.tiers.seals.base import NONCE_BYTES, TAG_BYTES, Seal

_NO_NONCE = bytes(NONCE_BYTES)


class HmacSeal(Seal):
    """Nobody without the key makes a page that verifies."""

    name = "hmac"
    hides = False

    def close(
        self, key: bytes, said: Buffer, payload: Buffer, stored: Buffer
    ) -> tuple[bytes, bytes]:
        """A tag over `said`, which has one length in a store, and the payload; no nonce."""
        del payload
        return _NO_NONCE, _tag(key, said, stored)

    def open(self, key: bytes, said: Buffer, nonce: bytes, tag: bytes, payload: Buffer) -> bool:
        """Whether the tag is theirs; the payload is left as it is."""
        return nonce == _NO_NONCE and hmac.compare_digest(_tag(key, said, payload), tag)


def _tag(key: bytes, said: Buffer, payload: Buffer) -> bytes:
    made = hmac.new(key, said, "sha256")
    made.update(payload)  # releases the GIL
    return made.digest()[:TAG_BYTES]
