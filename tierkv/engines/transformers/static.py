"""Static shapes: a layer whose K and V never change their size, for a compiled forward.

Where the next token goes is a tensor, as in transformers' `StaticLayer`, so a compiled decode step
has nothing to be compiled again for. A layer with a window keeps its whole length too; the mask has
the window.
"""

from __future__ import annotations

import torch

from tierkv.engines.kv_buffer import BlockForm, TieredLayer

__all__ = ["StaticTieredLayer"]


class StaticTieredLayer(TieredLayer):
    """A layer of exactly `tokens_max` tokens; `update` gives all of them, the empty ones zero."""

    is_compileable = True

    def __init__(self, form: BlockForm, *, tokens_max: int, window: int | None = None) -> None:
        super().__init__(form, capacity=tokens_max, tokens_max=tokens_max, window=window)
        self._capacity = tokens_max
        self._held = torch.tensor(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``(rows, heads, tokens, dim)`` states in place; the whole buffers."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        elif (rows := key_states.shape[0]) != self.rows:
            if self.get_seq_length():
                self.batch_repeat_interleave(rows // self.rows)
            else:
                self._allocate(rows, key_states.device)
        tokens = key_states.shape[2]
        places = torch.arange(tokens, device=self.device) + self._held
        self._held.add_(tokens)
        with torch.no_grad():
            for buffer, states in zip(self._owned(), (key_states, value_states), strict=True):
                buffer.index_copy_(2, places, states)
        return self._owned()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens of the buffers, 0), whatever is asked."""
        return self._tokens_max, 0

    def get_seq_length(self) -> int:
        """Tokens held; waits for the device to know."""
        return int(self._held)

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self._tokens_max

    def hold(self, tokens: int) -> None:
        """Let `tokens` of what was written count."""
        self._held.fill_(tokens)
        if self._buffers is not None:
            self.keys, self.values = self._owned()

    def _allocate(self, rows: int, device: torch.device) -> None:
        super()._allocate(rows, device)
        for buffer in self._owned():
            buffer.zero_()  # what is masked must be finite
        self._held = self._held.to(device)
        for tensor in (*self._owned(), self._held):
            torch._dynamo.mark_static_address(tensor)
