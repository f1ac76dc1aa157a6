"""One layer's K and V as transformers wants them, and the way to and from canonical blocks.

A `TieredLayer` owns two buffers ``(batch, heads, capacity, head_dim)`` that grow by doubling, and
hands out views of their first `length` tokens; a token that is generated is written in place, so
nothing is concatenated per step.

Canonical bytes of one layer of some blocks, as `tierkv.core.geometry` defines them, are
``(blocks, planes, block_tokens, heads, head_dim)``: `load_blocks` and `save_blocks` move between
the two, one strided copy per plane. Single owner: the thread that runs the model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import CacheLayerMixin

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import KVGeometry, align_up

#: Buffers are sized in steps of this many tokens.
_CAPACITY_STEP_TOKENS = 64


class TieredLayer(CacheLayerMixin):  # type: ignore[misc]
    """A growing K and V buffer of one layer; a transformers cache layer.

    `capacity` is the first size in tokens; the buffers double from there, up to `tokens_max` (the
    model's context) where that is enough. K and V are kept without gradients.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, geometry: KVGeometry, *, capacity: int, tokens_max: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.dtype: torch.dtype = getattr(torch, geometry.dtype)
        self.device = torch.device("cpu")
        self.length = 0
        self._capacity = align_up(max(1, capacity), _CAPACITY_STEP_TOKENS)
        self._tokens_max = tokens_max
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def __repr__(self) -> str:
        return f"TieredLayer(tokens={self.length}, capacity={self._capacity})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers for states of this batch and device; their tokens are not read."""
        self._check(key_states, value_states)
        self._allocate(key_states.shape[0], key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``(batch, heads, tokens, head_dim)`` states; views of all tokens so far.

        The views are good until the next call of any method of this layer.
        """
        self._check(key_states, value_states)
        batch, _heads, tokens, _dim = key_states.shape
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        elif self.length and self._batch != batch:
            # A prefix loaded for one prompt serves every beam or returned sequence of it.
            if self._batch != 1:
                raise GeometryMismatch(f"batch changed from {self._batch} to {batch} rows")
            self.batch_repeat_interleave(batch)
        elif self._batch != batch:
            self._allocate(batch, key_states.device)
        self._reserve(self.length + tokens, key_states.device)
        end = self.length + tokens
        with torch.no_grad():
            for buffer, states in zip(self._owned(), (key_states, value_states), strict=True):
                buffer[:, :, self.length : end].copy_(states)
        self._set_length(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def reserve_blocks(self, blocks: int, block_layer_bytes: int, *, device: torch.device) -> None:
        """Begin empty, batch 1, with room for `blocks` blocks that `load_blocks` will bring."""
        tokens = blocks * self._block_tokens(block_layer_bytes)
        self._capacity = max(self._capacity, align_up(tokens, _CAPACITY_STEP_TOKENS))
        self._allocate(1, device)
        self._set_length(0)

    def load_blocks(self, data: npt.NDArray[np.uint8]) -> None:
        """Append blocks to what was reserved. `data`: uint8 (blocks, block_layer_bytes)."""
        tokens_per_block = self._block_tokens(data.shape[1])
        start, tokens = self.length, len(data) * tokens_per_block
        shape = (self.geometry.heads, len(data), tokens_per_block, self.geometry.head_dim)
        blocks = self._as_blocks(data)
        for plane, buffer in enumerate(self._owned()):
            target = buffer[0, :, start : start + tokens].view(shape)
            target.copy_(blocks[:, plane].permute(2, 0, 1, 3))
        self._set_length(start + tokens)

    def save_blocks(self, first_block: int, out: npt.NDArray[np.uint8]) -> None:
        """Write blocks from `first_block` on into `out`: uint8 (blocks, block_layer_bytes).

        The first row of the batch is what is written; the blocks must lie within the length.
        """
        tokens_per_block = self._block_tokens(out.shape[1])
        start = first_block * tokens_per_block
        end = start + len(out) * tokens_per_block
        assert end <= self.length, f"{end} tokens asked of {self.length}"
        blocks = self._as_blocks(out)
        for plane, buffer in enumerate(self._owned()):
            shape = (self.geometry.heads, len(out), tokens_per_block, self.geometry.head_dim)
            source = buffer[0, :, start:end].view(shape)
            blocks[:, plane].copy_(source.permute(1, 2, 0, 3))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length of K seen by the next `query_length` tokens, offset of its first token)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """No bound of its own: -1."""
        return -1

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self._set_length(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; the sign is as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        self._set_length(max(0, self.length + tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the batch what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self._buffers is not None:
            rows = torch.arange(self._batch).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self._buffers is None:
            return
        old, length = self._buffers, self.length
        rows = indices.to(self.device)
        chosen = [buffer[:, :, :length][rows] for buffer in old]
        self._allocate(len(chosen[0]), self.device)
        self._fill(chosen, length)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        wanted = (self.geometry.heads, self.geometry.head_dim, self.dtype)
        for name, states in (("K", key_states), ("V", value_states)):
            found = (states.shape[1], states.shape[3], states.dtype)
            if found != wanted:
                raise GeometryMismatch(
                    f"this model caches {name} as (heads, head_dim, dtype) {found}, but its"
                    f" configuration says {wanted}"
                )

    @property
    def _batch(self) -> int:
        return self._owned()[0].shape[0]

    def _owned(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._buffers is not None, "the layer has no buffers yet"
        return self._buffers

    def _allocate(self, batch: int, device: torch.device) -> None:
        shape = (batch, self.geometry.heads, self._capacity, self.geometry.head_dim)
        # Normal tensors even under inference_mode, so that a later call outside it may write.
        with torch.inference_mode(mode=False):
            key = torch.empty(shape, dtype=self.dtype, device=device)
            self._buffers = (key, torch.empty_like(key))
        self.device = device
        self.is_initialized = True
        self._set_length(0)

    def _reserve(self, tokens: int, device: torch.device) -> None:
        """Make room for `tokens` in total on `device`, keeping what is held."""
        if tokens <= self._capacity and self.device == device:
            return
        if tokens > self._capacity:
            doubled = max(tokens, 2 * self._capacity)
            bounded = min(doubled, self._tokens_max) if tokens <= self._tokens_max else doubled
            self._capacity = align_up(bounded, _CAPACITY_STEP_TOKENS)
        old, length, batch = self._owned(), self.length, self._batch
        self._allocate(batch, device)
        self._fill([buffer[:, :, :length] for buffer in old], length)

    def _fill(self, states: list[torch.Tensor], length: int) -> None:
        with torch.no_grad():
            for buffer, old in zip(self._owned(), states, strict=True):
                buffer[:, :, :length].copy_(old)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.length = length
        if self._buffers is not None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _block_tokens(self, block_layer_bytes: int) -> int:
        return block_layer_bytes // self.geometry.token_layer_bytes

    def _as_blocks(self, data: npt.NDArray[np.uint8]) -> torch.Tensor:
        """The same memory as (blocks, planes, block_tokens, heads, head_dim) elements."""
        shape = (
            len(data),
            2,
            self._block_tokens(data.shape[1]),
            self.geometry.heads,
            self.geometry.head_dim,
        )
        return torch.from_numpy(data).view(self.dtype).view(shape)
