"""One layer's K and V as transformers wants them, and the way to and from canonical blocks.

A `TieredLayer` owns two buffers ``(rows, heads, capacity, dim)`` that grow by doubling, and hands
out views of the tokens it holds; a token that is generated is written in place, so nothing is
concatenated per step. A layer with a window hands out the end of them that its queries may see, as
transformers' own does, and keeps the rest: it can be cropped, and put into the store, at any token.

`BlockForm` knows the canonical bytes of one layer of some blocks, as `tierkv.core.geometry` defines
them: a K plane ``(block_tokens, heads, head_dim)``, then a V plane; or one latent plane (MLA), of
which transformers takes the compressed part for K and the rotated part for V. Single owner: the
thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import CacheLayerMixin

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import Form, KVGeometry, align_up

#: Buffers are sized in steps of this many tokens.
_CAPACITY_STEP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class BlockForm:
    """How K and V of one layer lie in a block. `rotated_dim`: a latent's last elements, "V"."""

    geometry: KVGeometry
    rotated_dim: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        found: torch.dtype = getattr(torch, self.geometry.dtype)
        return found

    @property
    def dims(self) -> tuple[int, int]:
        """Elements of a head of K, and of V."""
        geometry = self.geometry
        if geometry.form is Form.LATENT:
            return geometry.head_dim - self.rotated_dim, self.rotated_dim
        return geometry.head_dim, geometry.value_dim or geometry.head_dim

    def planes(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, views (blocks, tokens, heads, dim) of uint8 (blocks, block_layer_bytes)."""
        geometry, (key_dim, value_dim) = self.geometry, self.dims
        blocks, tokens = len(data), data.shape[1] // geometry.token_layer_bytes
        flat = data.view(self.dtype)
        if geometry.form is Form.LATENT:
            latent = flat.view(blocks, tokens, 1, geometry.head_dim)
            return latent[..., :key_dim], latent[..., key_dim:]
        end = tokens * geometry.heads * key_dim
        key = flat[:, :end].view(blocks, tokens, geometry.heads, key_dim)
        return key, flat[:, end:].view(blocks, tokens, geometry.heads, value_dim)

    def check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """GeometryMismatch for states of another shape or dtype than blocks have."""
        for name, states, dim in zip("KV", (key_states, value_states), self.dims, strict=True):
            found = (states.shape[1], states.shape[3], states.dtype)
            if found != (wanted := (self.geometry.heads, dim, self.dtype)):
                raise GeometryMismatch(
                    f"this model caches {name} as (heads, head_dim, dtype) {found}, but its"
                    f" layout says {wanted}"
                )


def copy_blocks(planes: torch.Tensor, target: torch.Tensor) -> None:
    """Copy the first tokens of blocks (blocks, block_tokens, heads, dim) to where they belong.

    `target`: (heads, tokens, dim) of one row, or (rows, heads, tokens, dim) of rows that are alike.
    """
    step, tokens = planes.shape[1], target.shape[-2]
    whole, rest = divmod(tokens, step)
    by_head = planes.permute(2, 0, 1, 3)
    front = target[..., : whole * step, :].unflatten(-2, (whole, step))
    front.copy_(by_head[:, :whole])
    if rest:
        target[..., whole * step :, :].copy_(by_head[:, whole, :rest])


class TieredLayer(CacheLayerMixin):  # type: ignore[misc]
    """A growing K and V buffer of one layer; a transformers cache layer.

    `capacity` is the first size in tokens; the buffers double from there, up to `tokens_max` (the
    model's context) where that is enough. `window`: tokens that a query sees, itself with them, or
    None for all. `is_pinned`: page-locked host buffers. K and V are kept without gradients.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        form: BlockForm,
        *,
        capacity: int,
        tokens_max: int,
        window: int | None = None,
        is_pinned: bool = False,
    ) -> None:
        super().__init__()
        self.form = form
        self.dtype = form.dtype
        self.device = torch.device("cpu")
        self.window = window
        self.is_sliding = window is not None
        self._length = 0
        self._capacity = align_up(max(1, capacity), _CAPACITY_STEP_TOKENS)
        self._tokens_max = tokens_max
        self._is_pinned = is_pinned
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.get_seq_length()}, capacity={self._capacity})"

    # ---- what transformers asks of a layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers for states of this batch and device; their tokens are not read."""
        self.form.check(key_states, value_states)
        self._allocate(key_states.shape[0], key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``(rows, heads, tokens, dim)`` states; views of the tokens that they may see.

        The views are good until the next call of any method of this layer.
        """
        self.form.check(key_states, value_states)
        first = self.first_seen
        self.append(key_states, value_states, device=key_states.device)
        key, value = self.views()
        return key[:, :, first:], value[:, :, first:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that the next `query_length` tokens get to see, number of the first of them)."""
        first = self.first_seen
        return self.get_seq_length() - first + query_length, first

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._length

    def get_max_length(self) -> int:
        """No bound of its own: -1."""
        return -1

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.hold(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; the sign is as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        self.hold(max(0, self.get_seq_length() + tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the batch what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self._buffers is not None:
            self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self._buffers is None:
            return
        self._wait()
        length, rows = self.get_seq_length(), indices.to(self.device)
        chosen = [states[rows] for states in self.views()]
        if len(rows) != self.rows:
            self._allocate(len(rows), self.device)
        self._fill(chosen, length)

    # ---- what the cache asks of a layer

    @property
    def first_seen(self) -> int:
        """The number of the first token that the next query sees."""
        return 0 if self.window is None else max(0, self.get_seq_length() - self.window + 1)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before there are buffers."""
        return 0 if self._buffers is None else self._buffers[0].shape[0]

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers or ())

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of every token held, (rows, heads, length, dim), without a copy."""
        (key, value), length = self._owned(), self.get_seq_length()
        return key[:, :, :length], value[:, :, :length]

    def append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *, device: torch.device
    ) -> None:
        """Keep states behind those that are held, on `device`."""
        rows, _heads, tokens, _dim = key_states.shape
        length = self.get_seq_length()
        if length and self.rows != rows:
            # A prefix loaded for a prompt serves every beam or returned sequence of it.
            if rows % self.rows:
                raise GeometryMismatch(f"batch changed from {self.rows} to {rows} rows")
            self.batch_repeat_interleave(rows // self.rows)
        elif self.rows != rows:
            self._allocate(rows, device)
        end = length + tokens
        self._reserve(end, device)
        with torch.no_grad():
            for buffer, states in zip(self._owned(), (key_states, value_states), strict=True):
                buffer[:, :, length:end].copy_(states, non_blocking=self._is_pinned)
        self.hold(end)

    def reserve(self, rows: int, tokens: int, *, device: torch.device) -> None:
        """Begin empty, with room for `tokens` that `load_blocks` will bring."""
        self._capacity = max(self._capacity, align_up(tokens, _CAPACITY_STEP_TOKENS))
        self._allocate(rows, device)

    def load_blocks(
        self, data: npt.NDArray[np.uint8], start: int, tokens: int, *, row: int = 0
    ) -> None:
        """Write the first `tokens` of some blocks to `start` of a row; `hold` makes them count.

        `data`: uint8 (blocks, block_layer_bytes).
        """
        for planes, buffer in zip(
            self.form.planes(torch.from_numpy(data)), self._owned(), strict=True
        ):
            copy_blocks(planes, buffer[row, :, start : start + tokens])

    def blank(self, tokens: int, *, row: int) -> None:
        """Make the first tokens of a row zeros: they are padding, which is masked, but finite."""
        for buffer in self._owned():
            buffer[row, :, :tokens].zero_()

    def hold(self, tokens: int) -> None:
        """Let `tokens` of what was written count."""
        self._length = tokens
        if self._buffers is not None:
            self.keys, self.values = self.views()

    def save_blocks(self, start: int, out: npt.NDArray[np.uint8], *, row: int = 0) -> None:
        """Write the tokens of a row from `start` on into `out`: uint8 (blocks, block_layer_bytes).

        They must lie within the length.
        """
        self._wait()
        for planes, buffer in zip(
            self.form.planes(torch.from_numpy(out)), self._owned(), strict=True
        ):
            blocks, step = planes.shape[:2]
            end = start + blocks * step
            assert end <= self.get_seq_length(), f"{end} tokens asked of {self.get_seq_length()}"
            source = buffer[row, :, start:end].unflatten(1, (blocks, step))
            planes.copy_(source.permute(1, 2, 0, 3))

    def drop_front(self, tokens: int) -> None:
        """Forget the first `tokens`; those behind them become the first, of smaller buffers."""
        self._wait()
        length = self.get_seq_length() - tokens
        kept = [states[:, :, tokens:] for states in self.views()] if self.rows else []
        self._capacity = align_up(max(1, length), _CAPACITY_STEP_TOKENS)
        if kept:
            self._allocate(self.rows, self.device)
            self._fill(kept, length)

    def _owned(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._buffers is not None, "the layer has no buffers yet"
        return self._buffers

    def _wait(self) -> None:
        """Copies from the device into page-locked buffers end before the CPU reads those."""
        if self._is_pinned:
            torch.cuda.current_stream().synchronize()

    def _allocate(self, rows: int, device: torch.device) -> None:
        # Normal tensors even under inference_mode, so that a later call outside it may write.
        with torch.inference_mode(mode=False):
            key, value = (
                torch.empty(
                    (rows, self.form.geometry.heads, self._capacity, dim),
                    dtype=self.dtype,
                    device=device,
                    pin_memory=self._is_pinned,
                )
                for dim in self.form.dims
            )
        self._buffers = (key, value)
        self.device = device
        self.is_initialized = True
        self.hold(0)

    def _reserve(self, tokens: int, device: torch.device) -> None:
        """Make room for `tokens` in total on `device`, keeping what is held."""
        if tokens <= self._capacity and self.device == device:
            return
        if tokens > self._capacity:
            doubled = max(tokens, 2 * self._capacity)
            bounded = min(doubled, self._tokens_max) if tokens <= self._tokens_max else doubled
            self._capacity = align_up(bounded, _CAPACITY_STEP_TOKENS)
        self._wait()
        held, length = self.views(), self.get_seq_length()
        self._allocate(self.rows, device)
        self._fill(held, length)

    def _fill(self, states: Iterable[torch.Tensor], length: int) -> None:
        with torch.no_grad():
            for buffer, old in zip(self._owned(), states, strict=True):
                buffer[:, :, :length].copy_(old)
        self.hold(length)
