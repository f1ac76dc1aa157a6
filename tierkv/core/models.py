"""Geometries of well-known models, by name: ``llama-3-70b``, ``llama-3-70b:tp8``, ``gpt2:float16``.

The numbers are those of the published `config.json` files: layers, KV heads, head dimension and
the dtype of the weights. They serve sizing and tests; a live engine's own configuration is
always what a `Layout` is made of.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from tierkv.core.errors import ConfigError, GeometryMismatch
from tierkv.core.geometry import DTYPE_BYTES, Form, KVGeometry

MODELS: Final[Mapping[str, KVGeometry]] = MappingProxyType(
    {
        # MLA: one latent of kv_lora_rank 512 + qk_rope_head_dim 64 a token.
        "deepseek-v3": KVGeometry(61, 1, 512 + 64, form=Form.LATENT),
        # MQA: 71 query heads share one KV head.
        "falcon-7b": KVGeometry(32, 1, 64),
        # MHA.
        "gpt2": KVGeometry(12, 12, 64, dtype="float32"),
        # GQA.
        "llama-3-8b": KVGeometry(32, 8, 128),
        "llama-3-70b": KVGeometry(80, 8, 128),
        "mistral-7b": KVGeometry(32, 8, 128),
        "qwen3-8b": KVGeometry(36, 8, 128),
        "smollm2-135m": KVGeometry(30, 3, 64),
    }
)

_DTYPE_SHORT: Final[Mapping[str, str]] = MappingProxyType(
    {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3"}
)


def model_geometry(spec: str) -> KVGeometry:
    """The geometry of ``name[:tpN][:dtype]``, as rank 0 of N sees it.

    Raises ConfigError for an unknown name or part, and where N does not fit the KV heads.
    """
    name, *parts = spec.strip().split(":")
    if name.lower() not in MODELS:
        raise ConfigError(f"unknown model {name!r}; {_cure(name.lower(), list(MODELS))}")
    geometry = MODELS[name.lower()]
    seen: set[str] = set()
    for part in parts:
        tp = re.fullmatch(r"tp([1-9][0-9]{0,3})", part)
        kind = "tp" if tp else "dtype"
        if kind in seen:
            raise ConfigError(f"{spec!r} says {kind} twice")
        seen.add(kind)
        try:
            if tp:
                geometry = replace(geometry, tp_size=int(tp[1]))
            else:
                geometry = replace(geometry, dtype=_dtype(part, spec))
        except GeometryMismatch as error:
            raise ConfigError(f"{spec!r}: {error}") from None
    return geometry


def _dtype(part: str, spec: str) -> str:
    dtype = _DTYPE_SHORT.get(part, part)
    if dtype not in DTYPE_BYTES:
        known = [*DTYPE_BYTES, *_DTYPE_SHORT]
        raise ConfigError(f"{spec!r}: {part!r} is neither tpN nor a dtype; {_cure(part, known)}")
    return dtype


def _cure(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
