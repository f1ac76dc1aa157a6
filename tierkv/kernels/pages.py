"""Gather and scatter of hot pages, over a pool and a vector of page numbers.

The torch reference, and on a CUDA device the Triton kernels of `triton_pages`.

Shapes: `pool` uint8 (pages, page_bytes); `numbers` int64 (n,) on the pool's device; `rows` uint8
(n, page_bytes), contiguous. A page number may repeat in a gather, never in a scatter.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, NamedTuple

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


class CodedRows(NamedTuple):
    """Rows of a float pool, and where in memory their codes lie; a row is a layer of a block.

    `rows`: float (rows, values), contiguous. `memory`: flat uint8. `numbers`, `places`: int64 (n,),
    the first row of each block and the byte where its codes begin. Those of layer i are row
    ``numbers + i`` and byte ``places + i * layer_bytes``; with 0 memory holds one layer only.
    """

    rows: Tensor
    numbers: Tensor
    memory: Tensor
    places: Tensor
    layers: range = range(1)
    layer_bytes: int = 0

    def by_layer(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each layer the rows, and the bytes of their codes: (n,) and (n, width)."""
        import torch

        for layer in self.layers:
            first = self.places + layer * self.layer_bytes
            yield self.numbers + layer, first[:, None] + torch.arange(width, device=first.device)


def has_kernels(pool: Tensor, *others: Tensor) -> bool:
    """Whether the kernels serve this memory: on CUDA, contiguous, pages of whole vectors."""
    if not pool.is_cuda or pool.shape[1] * pool.element_size() % _VECTOR_BYTES:
        return False
    contiguous = all(memory.is_contiguous() for memory in (pool, *others))
    return contiguous and find_spec("triton") is not None
