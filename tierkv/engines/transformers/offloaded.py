"""Offloaded decode: K and V of every layer stay in host memory, two layers of them on the device.

A step goes through the layers in order, and needs one at a time. The `Workbench` has two **slots**
on the model's device; while layer i computes out of one, the past of layer i + 1 is copied into the
other, so the device holds two layers whatever the length of the text is, and the copy costs time
only where it takes longer than the layer does. An `OffloadedLayer`'s past is in two parts::

    [0, base)        blocks of the store, leased: they stay in its host memory, for all rows
    [base, length)   the tail: what was computed since, in (page-locked) buffers of the layer

Order on CUDA, by events and never by waiting: a slot is filled on a side stream after all that the
compute stream had to do when it was asked for, which is behind the layer that used the slot before;
the compute stream waits for the fill before it uses the slot. On a CPU the same calls copy at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import CacheLayerMixin

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import align_up
from tierkv.engines.kv_buffer import BlockForm, TieredLayer, copy_blocks

__all__ = ["OffloadedLayer", "Workbench"]

_SLOT_STEP_TOKENS = 256

#: Gives a layer's blocks by its number, in order: uint8 (blocks, block_layer_bytes) each.
LayerBlocks: TypeAlias = Callable[[int], Sequence[npt.NDArray[np.uint8]]]


def _no_blocks(_number: int) -> Sequence[npt.NDArray[np.uint8]]:
    return ()


class Workbench:
    """The two slots on `device`, and which layer's past is in which. Single owner."""

    def __init__(self, form: BlockForm, device: torch.device) -> None:
        self.device = device
        # Weakly, as they know their bench, and K and V are to go when their cache does.
        self.layers: list[weakref.ref[OffloadedLayer]] = []
        #: How often a layer's past was there when its turn came, and how often it was not.
        self.ready = self.late = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = (_Slot(form, device, self._stream), _Slot(form, device, self._stream))

    @property
    def held_bytes(self) -> int:
        """Bytes of both slots: two layers of the text, and room for it to grow."""
        return sum(slot.held_bytes for slot in self._slots)

    def take(self, layer: OffloadedLayer, rows: int, more: int) -> _Slot:
        """A slot with the past of `layer` in `rows` rows, and room for `more` tokens behind it."""
        slot = self._slot_of(layer, rows)
        if slot is None:
            self.late += 1
            slot = self._slots[layer.number % 2]
            self._fill(slot, layer, rows, more)
        else:
            self.ready += 1
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        slot.reserve(rows, layer.get_seq_length() + more, keep=layer.get_seq_length())
        return slot

    def fetch_after(self, layer: OffloadedLayer, slot: _Slot, rows: int) -> None:
        """Begin to bring the past of the layer after `layer` into the slot that is not `slot`."""
        coming = self.layers[(layer.number + 1) % len(self.layers)]()
        if coming is None or coming is layer:
            return
        coming.fit(rows)
        if self._slot_of(coming, rows) is None:
            other = self._slots[slot is self._slots[0]]
            self._fill(other, coming, rows, 1)

    def synchronize(self) -> None:
        """Wait until no copy out of host memory is under way."""
        if self._stream is not None:
            self._stream.synchronize()

    def _slot_of(self, layer: OffloadedLayer, rows: int) -> _Slot | None:
        wanted = layer.stamp(rows)
        return next((slot for slot in self._slots if slot.holds == wanted), None)

    def _fill(self, slot: _Slot, layer: OffloadedLayer, rows: int, more: int) -> None:
        tokens = layer.get_seq_length()
        side: AbstractContextManager[object] = nullcontext()
        slot.reserve(rows, tokens + more, keep=0)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            side = torch.cuda.stream(self._stream)
        with side, torch.no_grad():
            layer.copy_past(slot.views(0, tokens))
        slot.holds = layer.stamp(rows)


class _Slot:
    """K and V of one layer on the device; `holds` is the stamp of the layer they are of."""

    def __init__(
        self, form: BlockForm, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self.holds: tuple[int, ...] = ()
        self._form = form
        self._device = device
        self._stream = stream
        self._buffers: tuple[torch.Tensor, ...] = ()

    @property
    def held_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def reserve(self, rows: int, tokens: int, *, keep: int) -> None:
        """Have room for `tokens` of `rows`; the first `keep` tokens stay."""
        old = self._buffers
        if old and old[0].shape[0] == rows and old[0].shape[2] >= tokens:
            return
        capacity = align_up(tokens, _SLOT_STEP_TOKENS)
        heads = self._form.geometry.heads
        with torch.inference_mode(mode=False):
            self._buffers = tuple(
                torch.empty(
                    (rows, heads, capacity, dim), dtype=self._form.dtype, device=self._device
                )
                for dim in self._form.dims
            )
        for number, buffer in enumerate(self._buffers):
            if self._stream is not None:
                buffer.record_stream(self._stream)
            if keep:
                with torch.no_grad():
                    buffer[:, :, :keep].copy_(old[number][:, :, :keep])

    def views(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens start..end."""
        key, value = self._buffers
        return key[:, :, start:end], value[:, :, start:end]


class OffloadedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A transformers cache layer whose K and V are in host memory; see the module.

    `number` is its place among the layers. One leased base serves all rows, so it is only for rows
    of one prompt.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, number: int, tail: TieredLayer, bench: Workbench) -> None:
        super().__init__()
        self.number = number
        self.tail = tail
        self.form = tail.form
        self.window = tail.window
        self.is_sliding = tail.is_sliding
        self.is_initialized = True
        self.base_tokens = 0
        self._base: LayerBlocks = _no_blocks
        self._changes = 0
        self._bench = bench
        bench.layers.append(weakref.ref(self))

    def __repr__(self) -> str:
        return f"OffloadedLayer(leased={self.base_tokens}, computed={self.tail.get_seq_length()})"

    # ---- what transformers asks of a layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to do ahead."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``(rows, heads, tokens, dim)`` states; views of the tokens that they may see.

        The views are good until the next layer but one is updated.
        """
        self.form.check(key_states, value_states)
        rows, tokens = key_states.shape[0], key_states.shape[2]
        self.fit(rows)
        start, first = self.get_seq_length(), self.first_seen
        slot = self._bench.take(self, rows, tokens)
        with torch.no_grad():
            news = slot.views(start, start + tokens)
            for new, states in zip(news, (key_states, value_states), strict=True):
                new.copy_(states)
        self.tail.append(key_states, value_states, device=torch.device("cpu"))
        slot.holds = self.stamp(rows)
        self._bench.fetch_after(self, slot, rows)
        return slot.views(first, start + tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that the next `query_length` tokens get to see, number of the first of them)."""
        first = self.first_seen
        return self.get_seq_length() - first + query_length, first

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.base_tokens + self.tail.get_seq_length()

    def get_max_length(self) -> int:
        """No bound of its own: -1."""
        return -1

    def offload(self) -> None:
        """It is."""

    def prefetch(self) -> None:
        """The workbench does."""

    def reset(self) -> None:
        """Forget every token."""
        self._changes += 1
        self.base_tokens, self._base = 0, _no_blocks
        self.tail.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; the sign is as transformers has it."""
        left = self.get_seq_length() + min(0, tokens_to_remove)
        if tokens_to_remove > 0 or left >= self.base_tokens:
            self.tail.crop(tokens_to_remove)
        else:
            self._cut_base(max(0, left))
        self._changes += 1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the batch what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._changes += 1
        self.tail.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._changes += 1
        self.tail.batch_select_indices(indices)

    # ---- what the cache and the workbench ask of a layer

    @property
    def first_seen(self) -> int:
        """The number of the first token that the next query sees."""
        return 0 if self.window is None else max(0, self.get_seq_length() - self.window + 1)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before there are buffers."""
        return self.tail.rows

    def fit(self, rows: int) -> None:
        """Have `rows` rows: a prefix loaded for a prompt serves every beam of it."""
        if self.tail.get_seq_length() and (held := self.tail.rows) != rows:
            if rows % held:
                raise GeometryMismatch(f"batch changed from {held} to {rows} rows")
            self.batch_repeat_interleave(rows // held)

    def stamp(self, rows: int) -> tuple[int, ...]:
        """What a slot has to hold to be this layer as it is now."""
        return self.number, self._changes, self.get_seq_length(), rows

    def copy_past(self, target: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Copy all tokens held to the device: K and V (rows, heads, length, dim)."""
        start = 0
        for data in self._base(self.number) if self.base_tokens else ():
            tokens = data.size // self.form.geometry.token_layer_bytes
            end = min(self.base_tokens, start + tokens)
            blocks = torch.from_numpy(data).to(target[0].device, non_blocking=True)
            for planes, out in zip(self.form.planes(blocks), target, strict=True):
                copy_blocks(planes, out[:, :, start:end])
            start = end
        if self.tail.get_seq_length():
            for states, out in zip(self.tail.views(), target, strict=True):
                out[:, :, self.base_tokens :].copy_(states, non_blocking=True)

    def lease(self, blocks: LayerBlocks, tokens: int) -> None:
        """Have the first `tokens` in what `blocks` gives, and no longer in buffers of the layer.

        It is asked at every step, so that no view of the store's memory outlives one.
        """
        self.tail.drop_front(min(tokens - self.base_tokens, self.tail.get_seq_length()))
        self._base, self.base_tokens = blocks, tokens

    def reserve(self, rows: int, tokens: int, *, device: torch.device) -> None:
        """As `TieredLayer.reserve`, in host memory."""
        self.tail.reserve(rows, tokens, device=torch.device("cpu"))

    def load_blocks(
        self, data: npt.NDArray[np.uint8], start: int, tokens: int, *, row: int = 0
    ) -> None:
        """As `TieredLayer.load_blocks`."""
        self.tail.load_blocks(data, start, tokens, row=row)

    def blank(self, tokens: int, *, row: int) -> None:
        """As `TieredLayer.blank`."""
        self.tail.blank(tokens, row=row)

    def hold(self, tokens: int) -> None:
        """As `TieredLayer.hold`."""
        self.tail.hold(tokens - self.base_tokens)

    def save_blocks(self, start: int, out: npt.NDArray[np.uint8], *, row: int = 0) -> None:
        """As `TieredLayer.save_blocks`; blocks of the base are the store's already."""
        assert start >= self.base_tokens, f"{start} is in the base of {self.base_tokens} tokens"
        self.tail.save_blocks(start - self.base_tokens, out, row=row)

    def _cut_base(self, tokens: int) -> None:
        """Keep `tokens` of the base; what is not a whole block of them begins a new tail."""
        rows = max(1, self.tail.rows)
        data = np.concatenate(self._base(self.number))
        whole, rest = divmod(tokens, data.shape[1] // self.form.geometry.token_layer_bytes)
        self.tail.reserve(rows, rest, device=torch.device("cpu"))
        for row in range(rows if rest else 0):
            self.tail.load_blocks(data[whole : whole + 1], 0, rest, row=row)
        self.base_tokens = tokens - rest
        self.tail.hold(rest)
