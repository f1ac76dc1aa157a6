"""Chains of blocks that are made here: of new content, or of content that is known by pieces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

_ODD: Final = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_APART: Final = 1 << 62  # no id from elsewhere that counts up gets there


class BlockSource(Protocol):
    """Gives out ids of blocks that were never seen."""

    block_tokens: int

    def new_blocks(self, count: int) -> NDArray[np.int64]:
        """So many of them."""


class History:
    """The blocks of one thread, as ids that no other content has; the last may be partial."""

    __slots__ = ("_ids", "count", "tokens")

    def __init__(self) -> None:
        self._ids = np.empty(256, dtype=np.int64)
        self.count = 0
        self.tokens = 0

    def ids(self) -> NDArray[np.int64]:
        """The blocks as they are now; valid until the history changes."""
        return self._ids[: self.count]

    def set_ids(self, ids: NDArray[np.int64], tokens: int) -> None:
        """Become another history."""
        self.count = 0
        self._append(ids)
        self.tokens = tokens

    def _append(self, ids: NDArray[np.int64]) -> None:
        need = self.count + len(ids)
        if need > len(self._ids):
            longer = np.empty(2 * need, dtype=np.int64)
            longer[: self.count] = self._ids[: self.count]
            self._ids = longer
        self._ids[self.count : need] = ids
        self.count = need

    def grow(self, source: BlockSource, tokens: int) -> None:
        """Append so many new tokens; a partial last block becomes another."""
        self.count = min(self.count, self.tokens // source.block_tokens)
        self.tokens += tokens
        self._append(source.new_blocks(-(-self.tokens // source.block_tokens) - self.count))

    def keep(self, source: BlockSource, blocks: int) -> None:
        """Forget all but the first `blocks` whole blocks."""
        self.count = min(blocks, self.tokens // source.block_tokens)
        self.tokens = self.count * source.block_tokens


def chained_ids(pieces: Iterable[tuple[int, int]], block_tokens: int) -> NDArray[np.int64]:
    """Ids of the blocks of (content id, tokens) pieces in this order; the last may be partial.

    A block is named by all pieces that begin before its end, and by its place: 62 bits of
    xxh3-64, so that among a thousand million blocks two are confused with a chance of 1 in 10.
    """
    digest = xxhash.xxh3_64()
    ids: list[int] = []
    place = end = 0
    for content, tokens in pieces:
        if tokens <= 0:
            continue
        digest.update(content.to_bytes(8, "little", signed=True))
        digest.update(tokens.to_bytes(8, "little"))
        place += tokens
        name = digest.intdigest()
        while end + block_tokens <= place:
            end += block_tokens
            ids.append(_mixed(name, end))
    if end < place:
        ids.append(_mixed(digest.intdigest(), end + block_tokens))
    return np.array(ids, dtype=np.int64)


def id_of(data: bytes) -> int:
    """The id of something known by a string of bytes, as a hash of another program: xxh3-64."""
    return xxhash.xxh3_64_intdigest(data) - (1 << 63)


def _mixed(name: int, place: int) -> int:
    return ((name ^ (place * _ODD)) & (_APART - 1)) | _APART
