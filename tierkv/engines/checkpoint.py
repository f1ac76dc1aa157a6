"""Which model is this: the layout of a loaded transformers model, down to its weights.

The KV of a prefix is a function of the token ids, the configuration and every weight. A layout
therefore carries a digest of the configuration and of **all** bytes of all parameters and
buffers (xxh3-128 reads them at memory speed), so that another checkpoint under the same name,
a merged adapter or a changed RoPE base never shares a block. The digest is kept per model and
made again when a cheap stamp of the weights (addresses, versions and a sample) has changed.

The last part of the checkpoint's name is in the layout as well: people read it, and two names
never share blocks either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import torch
import xxhash

from tierkv.core.errors import GeometryMismatch
from tierkv.core.geometry import Form, KVGeometry, Layout, PageTargets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Facts about a configuration that do not change what a prefix's KV is.
_NOT_IDENTITY: Final = frozenset(
    {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "use_cache"}
)

#: RoPE kinds whose rotation of early tokens depends on how long the prompt turned out to be.
_LENGTH_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})

#: Elements per tensor in the stamp that tells whether a digest is still good.
_SAMPLE_ELEMENTS: Final = 256


@dataclass(frozen=True, slots=True)
class _Known:
    stamp: bytes
    digest: str
    geometry: KVGeometry


#: The models of this process; an entry goes with its model.
_models: WeakKeyDictionary[torch.nn.Module, _Known] = WeakKeyDictionary()


def layout_of(
    model: PreTrainedModel, *, block_tokens: int = 16, targets: PageTargets | None = None
) -> Layout:
    """The layout of the KV cache of a loaded model.

    K and V are of every token in every layer, those with a sliding window too; where the model
    caches latents (MLA), a latent is. Raises GeometryMismatch for other kinds of cache: linear
    attention, indexed, shared or unlike layers, encoder-decoder, or a RoPE that depends on length.
    """
    _refuse_unsupported(model.config)
    known = _known(model)
    name = str(getattr(model.config, "_name_or_path", "") or model.config.model_type)
    return Layout(
        geometry=known.geometry,
        block_tokens=block_tokens,
        model=name.rstrip("/").rpartition("/")[2],
        revision=known.digest,
        targets=targets or PageTargets(),
    )


def rotated_dim(config: PreTrainedConfig, geometry: KVGeometry) -> int:
    """Elements at the end of a latent that transformers caches as its V; 0 without latents."""
    is_latent = geometry.form is Form.LATENT
    return int(config.get_text_config(decoder=True).qk_rope_head_dim) if is_latent else 0


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """Tokens that a query sees, by layer; None where it is all before it."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    _types, settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return [setting.get("sliding_window") for setting in settings]


def model_digest(model: PreTrainedModel) -> str:
    """32 hex digits over the configuration and every byte of parameters and buffers.

    Raises GeometryMismatch if weights are not in memory (the `meta` device).
    """
    return _known(model).digest


def _known(model: PreTrainedModel) -> _Known:
    """What is known of a model, found again where its weights have changed."""
    stamp = _stamp(model)
    known = _models.get(model)
    if known is None or known.stamp != stamp:
        hasher = xxhash.xxh3_128(_config_bytes(model.config))
        for name, tensor in _tensors(model):
            hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            hasher.update(flat.cpu().numpy().data)
        known = _models[model] = _Known(stamp, hasher.hexdigest(), _geometry(model))
    return known


def _geometry(model: PreTrainedModel) -> KVGeometry:
    """The shape of what the model caches for a token, found by giving it one.

    Raises GeometryMismatch where layers cache unlike things.
    """
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    shapes = [
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[1], layer.values.shape[3],
         str(layer.keys.dtype).removeprefix("torch."))
        for layer in cache.layers
    ]  # fmt: skip
    if len(set(shapes)) > 1 or shapes[0][0] != shapes[0][2]:
        raise GeometryMismatch(
            f"{config.model_type}: layers cache (heads, K, heads, V, dtype) {sorted(set(shapes))};"
            " TieredCache needs one shape in all of them"
        )
    heads, key_dim, _heads, value_dim, dtype = shapes[0]
    latent = (1, getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None))
    if (heads, key_dim, value_dim) == latent:
        return KVGeometry(len(shapes), 1, key_dim + value_dim, dtype=dtype, form=Form.LATENT)
    return KVGeometry(len(shapes), heads, key_dim, dtype=dtype, value_dim=value_dim)


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    def refuse(what: str) -> GeometryMismatch:
        return GeometryMismatch(
            f"{config.model_type}: {what}; TieredCache supports models that cache K and V, or"
            " latents, of every token: MHA, GQA, MQA and MLA, with full or sliding attention"
        )

    if config.is_encoder_decoder:
        raise refuse("this is an encoder-decoder model")
    text = config.get_text_config(decoder=True)
    # What the engine itself would build for this model says which kind each layer is.
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if others := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        names = sorted(kind.__name__ for kind in others)
        raise refuse(f"some layers are of another kind (linear, indexed, shared): {names}")
    ropes = _rope_types(getattr(text, "rope_parameters", None)) & _LENGTH_DEPENDENT_ROPE
    if ropes:
        raise refuse(f"its RoPE ({', '.join(ropes)}) rotates a prefix differently as prompts grow")


def _rope_types(parameters: object) -> set[str]:
    """Every `rope_type` in the RoPE settings, which may be nested by layer type."""
    if not isinstance(parameters, Mapping):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type == "meta":
            raise GeometryMismatch(
                f"weight {name} is not in memory (device 'meta'): a model that is partly on disk"
                " cannot be told apart from another one"
            )
        if tensor.numel():
            yield name, tensor.detach()


def _stamp(model: PreTrainedModel) -> bytes:
    """Changes whenever weights were replaced, written in place, or merged."""
    facts: list[str] = []
    samples: list[torch.Tensor] = []
    for name, tensor in _tensors(model):
        # Inference tensors count no versions; the sample below is all there is for them.
        version = 0 if tensor.is_inference() else tensor._version
        facts.append(f"{name}:{tensor.data_ptr()}:{version}")
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // _SAMPLE_ELEMENTS)
        samples.append(flat[::step].to(torch.float64))
    hasher = xxhash.xxh3_128("\n".join(facts).encode())
    hasher.update(_config_bytes(model.config))
    devices = {sample.device for sample in samples}
    for device in sorted(devices, key=str):
        joined = torch.cat([sample for sample in samples if sample.device == device])
        hasher.update(joined.cpu().numpy().data)
    return hasher.digest()


def _config_bytes(config: PreTrainedConfig) -> bytes:
    settings = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_IDENTITY}
    return json.dumps(settings, sort_keys=True, default=str).encode()
