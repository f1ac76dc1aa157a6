"""tierkv: a tiered KV cache for LLM inference over device memory, host memory and NVMe.

The public names below are loaded when first asked for (PEP 562), so that `import tierkv` is
cheap and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tierkv.config import Config, load_config
    from tierkv.core.errors import (
        ConfigError,
        CorruptData,
        GeometryMismatch,
        StoreClosed,
        TierFailed,
        TierFull,
        TierKVError,
        TransferFailed,
    )
    from tierkv.core.geometry import Form, KVGeometry, Layout, PagePlan, PageTargets
    from tierkv.store import Hint, Lease, Match, Store

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "CorruptData",
    "Form",
    "GeometryMismatch",
    "Hint",
    "KVGeometry",
    "Layout",
    "Lease",
    "Match",
    "PagePlan",
    "PageTargets",
    "Store",
    "StoreClosed",
    "TierFailed",
    "TierFull",
    "TierKVError",
    "TransferFailed",
    "__version__",
    "load_config",
]

_MODULES: Final = {
    "tierkv.config": ("Config", "load_config"),
    "tierkv.core.errors": (
        "ConfigError",
        "CorruptData",
        "GeometryMismatch",
        "StoreClosed",
        "TierFailed",
        "TierFull",
        "TierKVError",
        "TransferFailed",
    ),
    "tierkv.core.geometry": ("Form", "KVGeometry", "Layout", "PagePlan", "PageTargets"),
    "tierkv.store": ("Hint", "Lease", "Match", "Store"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tierkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
