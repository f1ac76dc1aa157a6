"""Gather and scatter of hot pages, over a pool and a vector of page numbers.

The torch reference, and on a CUDA device the Triton kernels of `triton_pages`.

Shapes: `pool` uint8 (pages, page_bytes); `numbers` int64 (n,) on the pool's device; `rows` uint8
(n, page_bytes), contiguous. A page number may repeat in a gather, never in a scatter.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from tierkv.kernels.relayout import PROGRAMS

if TYPE_CHECKING:
    from torch import Tensor

#: What a thread of the kernels moves at a time.
_VECTOR_BYTES: Final = 16


def gather_pages(pool: Tensor, numbers: Tensor, rows: Tensor, *, programs: int = PROGRAMS) -> None:
    """rows[i] = pool[numbers[i]], on the current stream; `programs` bounds what a device gives."""
    if has_kernels(pool, rows):
        from tierkv.kernels.triton_pages import launch_copy

        launch_copy(pool, numbers, rows, gather=True, programs=programs)
        return
    import torch

    torch.index_select(pool, 0, numbers, out=rows)


def scatter_pages(pool: Tensor, numbers: Tensor, rows: Tensor, *, programs: int = PROGRAMS) -> None:
    """pool[numbers[i]] = rows[i], on the current stream; changes `pool`."""
    if has_kernels(pool, rows):
        from tierkv.kernels.triton_pages import launch_copy

        launch_copy(pool, numbers, rows, gather=False, programs=programs)
        return
    pool.index_copy_(0, numbers, rows)


def has_kernels(pool: Tensor, *others: Tensor) -> bool:
    """Whether the kernels serve this memory: on CUDA, contiguous, pages of whole vectors."""
    if not pool.is_cuda or pool.shape[1] * pool.element_size() % _VECTOR_BYTES:
        return False
    contiguous = all(memory.is_contiguous() for memory in (pool, *others))
    return contiguous and find_spec("triton") is not None
