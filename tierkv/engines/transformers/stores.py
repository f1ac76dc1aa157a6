"""Stores by directory: opened once for a model, closed with it."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tierkv.config import Config
from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import Layout
from tierkv.engines.checkpoint import layout_of
from tierkv.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Stores that `open_store` opened, by model; they close with the model.
_stores: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], Store]]
_stores = weakref.WeakKeyDictionary()


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


def require_same(stored: Layout, model: Layout) -> None:
    """GeometryMismatch, saying what differs, unless a store's layout is the model's."""
    if stored.fingerprint == model.fingerprint:
        return
    names = ("geometry", "model", "revision", "codec", "engine_layout")
    pairs = ((n, getattr(stored, n), getattr(model, n)) for n in names)
    differing = "; ".join(f"{n}: store {s}, model {m}" for n, s, m in pairs if s != m)
    raise GeometryMismatch(
        f"the store was opened for another layout than this model's: {differing}"
    )
