"""What a codec promises.

A codec changes the form in which K and V rest and travel. It works on **rows**: whatever is moved
as one, a hot page or a token's values. Each is encoded alone, so that any row can be moved, dropped
or read without the others. Codes are bytes and a pure function of the row.

A codec may lose precision, and says how much: no value that it gives back is further from the one
it was given than `error_bound`. What it cannot keep that promise for, it refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tierkv.kernels.pages import CodedRows

if TYPE_CHECKING:
    from torch import Tensor, dtype


class PageCodec(Protocol):
    """A codec that a kernel applies while it gathers or spreads blocks; see `Grouped`."""

    def encoded_bytes(self, elements: int, dtype: dtype) -> int:
        """As `Codec.encoded_bytes`."""
        ...

    def encode_blocks(self, blocks: CodedRows) -> None:
        """From rows to memory, in one pass. On a device what is not finite comes back as NaN."""
        ...

    def decode_blocks(self, blocks: CodedRows) -> None:
        """From memory to rows, in one pass."""
        ...


class Codec(Protocol):
    """Stateless; any thread, any device, in the stream that is current."""

    #: The name in the registry, and a part of the layout's identity.
    name: str
    #: A row's length is a multiple of this.
    group: int

    def encoded_bytes(self, elements: int, dtype: dtype) -> int:
        """Bytes of an encoded row of `elements` values; ValueError unless a multiple of `group`."""
        ...

    def encode(self, rows: Tensor) -> Tensor:
        """Encode `rows` (n, elements), any float dtype and strides, to uint8 (n, encoded_bytes).

        Raises ValueError for values that are not finite, unless the codec keeps them.
        """
        ...

    def decode(self, codes: Tensor, elements: int, dtype: dtype) -> Tensor:
        """The inverse: uint8 (n, encoded_bytes), any strides, to `dtype` (n, elements)."""
        ...

    def error_bound(self, rows: Tensor) -> Tensor:
        """Float32 (n, elements): how far each decoded value may be from the one in `rows`."""
        ...
