"""The layout of SGLang's pages: everything that gives their bytes meaning, and whose they are.

Each rank has pages of its own, as a store's directory belongs to one process: ranks are told apart
even where they hold the same bytes. SGLang does not tell a backend which weights it serves, so they
are known by its arguments where there are any, or by the option `weights`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from tierkv.core.geometry import Form as GeometryForm
from tierkv.core.geometry import KVGeometry, Layout, PageTargets
from tierkv.engines.sglang.host import Form, HostPool, page_tokens
from tierkv.engines.weights import weights_identity

#: What is told of a pool where it has it; two pools that differ in one share nothing.
_POOL: Final = (
    "layout", "dtype", "layer_num", "head_num", "head_dim", "v_head_dim", "kv_lora_rank",
    "qk_rope_head_dim", "kv_cache_dim", "start_layer", "end_layer", "dcp_size", "dcp_rank",
    "storage_format_tag",
)  # fmt: skip
#: What SGLang's arguments say of how KV is computed and kept.
_ARGUMENTS: Final = (
    "dtype", "kv_cache_dtype", "quantization", "quantization_param_path",
    "json_model_override_args", "speculative_algorithm", "speculative_draft_model_path",
)  # fmt: skip


class StorageConfig(Protocol):
    """What is used of SGLang's `HiCacheStorageConfig`."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    model_name: str | None
    extra_config: dict[str, Any] | None


def layout_of(
    name: str,
    pool: HostPool,
    form: Form,
    config: StorageConfig,
    *,
    version: str,
    weights: str,
    arguments: Mapping[str, str],
    targets: PageTargets,
) -> Layout:
    """What a page of this pool is."""
    layers, size = form.shape
    tokens = block_tokens_of(pool, form)
    kind = {
        "sglang": version,
        "pool": name,
        "class": type(pool).__name__,
        "sizes": form.sizes,
        "is_flat": form.is_flat,
        "page_tokens": page_tokens(pool),
        "is_mla": config.is_mla_model,
        "ranks": {
            field: getattr(config, field, 0)
            for field in (
                "tp_rank", "tp_size", "pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size",
                "dp_rank", "dcp_rank", "dcp_size",
            )
        },
        "arguments": dict(arguments),
        **{field: str(getattr(pool, field, None)) for field in _POOL},
    }  # fmt: skip
    # Nothing here looks into a page: to the store it is bytes for each token.
    return Layout(
        geometry=KVGeometry(
            layers=layers, kv_heads=1, head_dim=size // tokens, dtype="uint8",
            form=GeometryForm.LATENT,
        ),
        block_tokens=tokens,
        model=str(config.model_name or ""),
        revision=weights,
        engine_layout=json.dumps(kind, sort_keys=True),
        targets=targets,
    )  # fmt: skip


def block_tokens_of(pool: HostPool, form: Form) -> int:
    """Tokens of a page, if its bytes can be told to tokens; a state has none of its own."""
    tokens = page_tokens(pool)
    return 1 if form.shape[1] % tokens else tokens


def arguments_of(arguments: object) -> dict[str, str]:
    """What SGLang's arguments say that gives KV bytes meaning."""
    return {name: str(getattr(arguments, name, None)) for name in _ARGUMENTS}


def weights_of(option: str | None, arguments: object, model_name: str | None) -> str:
    """Which weights are served: hashes over the files, or the commits of a hub's models.

    `option` is a checkpoint's place, or any word that changes with the weights. The adapters that
    SGLang is started with go into it: it names them by their paths, whatever lies there.
    """
    model = getattr(arguments, "model_path", None) or model_name or ""
    quantization = str(getattr(arguments, "quantization", None))
    revision = getattr(arguments, "revision", None)
    if option is None:
        found = [_identity(model, revision=revision, more=quantization)]
    else:
        found = [_identity(option) if Path(option).exists() else option]
    found += [_identity(path) for path in _adapters(getattr(arguments, "lora_paths", None))]
    return "; ".join(found)


def _adapters(given: object) -> list[str]:
    """Paths of adapters, in any of the forms that SGLang takes them in."""
    if isinstance(given, Mapping):
        return sorted(map(str, given.values()))
    paths: list[str] = []
    for one in given if isinstance(given, list | tuple) else ():
        if isinstance(one, str):
            paths.append(one.partition("=")[2] or one)
        elif isinstance(one, Mapping):
            paths.append(str(one.get("lora_path")))
        else:
            paths.append(str(getattr(one, "lora_path", None)))
    return sorted(paths)


def _identity(model: str, *, revision: str | None = None, more: str = "") -> str:
    if model and Path(model).exists():
        return weights_identity(Path(model), more=more)
    return f"{model} {revision} {_commit(model, revision)}"


def _commit(model: str, revision: str | None) -> str | None:
    """The commit that the hub's cache has of a model."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except (ImportError, OSError, ValueError):  # no hub, or no name that one would have
        return None
    return Path(found).parent.name if isinstance(found, str) else None
