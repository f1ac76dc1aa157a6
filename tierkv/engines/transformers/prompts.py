"""The prompts of a batch, and what a forward may do with them.

The rows of a batch are padded on the left to as many columns as the longest prompt has. A row's
prefix is its unpadded tokens: token n of row r is in column ``pads[r] + n`` and has position n, so
its K and V are those that the prompt has alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What `generate` takes: a tokenizer's mapping, or a tensor of token ids (rows, columns).
Inputs: TypeAlias = Mapping[str, torch.Tensor] | torch.Tensor

#: What a padding column of the ledger and of a prompt holds instead of a token id.
PAD = -2


@dataclass(frozen=True, slots=True)
class Prompts:
    """`ids`: int64 (rows, columns) on the CPU, `PAD` where a row is padded. `pads`: by row."""

    ids: torch.Tensor
    pads: tuple[int, ...]

    @classmethod
    def of(cls, inputs: Inputs, model: PreTrainedModel) -> Self:
        """The prompts in `inputs`; ValueError says what else is there."""
        ids, mask = _ids_and_mask(inputs)
        if not ids.shape[1]:
            raise ValueError("the prompt is empty")
        config = model.config.get_text_config(decoder=True)
        vocabulary, tokens_max = int(config.vocab_size), int(config.max_position_embeddings)
        pads = [0] * len(ids)
        if mask is not None:
            if mask.shape != ids.shape:
                raise ValueError(f"attention_mask {tuple(mask.shape)}, ids {tuple(ids.shape)}")
            pads = [int(row.ne(0).int().argmax()) for row in mask]
            for number, (row, pad) in enumerate(zip(mask, pads, strict=True)):
                if not bool(row[pad:].all()) or not bool(row.any()):
                    raise ValueError(
                        f"row {number} is masked elsewhere than on its left; pad on the left"
                        " (tokenizer.padding_side = 'left') and mask nothing else"
                    )
            ids = ids.masked_fill(mask == 0, PAD)
        real = ids[ids != PAD]
        low, high = int(real.min()), int(real.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token id {low if low < 0 else high} is outside 0..{vocabulary - 1}")
        if (longest := ids.shape[1] - min(pads)) > tokens_max:
            raise ValueError(
                f"the prompt has {longest:,} tokens, the model's context {tokens_max:,}"
            )
        return cls(ids, tuple(pads))

    @property
    def columns(self) -> int:
        """Of the longest prompt, with what all rows are padded by."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> list[npt.NDArray[np.uint32]]:
        """The unpadded token ids, by row."""
        pairs = zip(self.ids, self.pads, strict=True)
        return [row[pad:].numpy().astype(np.uint32) for row, pad in pairs]


def begins_again(kwargs: Mapping[str, object], pads: torch.Tensor, start: int) -> bool:
    """Whether a forward computes all columns from the first, by its positions."""
    ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
    if not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
        return False
    last = ids.shape[1] - 1 - pads[0]
    return ids.shape[1] > start and int(positions.reshape(-1, positions.shape[-1])[0, -1]) == last


def without_held(kwargs: Mapping[str, object], start: int) -> dict[str, object]:
    """A forward of all columns as one of those from `start` on."""

    def rest(mask: object) -> object:
        # A prepared mask's rows were counted from `start` on already.
        if isinstance(mask, torch.Tensor) and mask.dim() == 4:
            return mask[:, :, : mask.shape[2] - start]
        return mask

    kwargs, masks = dict(kwargs), kwargs.get("attention_mask")
    for name in ("input_ids", "position_ids"):
        states = kwargs[name]
        assert isinstance(states, torch.Tensor)
        kwargs[name] = states[..., start:]
    if isinstance(masks, Mapping):
        kwargs["attention_mask"] = {name: rest(mask) for name, mask in masks.items()}
    elif masks is not None:
        kwargs["attention_mask"] = rest(masks)
    return kwargs


def require_plain(
    kwargs: Mapping[str, object], pads: torch.Tensor, start: int, end: int, *, window: int | None
) -> None:
    """ValueError if a forward masks more than padding, or a token is not at its own position.

    `pads`: int64 (rows,) columns of padding; the forward computes columns start..end. `window` is
    what the masks of layers with a window leave visible.
    """
    columns = torch.arange(start, end)
    is_real = columns[None] >= pads[:, None]
    masks = kwargs.get("attention_mask")
    given = list(masks.values()) if isinstance(masks, Mapping) else [masks]
    for mask in given:
        if not isinstance(mask, torch.Tensor):
            if mask is None and not bool(is_real.all()):
                raise ValueError("the prompts are padded: the model needs their attention_mask")
        elif mask.dim() == 4:
            _require_causal(mask, pads, start, end, window)
        elif not torch.equal(
            mask[:, :end].ne(0).cpu(),
            (torch.arange(end)[None] >= pads[:, None]).expand(len(mask), -1),
        ):
            raise ValueError(
                "a TieredCache needs a plain causal mask: nothing masked out but padding on the"
                " left, as the cache was opened with"
            )
    positions = kwargs.get("position_ids")
    if isinstance(positions, torch.Tensor):
        found = positions[..., start - end :].cpu()
        if not bool(((found == columns[None] - pads[:, None]) | ~is_real).all()):
            raise ValueError(f"position_ids must count from {start:,} to {end:,}, less the padding")
    elif bool(pads.any()):
        raise ValueError(
            "this model was given no position_ids, so padding moves its tokens: open one cache for"
            " each prompt, without padding"
        )


def _require_causal(
    mask: torch.Tensor, pads: torch.Tensor, start: int, end: int, window: int | None
) -> None:
    """ValueError unless a mask (rows, 1, queries, columns) is causal behind the padding."""
    found = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :end].cpu()
    query, column = torch.arange(start, end)[:, None], torch.arange(end)[None]
    seen = (column <= query)[None] & (column[None] >= pads[:, None, None])
    is_real = query[None] >= pads[:, None, None]
    near = seen if window is None else seen & (query - column < window)[None]
    if not any(bool(((found == wanted) | ~is_real).all()) for wanted in (seen, near)):
        raise ValueError("a TieredCache needs a plain causal mask: nothing masked but padding")


def _ids_and_mask(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids int64 (rows, columns), and their mask, on the CPU."""
    if isinstance(inputs, torch.Tensor):
        ids, mask = inputs, None
    else:
        if "input_ids" not in inputs:
            raise ValueError(f"inputs need input_ids, they have {sorted(inputs)}")
        if unknown := sorted(set(inputs) - {"input_ids", "attention_mask"}):
            raise ValueError(
                f"inputs {unknown} change K and V, which this cache knows by token ids alone"
            )
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.dim() == 1:
        ids = ids[None]
        mask = mask[None] if mask is not None and mask.dim() == 1 else mask
    if ids.dim() != 2 or not len(ids):
        raise ValueError(f"prompts are input_ids (rows, columns), got shape {tuple(ids.shape)}")
    return ids.cpu().long(), None if mask is None else mask.cpu()
