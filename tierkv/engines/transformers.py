"""transformers: `TieredCache`, a `past_key_values` whose prefixes outlive the process.

::

    cache = TieredCache.open(model, inputs, store=store)
    out = model.generate(**inputs, past_key_values=cache)
    cache.commit(out)  # optional: the next chat turn skips the answer too

`open` loads the longest stored prefix of the prompt, always leaving at least one token to
compute, and none where loading would make the first token later; `generate` computes the rest;
when the last layer has the whole prompt, its new whole blocks are put. Invariants:

- K and V of a reused prefix are bit for bit those that were put.
- Blocks are put only for token ids that were reused or that this cache **saw** going into the
  model, at their own positions and unmasked. A forward hook on the model tells; a call with
  another prompt raises before it computes, and what was not seen is not put.
- Another checkpoint, RoPE base or dtype is another layout (`checkpoint.layout_of`).

One prompt, batch 1; beams and several returned sequences of it are rows of the same prompt. A
second `generate` with the same cache goes on as with any transformers cache; `commit` then puts
what it added. Single owner: the thread that runs the model.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache

from tierkv.config import Config
from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import MIB, Layout
from tierkv.engines.checkpoint import layout_of
from tierkv.engines.kv_buffer import TieredLayer
from tierkv.engines.prefill_cost import PrefillCost
from tierkv.engines.reuse import Reuse, delivered_by_tier
from tierkv.store import Match, Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Reuse", "TieredCache", "close_stores", "layout_of", "open_store"]

logger = logging.getLogger(__name__)

#: What `generate` takes: a tokenizer's mapping, or a tensor of token ids (1, tokens).
Inputs: TypeAlias = Mapping[str, torch.Tensor] | torch.Tensor

#: Room for generated tokens in the first buffers; they double after that.
_GENERATED_TOKENS = 256

#: Bytes that are gathered at a time on their way into the store.
_PIECE_BYTES: Final = 64 * MIB

#: Stores that `TieredCache.open(directory=...)` opened, by model; they close with the model.
_stores: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], Store]]
_stores = weakref.WeakKeyDictionary()


class TieredCache(Cache):  # type: ignore[misc]
    """A transformers `Cache` over a `Store`; see the module. Make one with `open`.

    `report` says what was reused and stored. `store` is the store behind it.
    """

    def __init__(
        self,
        store: Store,
        tokens: npt.NDArray[np.uint32],
        *,
        layers: list[TieredLayer],
        namespace: str = "default",
    ) -> None:
        super().__init__(layers=layers)
        self.store = store
        self.namespace = namespace
        self.report = Reuse(len(tokens))
        self._tokens = tokens
        self._prompt = torch.from_numpy(tokens.astype(np.int64))
        self._seen: list[tuple[int, torch.Tensor]] = []
        self._loaded_tokens = 0
        self._stored_blocks = 0
        self._is_prefilling = True

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        inputs: Inputs,
        *,
        store: Store | None = None,
        directory: str | os.PathLike[str] | None = None,
        host: int | str = "4GiB",
        cold: int | str = "16GiB",
        namespace: str = "default",
        always_load: bool = False,
    ) -> TieredCache:
        """A cache for this prompt, holding what the store has of it.

        Give a `store` opened with `layout_of(model)`, or a `directory`: then a store of that
        host and cold capacity is opened there, shared by later calls, and closed with the model.
        A prefix too short to make the first token sooner (see `PrefillCost`) is left alone unless
        `always_load`, which also suits prefill in chunks.
        Raises ValueError for inputs that are not one unpadded prompt of plain token ids, and
        GeometryMismatch for a model that is not supported or not the one the store is for.
        """
        tokens = _token_row(inputs, model)
        if store is None:
            if directory is None:
                raise ValueError("TieredCache.open needs store=... or directory=...")
            store = open_store(model, directory, host=host, cold=cold)
        layout = layout_of(model, block_tokens=store.layout.block_tokens)
        _require_same(store.layout, layout)
        tokens_max = int(model.config.get_text_config(decoder=True).max_position_embeddings)
        if len(tokens) > tokens_max:
            raise ValueError(
                f"the prompt has {len(tokens):,} tokens, the model's context {tokens_max:,}"
            )
        capacity = min(len(tokens) + _GENERATED_TOKENS, tokens_max)
        layers = [
            TieredLayer(layout.geometry, capacity=capacity, tokens_max=tokens_max)
            for _ in range(layout.geometry.layers)
        ]
        cache = cls(store, tokens, layers=layers, namespace=namespace)
        match = store.match(tokens[:-1], namespace=namespace)
        cost = PrefillCost.of(model, layout.geometry)
        if always_load or cost.spares(len(tokens), match.tokens):
            cache._load(match, model.device)
        else:
            cache.report.declined_tokens = match.tokens
        cache._watch(model)
        return cache

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`; when the last layer has the whole prompt, its blocks are put."""
        states: tuple[torch.Tensor, torch.Tensor]
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        is_last = layer_idx == len(self.layers) - 1
        if self._is_prefilling and is_last and self.get_seq_length(layer_idx) >= len(self._tokens):
            self._is_prefilling = False
            self._put(self._seen_tokens(len(self._tokens)))
        return states

    def commit(self, out: torch.Tensor | None = None) -> int:
        """Put the whole blocks of generated tokens; the number of tokens stored by this call.

        `out` is what `generate` returned (the ids, or its output object) and is checked against
        what the model was given; without it that alone decides. The last token generated has no
        K and V yet and is left to the next turn. Raises ValueError after beam search or with
        several returned sequences, where no one row is the conversation.
        """
        layer: TieredLayer = self.layers[0]
        if layer.keys is not None and layer.keys.shape[0] > 1:
            raise ValueError(f"commit needs one sequence, this cache holds {layer.keys.shape[0]}")
        tokens = self._seen_tokens(self.get_seq_length())
        if out is not None:
            ids = getattr(out, "sequences", out)
            row = ids[0] if ids.dim() == 2 else ids
            given = row[: len(tokens)].cpu().numpy().astype(np.uint32)
            if not np.array_equal(given, tokens[: len(given)]):
                raise ValueError("`out` is not what was generated with this cache")
            tokens = tokens[: len(given)]
        before = self.report.stored_tokens
        self._put(tokens)
        return self.report.stored_tokens - before

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; others may follow, and be committed."""
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self._loaded_tokens = min(self._loaded_tokens, length)
        # What follows is another chain: its blocks are put from here on.
        self._stored_blocks = min(self._stored_blocks, self.store.layout.pages.blocks_in(length))

    def reset(self) -> None:
        """Forget every token in memory; the store keeps what it has."""
        super().reset()
        self._seen.clear()
        self._loaded_tokens = 0
        self._is_prefilling = True

    def _load(self, match: Match, device: torch.device) -> None:
        """Fill the layers with a stored prefix."""
        started_ns = time.perf_counter_ns()
        if not match.blocks:
            return
        pages = self.store.layout.pages
        # In pieces: fresh memory costs more to touch than its bytes cost to copy.
        step = self._piece_blocks()
        staging = np.empty(
            (pages.layers, min(step, match.blocks), pages.block_layer_bytes), np.uint8
        )
        blocks = 0
        while blocks < match.blocks:
            count = min(step, match.blocks - blocks)
            delivered = self.store.get(match, staging[:, :count], first_block=blocks)
            if delivered and not blocks:
                for layer in self.layers:
                    layer.reserve_blocks(match.blocks, pages.block_layer_bytes, device=device)
            for layer, data in zip(self.layers, staging, strict=True):
                if delivered:
                    layer.load_blocks(data[:delivered])
            blocks += delivered
            if delivered < count:
                break
        if not blocks:
            return
        report = self.report
        report.load_s = (time.perf_counter_ns() - started_ns) / 1e9
        report.reused_tokens = self._loaded_tokens = pages.tokens_in(blocks)
        report.reused_bytes = blocks * pages.block_bytes
        report.tokens_by_tier = delivered_by_tier(match, report.reused_tokens)
        self._stored_blocks = blocks

    def _put(self, tokens: npt.NDArray[np.uint32]) -> None:
        """Put the whole blocks of `tokens`, which start the sequence, that were not put yet."""
        started_ns = time.perf_counter_ns()
        pages = self.store.layout.pages
        end = pages.blocks_in(len(tokens))
        step = self._piece_blocks()
        staging = np.empty((pages.layers, step, pages.block_layer_bytes), np.uint8)
        keys = self.store.keys(tokens, namespace=self.namespace)
        while self._stored_blocks < end:
            first = self._stored_blocks
            count = min(step, end - first)
            data = staging[:, :count]
            for layer, out in zip(self.layers, data, strict=True):
                layer.save_blocks(first, out)
            stored = self.store.put_keys(keys, data, first_block=first, namespace=self.namespace)
            self._stored_blocks += stored
            self.report.stored_tokens += pages.tokens_in(stored)
            self.report.stored_bytes += stored * pages.block_bytes
            if stored < count:  # the store is full or failing; it has counted why
                break
        self.report.store_s += (time.perf_counter_ns() - started_ns) / 1e9

    def _piece_blocks(self) -> int:
        """Blocks to move at a time: whole warm pages, so that a run is packed as in one piece."""
        pages = self.store.layout.pages
        step = max(1, _PIECE_BYTES // pages.block_bytes)
        return max(step - step % pages.warm_page_blocks, pages.warm_page_blocks)

    # ---- what goes into the model

    def _watch(self, model: torch.nn.Module) -> None:
        """Have `model` tell this cache which token ids it is given, for as long as both live."""
        this = weakref.ref(self)

        def before_forward(
            _module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> None:
            cache = this()
            if cache is not None and kwargs.get("past_key_values") is cache:
                cache.note_forward(kwargs.get("input_ids", args[0] if args else None), kwargs)

        handle = model.register_forward_pre_hook(before_forward, with_kwargs=True)
        weakref.finalize(self, handle.remove).atexit = False

    def note_forward(self, ids: object, kwargs: Mapping[str, object]) -> None:
        """Remember ids that enter the model at the current length; check those of the prompt.

        Called by the hook that `open` puts on the model, with what its forward is called with.
        Raises ValueError if they are not this cache's prompt, at its own positions, unmasked.
        """
        if not isinstance(ids, torch.Tensor):
            raise ValueError("a TieredCache is keyed by token ids; inputs_embeds has none")
        start = self.get_seq_length()
        end = start + ids.shape[1]
        if self._is_prefilling:
            expected = self._prompt[start:end]
            if not bool((ids[:, : len(expected)].cpu() == expected).all()):
                raise ValueError(
                    f"the model was given other tokens at {start:,} to {start + len(expected):,}"
                    " than the prompt that this cache was opened for (assisted decoding does so"
                    " too where a prefix was reused: it starts from the first token again)"
                )
        # A single token is a step of `generate`, whose mask and positions follow the prompt's.
        if ids.shape[1] > 1 or self._is_prefilling:
            _require_plain(kwargs, start, end)
        self._seen.append((start, ids[0].detach()))

    def _seen_tokens(self, count: int) -> npt.NDArray[np.uint32]:
        """The ids of the first `count` tokens, cut where one was never seen."""
        ids = np.full(count, -1, np.int64)
        loaded = min(count, self._loaded_tokens)
        ids[:loaded] = self._tokens[:loaded]
        for start, row in self._seen:  # later entries win: tokens that were cropped were replaced
            part = row[: max(0, count - start)]
            ids[start : start + len(part)] = part.cpu().numpy()
        unseen = np.flatnonzero(ids < 0)
        if unseen.size:
            logger.warning("not stored: tokens not seen entering the model, from=%d", unseen[0])
            ids = ids[: unseen[0]]
        return ids.astype(np.uint32)


def open_store(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    host: int | str = "4GiB",
    cold: int | str = "16GiB",
    device: int | str = 0,
) -> Store:
    """The store for `model` beneath `directory`, opened once and kept until the model goes.

    Capacities are bytes or text such as "4GiB"; host memory is taken at once. Models may share a
    directory: each layout has its own folder in it.
    """
    layout = layout_of(model)
    root = Path(directory).expanduser().absolute()
    kept = _stores.get(model)
    if kept is None:
        kept = _stores[model] = {}
        weakref.finalize(model, _close_all, kept)
    key = (root, host, cold, device, layout.fingerprint)
    if key not in kept:
        tiers = {
            "device": {"capacity": device},
            "host": {"capacity": host},
            "cold": {"capacity": cold, "directory": str(root)},
        }
        kept[key] = Store.open(Config.model_validate({"tiers": tiers}), layout)
    return kept[key]


def close_stores(model: PreTrainedModel) -> None:
    """Close the stores that were opened by directory for this model, making them durable."""
    _close_all(_stores.get(model, {}))


def _close_all(stores: dict[tuple[object, ...], Store]) -> None:
    while stores:
        _key, store = stores.popitem()
        store.close()


def _token_row(inputs: Inputs, model: PreTrainedModel) -> npt.NDArray[np.uint32]:
    """The one prompt in `inputs`; ValueError says what else is there."""
    if isinstance(inputs, torch.Tensor):
        ids, mask = inputs, None
    else:
        known = {"input_ids", "attention_mask"}
        if "input_ids" not in inputs:
            raise ValueError(f"inputs need input_ids, they have {sorted(inputs)}")
        if set(inputs) - known:
            raise ValueError(
                f"inputs {sorted(set(inputs) - known)} change K and V, which this cache knows by"
                " token ids alone"
            )
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(
            f"a TieredCache holds one prompt, got input_ids of shape {tuple(ids.shape)}: open one"
            " cache for each prompt (a padded batch has no common positions)"
        )
    if mask is not None and not bool(mask.all()):
        raise ValueError("the prompt is padded or masked; pass it without padding")
    if not ids.shape[1]:
        raise ValueError("the prompt is empty")
    low, high = int(ids.min()), int(ids.max())
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token id {low if low < 0 else high} is outside 0..{vocabulary - 1}")
    tokens: npt.NDArray[np.uint32] = ids[0].cpu().numpy().astype(np.uint32)
    return tokens


def _require_plain(kwargs: Mapping[str, object], start: int, end: int) -> None:
    """ValueError if a forward masks tokens out or places them elsewhere than at start..end."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and (mask.dim() != 2 or not bool(mask.all())):
        raise ValueError("a TieredCache needs a plain causal mask: nothing masked out")
    positions = kwargs.get("position_ids")
    if isinstance(positions, torch.Tensor):
        found = positions[..., start - end :].cpu()
        if not bool((found == torch.arange(start, end)).all()):
            raise ValueError(f"position_ids must count from {start:,} to {end:,}")


def _require_same(stored: Layout, model: Layout) -> None:
    if stored.fingerprint == model.fingerprint:
        return
    names = ("geometry", "model", "revision", "codec", "engine_layout")
    pairs = ((n, getattr(stored, n), getattr(model, n)) for n in names)
    differing = "; ".join(f"{n}: store {s}, model {m}" for n, s, m in pairs if s != m)
    raise GeometryMismatch(
        f"the store was opened for another layout than this model's: {differing}"
    )
