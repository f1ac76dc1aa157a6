"""The store behind a connector: one in a process, whichever role asks first.

vLLM makes a connector for the scheduler and one for the worker. With the executor `uni` both live
in one process, and so both have the same store. Its layout says all that gives the bytes of a block
their meaning: the model and its weights, the shapes and types of the cache, the engine's version
and how the engine lays a block out.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import xxhash
from pydantic import ValidationError

from tierkv.config import Config, load_config
from tierkv.core.errors import ConfigError, GeometryMismatch
from tierkv.core.geometry import Form, KVGeometry, Layout
from tierkv.store import Store

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

#: What `kv_connector_extra_config` may hold.
_OPTIONS: Final = ("config", "host", "cold", "directory")
#: Weights up to this size are read whole to know them; of larger files parts are.
_WHOLE_BYTES: Final = 1 << 30
_PART_BYTES: Final = 1 << 20


@dataclass(slots=True)
class _Shared:
    store: Store
    users: int


_stores: dict[str, _Shared] = {}
_lock = threading.Lock()


def shared_store(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Store:
    """The store for an engine; give it back by `release_shared`.

    Raises ConfigError and GeometryMismatch for an engine that it cannot serve, with the cure.
    """
    parallel = vllm_config.parallel_config
    if parallel.world_size > 1 or parallel.distributed_executor_backend != "uni":
        raise ConfigError(
            f"vLLM runs {parallel.world_size} workers by the executor "
            f"{parallel.distributed_executor_backend!r}; tierkv needs its scheduler and its one "
            "worker in one process; cure: --distributed-executor-backend uni, and on the CPU "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0 as well"
        )
    hashes = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if not hashes.startswith("sha256"):
        raise ConfigError(
            f"vLLM names blocks by {hashes}, which a prompt can be made to forge; cure: "
            "--prefix-caching-hash-algo sha256"
        )
    config = config_of(vllm_config.kv_transfer_config.kv_connector_extra_config, vllm_config)
    layout = layout_of(vllm_config, kv_cache_config, config)
    name = f"{layout.fingerprint.hex()} {config.model_dump_json()}"
    with _lock:
        shared = _stores.get(name)
        if shared is None:
            shared = _stores[name] = _Shared(Store.open(config, layout), 0)
        shared.users += 1
        return shared.store


def release_shared(store: Store) -> None:
    """The last one to give a store back closes it, and makes it durable."""
    with _lock:
        for name, shared in list(_stores.items()):
            if shared.store is store:
                shared.users -= 1
                if not shared.users:
                    del _stores[name]
                    store.close()


def config_of(options: Mapping[str, Any], vllm_config: VllmConfig) -> Config:
    """The configuration in `kv_connector_extra_config`: a file's, or a few capacities."""
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ConfigError(
            f"kv_connector_extra_config: unknown {', '.join(unknown)}; known: {', '.join(_OPTIONS)}"
        )
    if "config" in options:
        config = load_config(options["config"])
    else:
        tiers: dict[str, Any] = {
            "device": {"capacity": 0, "device": "cpu"},
            "host": {"capacity": options.get("host", "4GiB")},
        }
        if "directory" in options:
            cold = {"capacity": options.get("cold", "64GiB"), "directory": options["directory"]}
            tiers["cold"] = cold
        try:
            config = Config.model_validate({"tiers": tiers})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"kv_connector_extra_config: {place}: {first['msg']}") from None
    size = vllm_config.cache_config.block_size
    return config.model_copy(update={"block_tokens": size})


def layout_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config) -> Layout:
    """What a block of this engine's cache is.

    GeometryMismatch where the cache has groups of layers that do not go together.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise GeometryMismatch(
            f"the model's cache has {len(groups)} groups of layers (sliding windows, Mamba); "
            "tierkv serves models of one; cure: serve this model without it"
        )
    spec, layers = groups[0].kv_cache_spec, len(groups[0].layer_names)
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
        "dtype": str(getattr(spec, "dtype", None)),
        "cache_dtype": str(engine.cache_dtype),
        "layers": groups[0].layer_names,
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
        revision=weights_identity(model),
        engine_layout=json.dumps(kind, sort_keys=True),
        targets=config.pages.targets,
    )


def weights_identity(model: ModelConfig) -> str:
    """What tells a checkpoint from another: its commit, or a hash over its files."""
    commit = getattr(model.hf_config, "_commit_hash", None)
    place = Path(model.model)
    if not place.is_dir():
        return f"{model.revision} {commit}"
    hasher = xxhash.xxh3_128(str(model.quantization).encode())
    for path in sorted(place.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".pt", ".gguf") or path.name == "config.json":
            hasher.update(f"{path.name} {path.stat().st_size}\n".encode())
            for part in _parts(path):
                hasher.update(part)
    return hasher.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    """A file, or of a large one its time of change and pieces from all over."""
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= _WHOLE_BYTES:
            while part := file.read(16 * _PART_BYTES):
                yield part
            return
        yield str(status.st_mtime_ns).encode()
        for number in range(64):
            file.seek(number * (status.st_size - _PART_BYTES) // 63)
            yield file.read(_PART_BYTES)


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _cpu() -> str:
    """What vLLM's CPU attention packs K and V by: the instructions this machine has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return os.uname().machine
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    wanted = [flag for flag in flags.split() if flag.startswith(("avx", "amx"))]
    return f"{os.uname().machine} {' '.join(sorted(wanted))}"
