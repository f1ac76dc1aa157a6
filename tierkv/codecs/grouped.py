"""Int8 and int4 with one scale for each group of values: plain symmetric rounding.

Of each group of 64 values the largest magnitude becomes the largest code, and every value the
nearest multiple of ``scale = largest / codes_max``. An encoded row is the codes of all its values,
then its scales as little-endian float32; int4 keeps two codes a byte, the first in the low half,
stored as ``code + 8``. The scale is float32 because bfloat16 values may be as large as float32's.

The torch reference of the fused kernels in `kernels/triton_pages.py`: they give these bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from tierkv.kernels.pages import CodedRows, has_kernels

if TYPE_CHECKING:
    from torch import Tensor, dtype

#: Values that share a scale: with heads of 64, 128 or 256 values no group spans two of them.
GROUP = 64
_SCALE_BYTES = 4
#: The least scale: below it float32 has no full precision, and such values are noise.
_SCALE_MIN = 2.0**-126


class Grouped(ABC):
    """What both widths share; a width packs its codes."""

    name: str
    code_bits: int
    group = GROUP

    @property
    def codes_max(self) -> int:
        """The largest code; the smallest is its negative."""
        return (1 << (self.code_bits - 1)) - 1

    def encoded_bytes(self, elements: int, dtype: dtype) -> int:
        return self._code_bytes(elements) + elements // GROUP * _SCALE_BYTES

    def encode(self, rows: Tensor) -> Tensor:
        import torch

        groups = self._groups(rows)
        if not bool(torch.isfinite(groups).all()):
            raise ValueError(f"{self.name} cannot encode values that are not finite")
        scale = self._scale(groups)
        codes = torch.round(groups / scale).clamp_(-self.codes_max, self.codes_max)
        packed = self._pack(codes.reshape(len(rows), -1).to(torch.int8))
        scales = scale.reshape(len(rows), -1).contiguous().view(torch.uint8)
        return torch.cat((packed, scales), dim=1)

    def decode(self, codes: Tensor, elements: int, dtype: dtype) -> Tensor:
        import torch

        width = self._code_bytes(elements)
        values = self._unpack(codes[:, :width]).float().reshape(len(codes), -1, GROUP)
        scale = codes[:, width:].contiguous().view(torch.float32)[..., None]
        limit = torch.finfo(dtype).max
        return (values * scale).clamp_(-limit, limit).reshape(len(codes), elements).to(dtype)

    def encode_blocks(self, blocks: CodedRows) -> None:
        if has_kernels(blocks.rows, blocks.memory):
            from tierkv.kernels.triton_pages import launch_encode

            launch_encode(blocks, group=GROUP, bits=self.code_bits)
            return
        width = self.encoded_bytes(blocks.rows.shape[1], blocks.rows.dtype)
        for numbers, at in blocks.by_layer(width):
            blocks.memory[at] = self.encode(blocks.rows[numbers])

    def decode_blocks(self, blocks: CodedRows) -> None:
        rows = blocks.rows
        if has_kernels(rows, blocks.memory):
            from tierkv.kernels.triton_pages import launch_decode

            launch_decode(blocks, group=GROUP, bits=self.code_bits)
            return
        width = self.encoded_bytes(rows.shape[1], rows.dtype)
        for numbers, at in blocks.by_layer(width):
            rows[numbers] = self.decode(blocks.memory[at], rows.shape[1], rows.dtype)

    def error_bound(self, rows: Tensor) -> Tensor:
        """Half a step of the group's scale, and the rounding of the result to the rows' dtype."""
        import torch

        groups = self._groups(rows)
        scale = self._scale(groups)
        half = scale * (0.5 + self.codes_max * 2.0**-22)  # float32's own rounding of the quotient
        info = torch.finfo(rows.dtype)
        final = (groups.abs() + half) * info.eps + info.smallest_normal * info.eps
        return (half + final).reshape(rows.shape)

    def _groups(self, rows: Tensor) -> Tensor:
        self._code_bytes(rows.shape[1])
        return rows.float().reshape(len(rows), -1, GROUP)

    def _scale(self, groups: Tensor) -> Tensor:
        return (groups.abs().amax(dim=2, keepdim=True) / self.codes_max).clamp_(min=_SCALE_MIN)

    def _code_bytes(self, elements: int) -> int:
        if elements % GROUP or elements < 1:
            raise ValueError(
                f"{self.name} encodes rows of {GROUP} values or a multiple, not {elements}"
            )
        return elements * self.code_bits // 8

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor:
        """Int8 (n, values) to the bytes of their codes, uint8."""

    @abstractmethod
    def _unpack(self, packed: Tensor) -> Tensor:
        """The inverse."""


class Int8(Grouped):
    """A byte a value: 1.06 bytes with its share of the scale."""

    name = "int8"
    code_bits = 8

    def _pack(self, codes: Tensor) -> Tensor:
        import torch

        return codes.view(torch.uint8)

    def _unpack(self, packed: Tensor) -> Tensor:
        import torch

        return packed.contiguous().view(torch.int8)


class Int4(Grouped):
    """Half a byte a value: 0.56 bytes with its share of the scale."""

    name = "int4"
    code_bits = 4

    def _pack(self, codes: Tensor) -> Tensor:
        import torch

        halves = (codes + 8).view(torch.uint8)
        return halves[:, 0::2] | (halves[:, 1::2] << 4)

    def _unpack(self, packed: Tensor) -> Tensor:
        import torch

        halves = torch.stack((packed & 15, packed >> 4), dim=2).reshape(len(packed), -1)
        return halves.to(torch.int8) - 8
