"""Memory: copies KV bytes between a caller's arrays and the memory tiers, on the calling thread.

KV bytes cross the store's interface as uint8 ``(layers, blocks, block_layer_bytes)``, any strides:
numpy arrays, or torch tensors on any device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import PagePlan
from tierkv.core.tier import Span, TierId
from tierkv.plan.events import Fill
from tierkv.plan.leases import Located
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.host import HostTier

if TYPE_CHECKING:
    from torch import Tensor

Bytes: TypeAlias = npt.NDArray[np.uint8]
#: KV bytes as a caller has them.
Rows: TypeAlias = "Bytes | Tensor"


class Memory:
    """The host tier, and the device tier where there is one. Any thread, on disjoint places."""

    def __init__(self, plan: PagePlan, host: HostTier, device: DeviceTier | None) -> None:
        self.plan = plan
        self.host = host
        self.device = device
        self._rows_shape = (plan.layers, plan.block_layer_bytes)

    def rows_of(self, data: Rows) -> Rows:
        """`data` in the store's terms: a numpy array, or a tensor of a device.

        Raises GeometryMismatch for another shape or dtype.
        """
        if (
            isinstance(data, np.ndarray)
            and data.ndim == 3
            and data.dtype == np.uint8
            and data.shape[::2] == self._rows_shape
        ):
            return data
        plan, shape = self.plan, tuple(data.shape)
        if len(shape) != 3 or shape[::2] != self._rows_shape:
            raise GeometryMismatch(
                f"KV bytes must be (layers={plan.layers}, blocks, block_layer_bytes="
                f"{plan.block_layer_bytes}), got {shape}"
            )
        dtype = str(data.dtype).removeprefix("torch.")
        if dtype != "uint8":
            raise GeometryMismatch(f"KV bytes must be uint8, got {dtype}; view them as bytes")
        if isinstance(data, np.ndarray) or data.device.type != "cpu":
            return data
        return data.numpy()

    def fill(self, fill: Fill, rows: Rows) -> None:
        """Write what a `Fill` asks for; `rows` are the blocks that were offered."""
        for page, opening in fill.fresh:
            self.host.clear(page, opening)
        spans = _spans_in_rows(fill)
        if fill.tier is TierId.HOST:
            self.host.write(spans, rows if isinstance(rows, np.ndarray) else rows.cpu().numpy())
        else:
            assert self.device is not None
            self.device.write(spans, rows)

    def copy_out(self, parts: Iterable[Located], out: Rows) -> int:
        """Copy located blocks to ``out[:, :n]``; gives n."""
        delivered = 0
        for tier, spans in parts:
            if tier is TierId.DEVICE:
                assert self.device is not None
                self.device.read(spans, out)
            elif isinstance(out, np.ndarray):
                self.host.read(spans, out)
            else:
                self._to_tensor(spans, out)
            last = spans[-1]
            delivered = last.index + last.count
        return delivered

    def _to_tensor(self, spans: Iterable[Span], out: Tensor) -> None:
        import torch

        for index, page, offset, count in spans:
            view = torch.from_numpy(self.host.blocks[page, :, offset : offset + count])
            out[:, index : index + count].copy_(view)


def _spans_in_rows(fill: Fill) -> list[Span]:
    """The spans of a fill, counted in the offered blocks instead of in those to be written."""
    indices = fill.indices
    first = indices[0]
    if indices[-1] - first + 1 == len(indices):
        return [s._replace(index=s.index + first) for s in fill.spans] if first else fill.spans
    spans: list[Span] = []
    for index, page, offset, count in fill.spans:
        start = index
        for stop in range(index + 1, index + count + 1):
            if stop == index + count or indices[stop] != indices[stop - 1] + 1:
                spans.append(Span(indices[start], page, offset + start - index, stop - start))
                start = stop
    return spans
