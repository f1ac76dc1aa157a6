"""Which layers a cache of a model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tierkv.core.errors import ConfigError
from tierkv.core.geometry import KVGeometry
from tierkv.engines.checkpoint import rotated_dim, windows_of
from tierkv.engines.kv_buffer import BlockForm, TieredLayer
from tierkv.engines.transformers.offloaded import OffloadedLayer, Workbench
from tierkv.engines.transformers.static import StaticTieredLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Room for generated tokens in the first buffers; they double after that.
_GENERATED_TOKENS = 256


def growing_layers(
    model: PreTrainedModel, geometry: KVGeometry, columns: int, *, offloaded: bool
) -> tuple[Sequence[TieredLayer | OffloadedLayer], Workbench | None]:
    """Layers that grow behind a prompt of `columns`; if offloaded, their workbench too."""
    tokens_max = int(model.config.get_text_config(decoder=True).max_position_embeddings)
    form = BlockForm(geometry, rotated_dim(model.config, geometry))
    is_pinned = offloaded and model.device.type == "cuda"
    plain = [
        TieredLayer(
            form,
            capacity=min(columns + _GENERATED_TOKENS, tokens_max),
            tokens_max=tokens_max,
            window=window,
            is_pinned=is_pinned,
        )
        for window in windows_of(model.config)
    ]
    if not offloaded:
        return plain, None
    bench = Workbench(form, model.device)
    return [OffloadedLayer(number, tail, bench) for number, tail in enumerate(plain)], bench


def static_layers(
    model: PreTrainedModel, geometry: KVGeometry, columns: int, *, max_tokens: int
) -> list[StaticTieredLayer]:
    """Layers of `max_tokens` for a prompt of `columns`; ConfigError where that cannot be."""
    if max_tokens <= columns:
        raise ConfigError(
            f"max_tokens={max_tokens} leaves no room behind a prompt of {columns} tokens"
        )
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise ConfigError("max_tokens is not supported with chunked attention; leave it out")
    form = BlockForm(geometry, rotated_dim(model.config, geometry))
    windows = windows_of(model.config)
    return [StaticTieredLayer(form, tokens_max=max_tokens, window=window) for window in windows]
