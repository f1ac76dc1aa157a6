"""Opening the store of one rank: its configuration and its layout, and which engines are served.

The layout says all that gives the bytes of a block their meaning: the model and its weights, the
shapes and types of the cache, the rank's share of it, the engine's version and how the engine lays
a block out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierkv.config import Config
from tierkv.core.errors import ConfigError, GeometryMismatch
from tierkv.core.geometry import Form, KVGeometry, Layout
from tierkv.engines.options import config_of as options_config
from tierkv.engines.weights import weights_identity
from tierkv.store import Store

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec


def check_served(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise ConfigError and GeometryMismatch for an engine that cannot be served, with the cure."""
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if not algorithm.startswith("sha256"):
        raise ConfigError(
            f"vLLM names blocks by {algorithm}, which a prompt can be made to forge; cure: "
            "--prefix-caching-hash-algo sha256"
        )
    size = vllm_config.cache_config.block_size
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if not hasattr(spec, "num_kv_heads") or spec.block_size != size:
            raise GeometryMismatch(
                f"layers {group.layer_names[0]}, ..: a cache of {type(spec).__name__} with blocks "
                f"of {spec.block_size} tokens; tierkv serves attention in blocks of {size}; cure: "
                "serve this model without it"
            )


def open_stores(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> dict[Store, list[str]]:
    """This rank's stores and their layers, one for each group, which shares the capacities."""
    options = vllm_config.kv_transfer_config.kv_connector_extra_config
    groups, stores = kv_cache_config.kv_cache_groups, dict[Store, list[str]]()
    config = config_of(options, vllm_config)
    whole = block_bytes_of(kv_cache_config)
    try:
        for group in groups:
            part = _part_of(config, _group_bytes(group), whole)
            layout = layout_of(vllm_config, group, part)
            stores[Store.open(part, layout)] = group.layer_names
    except BaseException:
        for store in stores:
            store.close()
        raise
    return stores


def block_bytes_of(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of a block of one rank, all layers of all groups."""
    return sum(map(_group_bytes, kv_cache_config.kv_cache_groups))


def has_windows(kv_cache_config: KVCacheConfig) -> bool:
    """Whether some layers forget what a window has left behind."""
    return any(
        getattr(group.kv_cache_spec, name, None) is not None
        for group in kv_cache_config.kv_cache_groups
        for name in ("sliding_window", "attention_chunk_size")
    )


def _group_bytes(group: KVCacheGroupSpec) -> int:
    return int(group.kv_cache_spec.page_size_bytes) * len(group.layer_names)


def config_of(options: Mapping[str, Any], vllm_config: VllmConfig) -> Config:
    """The configuration in `kv_connector_extra_config`, and this rank's share of it."""
    config = options_config(
        options,
        place="kv_connector_extra_config",
        block_tokens=vllm_config.cache_config.block_size,
    )
    return _share_of(config, vllm_config)


def _share_of(config: Config, vllm_config: VllmConfig) -> Config:
    """Capacities are the whole engine's, and ranks share them; replicas have a directory each."""
    parallel = vllm_config.parallel_config
    replica, cold = getattr(parallel, "data_parallel_rank", 0), config.tiers.cold
    if replica and cold is not None:
        place = cold.directory / f"replica-{replica}"
        tiers = config.tiers.model_copy(
            update={"cold": cold.model_copy(update={"directory": place})}
        )
        config = config.model_copy(update={"tiers": tiers})
    return _part_of(config, 1, parallel.world_size)


def _part_of(config: Config, part: int, whole: int) -> Config:
    """That part of the capacities."""
    tiers: dict[str, Any] = {}
    for name, tier in (("host", config.tiers.host), ("cold", config.tiers.cold)):
        if tier is not None:
            tiers[name] = tier.model_copy(update={"capacity": tier.capacity * part // whole})
    return config.model_copy(update={"tiers": config.tiers.model_copy(update=tiers)})


def layout_of(vllm_config: VllmConfig, group: KVCacheGroupSpec, config: Config) -> Layout:
    """What a block of a group of this rank's cache is."""
    parallel = vllm_config.parallel_config
    spec, layers = group.kv_cache_spec, len(group.layer_names)
    model, engine = vllm_config.model_config, vllm_config.cache_config
    token_bytes = spec.page_size_bytes // spec.block_size
    # Nothing here looks into a block: to the store it is bytes for each token and layer.
    geometry = KVGeometry(layers=layers, kv_heads=1, head_dim=token_bytes, dtype="uint8",
                          form=Form.LATENT)  # fmt: skip
    kind = {
        "vllm": _version(),
        "spec": type(spec).__name__,
        "kv_heads": getattr(spec, "num_kv_heads", None),
        "head_dim": getattr(spec, "head_size", None),
        "window": getattr(spec, "sliding_window", None),
        "dtype": str(getattr(spec, "dtype", None)),
        "cache_dtype": str(engine.cache_dtype),
        "layers": group.layer_names,
        "rank": f"{parallel.rank % parallel.world_size} of {parallel.world_size}",
        "hashes": str(engine.prefix_caching_hash_algo),
        "device": str(vllm_config.device_config.device_type),
        "cpu": _cpu() if str(vllm_config.device_config.device_type) == "cpu" else None,
        "model_dtype": str(model.dtype),
        "overrides": repr(getattr(model, "hf_overrides", None)),
    }
    return Layout(
        geometry=geometry,
        block_tokens=spec.block_size,
        model=str(model.model).rstrip("/").rpartition("/")[2],
        revision=weights_of(model),
        engine_layout=json.dumps(kind, sort_keys=True),
        targets=config.pages.targets,
    )


def weights_of(model: ModelConfig) -> str:
    """What tells a checkpoint from another: its commit, or a hash over its files."""
    commit = getattr(model.hf_config, "_commit_hash", None)
    place = Path(model.model)
    if not place.is_dir():
        return f"{model.revision} {commit}"
    return weights_identity(place, more=str(model.quantization))


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def host_identity() -> dict[str, str | None]:
    """What of this installation a block's bytes depend on."""
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    return {"vllm": _version(), "device": device, "cpu": _cpu() if device == "cpu" else None}


def _cpu() -> str:
    """What vLLM's CPU attention packs K and V by: the instructions this machine has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return os.uname().machine
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    wanted = [flag for flag in flags.split() if flag.startswith(("avx", "amx"))]
    return f"{os.uname().machine} {' '.join(sorted(wanted))}"
