"""Raw: the bytes as they are, whatever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Raw:
    """No loss, no gain; also the only codec for values that are not finite."""

    name = "raw"
    group = 1

    def encoded_bytes(self, elements: int, dtype: dtype) -> int:
        return elements * dtype.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        import torch

        return rows.contiguous().view(torch.uint8)

    def decode(self, codes: Tensor, elements: int, dtype: dtype) -> Tensor:
        return codes.contiguous().view(dtype)[:, :elements]

    def error_bound(self, rows: Tensor) -> Tensor:
        import torch

        return torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
