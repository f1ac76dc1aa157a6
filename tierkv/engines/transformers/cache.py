"""The cache that `generate` is given: it loads, computes on, and puts.

`open` loads the longest stored prefix of the prompts, always leaving at least one token to compute,
and none where loading would make the first token later; `generate` computes the rest; when the last
layer has the whole prompt, its new whole blocks are put. Invariants:

- K and V of a reused prefix are bit for bit those that were put.
- Blocks are put only for token ids that were reused or that this cache **saw** going into the
  model, at their own positions and unmasked. A forward hook on the model tells; a call with
  another prompt raises before it computes, and what was not seen is not put.
- Another checkpoint, RoPE base or dtype is another layout (`checkpoint.layout_of`).

Prompts of a batch are padded on the left (`prompts`). All rows have one length, so what is reused
ends in one column: where the row with the least in the store has it. Beams and several returned
sequences are further rows of their prompt. A second `generate` with the same cache goes on as with
any transformers cache; `commit` then puts what it added. Single owner: the thread that runs the
model, which may be another one after `open`.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache

from tierkv.core.errors import ConfigError, StoreClosed
from tierkv.core.geometry import MIB
from tierkv.core.keys import BlockKey
from tierkv.engines.checkpoint import layout_of
from tierkv.engines.kv_buffer import TieredLayer
from tierkv.engines.prefill_cost import PrefillCost
from tierkv.engines.reuse import Reuse, delivered_by_tier
from tierkv.engines.transformers.answers import rows_of, without_fill
from tierkv.engines.transformers.layers import growing_layers, static_layers
from tierkv.engines.transformers.ledger import Ledger
from tierkv.engines.transformers.offloaded import OffloadedLayer, Workbench
from tierkv.engines.transformers.prompts import (
    PAD,
    Inputs,
    Prompts,
    begins_again,
    require_plain,
    without_held,
)
from tierkv.engines.transformers.stores import open_store, require_same
from tierkv.store import Lease, Match, Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

#: Bytes that are gathered at a time on their way into the store.
_PIECE_BYTES: Final = 64 * MIB


class TieredCache(Cache):  # type: ignore[misc]
    """A transformers `Cache` over a `Store`; see the module. Make one with `open`.

    `report` says what was reused and stored, `reused_tokens` what was reused of each row's prompt.
    `store` is the store behind it. `bench` has the two layers that are on the device while it is
    offloaded.
    """

    def __init__(
        self,
        store: Store,
        prompts: Prompts,
        *,
        layers: Sequence[TieredLayer | OffloadedLayer],
        bench: Workbench | None = None,
        namespace: str = "default",
    ) -> None:
        super().__init__(layers=list(layers))
        self.store = store
        self.bench = bench
        self.namespace = namespace
        self.report = Reuse(sum(map(len, prompts.tokens)))
        self.reused_tokens = [0] * len(prompts.pads)
        self._prompts = prompts
        self._ledger = Ledger(prompts)
        self._known_keys: set[BlockKey] = set()
        self._lease: Lease | None = None
        self._is_prefilling = True
        self._is_reordered = False
        self._fill_id: int | None = None

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
        max_tokens: int | None = None,
        offloaded: bool = False,
    ) -> TieredCache:
        """A cache for these prompts, holding what the store has of them.

        Give a `store` opened with `layout_of(model)`, or a `directory`: then a store of that
        host and cold capacity is opened there, shared by later calls, and closed with the model.
        A prefix too short to make the first token sooner (see `PrefillCost`) is left alone unless
        `always_load`, which also suits prefill in chunks.

        `max_tokens` makes static shapes of that many tokens, prompt and answer, for a compiled
        decode. `offloaded` keeps K and V in host memory and two layers of them on the device.

        Raises ValueError for inputs that are not plain token ids, padded on the left at most,
        GeometryMismatch for a model that is not supported or not the one the store is for, and
        ConfigError for settings that exclude each other.
        """
        prompts = Prompts.of(inputs, model)
        if store is None:
            if directory is None:
                raise ValueError("TieredCache.open needs store=... or directory=...")
            store = open_store(model, directory, host=host, cold=cold)
        layout = layout_of(model, block_tokens=store.layout.block_tokens)
        require_same(store.layout, layout)
        layers: Sequence[TieredLayer | OffloadedLayer]
        bench = None
        if max_tokens is not None:
            if offloaded:
                raise ConfigError("max_tokens and offloaded exclude each other; leave one of them")
            layers = static_layers(model, layout.geometry, prompts.columns, max_tokens=max_tokens)
        else:
            layers, bench = growing_layers(
                model, layout.geometry, prompts.columns, offloaded=offloaded
            )
        cache = cls(store, prompts, layers=layers, bench=bench, namespace=namespace)
        matches = [store.match(tokens[:-1], namespace=namespace) for tokens in prompts.tokens]
        pairs = zip(prompts.pads, matches, strict=True)
        end = min(pad + match.tokens for pad, match in pairs)
        cost = PrefillCost.of(model, layout.geometry, is_masked=any(prompts.pads))
        if always_load or cost.spares(prompts.columns, end):
            cache._load(matches, end, model.device)
        else:
            cache.report.declined_tokens = sum(max(0, end - pad) for pad in prompts.pads)
        cache._fill_id = model.generation_config.pad_token_id if len(prompts.pads) > 1 else None
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
        if self._is_prefilling and layer_idx == len(self.layers) - 1:
            columns = self._prompts.columns
            if self.get_seq_length(layer_idx) >= columns:
                self._is_prefilling = False
                for row in range(self._ledger.rows):
                    self._put(row, self._ledger.tokens(row, columns))
                self._settle()
        return states

    def commit(self, out: torch.Tensor | None = None) -> int:
        """Put the whole blocks of generated tokens; the number of tokens stored by this call.

        `out` is what `generate` returned (the ids, or its output object) and is checked against
        what the model was given; without it that alone decides. The last token generated has no
        K and V yet and is left to the next turn. After beam search the best sequence is put as far
        as a beam still held it. Raises ValueError for an `out` that is not of this cache.
        """
        length = int(self.get_seq_length())
        rows = [self._ledger.tokens(row, length) for row in range(self._ledger.rows)]
        if self._fill_id is not None:  # what rows were given that had ended before the others
            rows = [without_fill(row, self._fill_id) for row in rows]
        if out is not None:
            rows = rows_of(out, rows, self._prompts, is_reordered=self._is_reordered)
        before = self.report.stored_tokens
        for row, tokens in enumerate(rows):
            self._put(row, tokens)
        return self.report.stored_tokens - before

    # ---- rows and lengths change

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; others may follow, and be committed."""
        super().crop(tokens_to_remove)
        self._ledger.forget(int(self.get_seq_length()))

    def reset(self) -> None:
        """Forget every token in memory; the store keeps what it has."""
        super().reset()
        self._let_go()
        self._ledger = Ledger(self._prompts)
        self._is_prefilling, self._is_reordered = True, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        super().batch_select_indices(indices)
        self._ledger.select(indices)
        self._is_reordered = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._ledger.repeat(repeats)

    # ---- from the store and to it

    def _load(self, matches: Sequence[Match], end: int, device: torch.device) -> None:
        """Fill the columns before `end` with stored prefixes, or as many as are delivered."""
        started_ns = time.perf_counter_ns()
        pads = self._prompts.pads
        if not any(pad < end for pad in pads):
            return
        if self._lease_prefix(matches[0]):
            end = matches[0].tokens
        else:
            for layer in self.layers:
                layer.reserve(len(pads), end, device=device)
            try:
                for row, (pad, match) in enumerate(zip(pads, matches, strict=True)):
                    end = min(end, pad + self._load_row(row, match, end - pad))
            except MemoryError:  # the store has given up and misses from here on
                logger.exception("not loaded tokens=%d", end)
                end = 0
            for layer in self.layers:
                layer.hold(end)
        self.reused_tokens = [max(0, end - pad) for pad in pads]
        self._ledger.note(0, self._prompts.ids[:, :end])
        report, pages = self.report, self.store.layout.pages
        for match, tokens in zip(matches, self.reused_tokens, strict=True):
            for tier, count in delivered_by_tier(match, tokens).items():
                report.tokens_by_tier[tier] = report.tokens_by_tier.get(tier, 0) + count
            self._known_keys.update(match.keys[: pages.blocks_in(tokens)])
        report.load_s = (time.perf_counter_ns() - started_ns) / 1e9
        report.reused_tokens = sum(self.reused_tokens)
        report.reused_bytes = report.reused_tokens * self.store.layout.geometry.token_bytes

    def _load_row(self, row: int, match: Match, wanted: int) -> int:
        """Fill one row behind its padding with `wanted` tokens of a match; tokens delivered."""
        pages, pad = self.store.layout.pages, self._prompts.pads[row]
        for layer in self.layers:
            layer.blank(pad, row=row)
        if wanted <= 0:
            return 0
        # In pieces: fresh memory costs more to touch than its bytes cost to copy.
        blocks, step, done = -(-wanted // pages.block_tokens), self._piece_blocks(), 0
        staging = np.empty((pages.layers, min(step, blocks), pages.block_layer_bytes), np.uint8)
        while done < blocks:
            count = min(step, blocks - done)
            delivered = self.store.get(match, staging[:, :count], first_block=done)
            start = pages.tokens_in(done)
            tokens = min(pages.tokens_in(delivered), wanted - start)
            for layer, data in zip(self.layers, staging, strict=True):
                if delivered:
                    layer.load_blocks(data[:delivered], pad + start, tokens, row=row)
            done += delivered
            if delivered < count:
                break
        return min(wanted, pages.tokens_in(done))

    def _put(self, row: int, tokens: npt.NDArray[np.uint32]) -> None:
        """Put the whole blocks of `tokens`, which start a row, that are not known to be stored."""
        try:
            self._put_blocks(row, tokens)
        except MemoryError:  # the store has given up, which is no reason to stop a model
            logger.exception("not stored tokens=%d", len(tokens))

    def _put_blocks(self, row: int, tokens: npt.NDArray[np.uint32]) -> None:
        started_ns = time.perf_counter_ns()
        pages, report = self.store.layout.pages, self.report
        keys = self.store.keys(tokens, namespace=self.namespace)
        first = next((n for n, key in enumerate(keys) if key not in self._known_keys), len(keys))
        if first == len(keys):
            return
        pad, step = int(self._ledger.pads[row]), self._piece_blocks()
        size = min(step, len(keys) - first)
        staging = np.empty((pages.layers, size, pages.block_layer_bytes), np.uint8)
        while first < len(keys):
            count = min(step, len(keys) - first)
            data = staging[:, :count]
            for layer, rows in zip(self.layers, data, strict=True):
                layer.save_blocks(pad + pages.tokens_in(first), rows, row=row)
            stored = self.store.put_keys(keys, data, first_block=first, namespace=self.namespace)
            self._known_keys.update(keys[first : first + stored])
            first += stored
            report.stored_tokens += pages.tokens_in(stored)
            report.stored_bytes += stored * pages.block_bytes
            if stored < count:  # the store is full or failing; it has counted why
                break
        report.store_s += (time.perf_counter_ns() - started_ns) / 1e9

    def _piece_blocks(self) -> int:
        """Blocks to move at a time: whole warm pages, so that a run is packed as in one piece."""
        pages = self.store.layout.pages
        step = max(1, _PIECE_BYTES // pages.block_bytes)
        return max(step - step % pages.warm_page_blocks, pages.warm_page_blocks)

    def _settle(self) -> None:
        """Offloaded: what was put of the prompt is the store's from here on, and no longer ours."""
        if self.bench is not None and self._prompts.pads == (0,):
            tokens = self._prompts.tokens[0]
            self._lease_prefix(self.store.match(tokens, namespace=self.namespace))

    def _lease_prefix(self, match: Match) -> bool:
        """Offloaded, one prompt: have the layers read a stored prefix where the store has it.

        False, changing nothing, where not all of it fits into the store's host memory beside what
        is leased already, or where it lies in the store's device tier.
        """
        bench, store = self.bench, self.store
        has_device = bool(store.config.tiers.device.capacity)
        if bench is None or self._prompts.pads != (0,) or has_device or not match.blocks:
            return False
        held = self._lease.tokens if self._lease else 0
        if match.tokens <= held:
            return False
        try:
            lease = store.lease(match)
        except MemoryError:  # the store has given up and misses from here on
            logger.exception("not leased tokens=%d", match.tokens)
            return False
        if lease.blocks < match.blocks:
            lease.release()
            return False
        bench.synchronize()
        for layer in self.layers:
            layer.lease(lease.layer, lease.tokens)
        self._let_go()
        self._lease = lease
        weakref.finalize(self, _end, lease).atexit = False
        return True

    def _let_go(self) -> None:
        if self._lease is not None:
            _end(self._lease)
            self._lease = None

    # ---- what goes into the model

    def _watch(self, model: torch.nn.Module) -> None:
        """Have `model` tell this cache which token ids it is given, for as long as both live."""
        this = weakref.ref(self)
        names = list(inspect.signature(model.forward).parameters)

        def before_forward(
            _module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]] | None:
            cache, named = this(), {**dict(zip(names, args, strict=False)), **kwargs}
            if cache is None or named.get("past_key_values") is not cache:
                return None
            return (), cache.note_forward(named)

        # What is compiled is the model, not what is noted beside it.
        hook = torch.compiler.disable(before_forward) if self.is_compileable else before_forward
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        weakref.finalize(self, handle.remove).atexit = False

    def note_forward(self, kwargs: dict[str, object]) -> dict[str, object]:
        """Remember ids that enter the model at the current length; check those of the prompt.

        Called by the hook that `open` puts on the model, with what its forward is called with;
        gives what it is to be called with. That is the same, but where the call begins with the
        first token again though its K and V are here, as assisted decoding does: then it is what
        is missing. Raises ValueError for ids that are not this cache's prompts, at their own
        positions, unmasked.
        """
        ids = kwargs.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            raise ValueError("a TieredCache is keyed by token ids; inputs_embeds has none")
        start = int(self.get_seq_length())
        if self._ledger.rows != len(ids):
            if len(ids) % self._ledger.rows:
                raise ValueError(f"{len(ids)} rows of tokens for a cache of {self._ledger.rows}")
            self._ledger.repeat(len(ids) // self._ledger.rows)
        # A single token is a step of `generate`, whose mask and positions follow the prompt's.
        if ids.shape[1] > 1 or self._is_prefilling:
            if start and begins_again(kwargs, self._ledger.pads, start):
                if not self._ledger.holds(ids[:, :start]):
                    raise ValueError("the model was given other tokens than this cache holds")
                kwargs, ids = without_held(kwargs, start), ids[:, start:]
            self._check_forward(kwargs, ids, start)
        end, most = start + ids.shape[1], self.get_max_length()
        if 0 <= most < end:
            raise ValueError(f"this is token {end:,}, and max_tokens is {most:,}; open with more")
        self._ledger.note(start, ids.detach())
        return kwargs

    def _check_forward(self, kwargs: Mapping[str, object], ids: torch.Tensor, start: int) -> None:
        """ValueError unless columns from `start` on are the prompts', plain, and what follows."""
        end = start + ids.shape[1]
        if self._is_prefilling:
            expected = self._prompts.ids[:, start:end]
            expected = expected.repeat_interleave(len(ids) // len(expected), 0)
            found = ids[:, : expected.shape[1]].cpu()
            if not bool(((found == expected) | (expected == PAD)).all()):
                raise ValueError(
                    f"the model was given other tokens at {start:,} to {end:,} than the prompt that"
                    " this cache was opened for"
                )
        windows = [window for layer in self.layers if (window := layer.window) is not None]
        require_plain(kwargs, self._ledger.pads, start, end, window=min(windows, default=None))


def _end(lease: Lease) -> None:
    with suppress(StoreClosed):  # a store that is closed has nothing leased
        lease.release()
