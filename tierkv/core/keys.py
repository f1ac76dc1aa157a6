"""Block keys: who a block is.

A key is SHA-256 over (parent key, token ids), chained from a root over (namespace salt, layout
fingerprint). Two tenants, two layouts or two histories therefore never share a key, and a key
names a whole prefix. A cryptographic hash is used because a key is an identity that a hostile
prompt must not forge (the collision class of vLLM's GHSA-rm76-4mrf-v9r8); checksums of payload
are another matter and use xxh3.

An engine's own block hash may stand for the token ids: `KeyChain.of_hashes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, NewType, TypeAlias

import numpy as np
import numpy.typing as npt

BlockKey = NewType("BlockKey", bytes)

#: Token ids as a user has them: a list, a numpy array, or anything that numpy can read.
Tokens: TypeAlias = Sequence[int] | npt.NDArray[np.integer]

KEY_BYTES: Final = 32
DEFAULT_NAMESPACE: Final = "default"


class KeyChain:
    """Makes the keys of one namespace under one layout. Any thread; immutable."""

    __slots__ = ("block_tokens", "root")

    def __init__(
        self,
        fingerprint: bytes,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        salt: bytes = b"",
        block_tokens: int = 16,
    ) -> None:
        self.block_tokens = block_tokens
        head = b"tierkv/root/1" + len(salt).to_bytes(4, "little") + salt
        if namespace != DEFAULT_NAMESPACE:  # tenants with one salt, or none, share nothing either
            name = namespace.encode()
            head += len(name).to_bytes(4, "little") + name
        self.root = BlockKey(hashlib.sha256(head + fingerprint).digest())

    def of_tokens(self, tokens: Tokens, *, parent: BlockKey | None = None) -> list[BlockKey]:
        """The keys of every whole block of `tokens`, first block first.

        `parent` continues a chain. Token ids are 0 .. 2**32 - 1; others raise ValueError.
        """
        packed = pack_tokens(tokens)
        step = 4 * self.block_tokens
        sha256 = hashlib.sha256
        key: bytes = self.root if parent is None else parent
        keys: list[BlockKey] = []
        append = keys.append
        for start in range(0, len(packed) - step + 1, step):
            key = sha256(key + packed[start : start + step]).digest()
            append(BlockKey(key))
        return keys

    def of_hashes(
        self, hashes: Iterable[bytes], *, parent: BlockKey | None = None
    ) -> list[BlockKey]:
        """Keys of blocks that an engine has already hashed; each hash names one block."""
        key: bytes = self.root if parent is None else parent
        keys: list[BlockKey] = []
        for block_hash in hashes:
            # A tag byte keeps engine hashes and token ids apart even where their bytes agree.
            key = hashlib.sha256(b"\x01" + key + block_hash).digest()
            keys.append(BlockKey(key))
        return keys


def pack_tokens(tokens: Tokens) -> bytes:
    """Token ids as little-endian uint32 bytes; ValueError names the first id that does not fit."""
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"token ids must be one row, got shape {array.shape}")
    if array.size == 0:
        return b""
    if array.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers, got dtype {array.dtype}")
    if array.dtype != np.dtype("<u4"):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= 1 << 32:
            raise ValueError(f"token id {low if low < 0 else high} is outside 0..2**32-1")
    return array.astype("<u4", copy=False).tobytes()
