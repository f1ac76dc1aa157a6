"""Gather and scatter of hot pages, over a pool and a vector of page numbers (torch reference).

Shapes: `pool` uint8 (pages, page_bytes); `numbers` int64 (n,) on the pool's device; `rows` uint8
(n, page_bytes), contiguous. A page number may repeat in a gather, never in a scatter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gather_pages(pool: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """rows[i] = pool[numbers[i]], on the current stream."""
    import torch

    torch.index_select(pool, 0, numbers, out=rows)


def scatter_pages(pool: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """pool[numbers[i]] = rows[i], on the current stream; changes `pool`."""
    pool.index_copy_(0, numbers, rows)
