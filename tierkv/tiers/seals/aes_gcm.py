"""`aes-256-gcm`: nobody without the key reads a payload, or makes one that verifies.

AES-256 in Galois/Counter Mode (NIST SP 800-38D), of the package `cryptography`. Nonces are 96
random bits: a counter would repeat where a directory is restored from a copy. A segment's key
closes far fewer than the 2^32 pages after which chance would matter.

Headers are not hidden. They hold namespaces, sizes and blocks' keys, which are hashes of tokens:
whoever can guess a prompt can see whether it is there, unless its namespace has a salt.
"""

from __future__ import annotations

import secrets
from typing import Final

from tierkv.core.errors import ConfigError
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.seals.base import NONCE_BYTES, TAG_BYTES, Seal

#: OpenSSL counts in ints.
_PIECE_BYTES: Final = 1 << 30


class AesGcmSeal(Seal):
    """Payloads are encrypted and authenticated, headers are authenticated."""

    name = "aes-256-gcm"
    hides = True

    def __init__(self, master: bytes) -> None:
        super().__init__(master)
        try:
            import cryptography.hazmat.primitives.ciphers  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"tiers.cold.protection: aes-256-gcm needs the package cryptography ({error}); "
                "cure: pip install 'tierkv-offload[crypto]'"
            ) from None

    def close(
        self, key: bytes, said: Buffer, payload: Buffer, stored: Buffer
    ) -> tuple[bytes, bytes]:
        """Encrypt `payload` into `stored`; the plain bytes go nowhere else."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        nonce = secrets.token_bytes(NONCE_BYTES)
        encryptor = Cipher(algorithms.AES256(key), modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(said)
        for start in range(0, len(payload), _PIECE_BYTES):
            stop = start + _PIECE_BYTES
            encryptor.update_into(payload[start:stop], stored[start:stop])
        encryptor.finalize()
        return nonce, encryptor.tag

    def open(self, key: bytes, said: Buffer, nonce: bytes, tag: bytes, payload: Buffer) -> bool:
        """Decrypt in place; what does not verify is zeroed."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        cipher = Cipher(algorithms.AES256(key), modes.GCM(nonce, tag, TAG_BYTES))
        decryptor = cipher.decryptor()
        decryptor.authenticate_additional_data(said)
        for start in range(0, len(payload), _PIECE_BYTES):
            piece = payload[start : start + _PIECE_BYTES]
            decryptor.update_into(piece, piece)
        try:
            decryptor.finalize()
        except InvalidTag:
            payload[:] = bytes(len(payload))
            return False
        return True
