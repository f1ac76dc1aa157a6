"""What is known of a model before any engine has it: from its `config.json`, or from its name.

A model is a directory with a checkpoint, a name of `tierkv.core.models`, or an id of a hub: then
its `config.json` is looked for where the hub's client keeps what it loaded. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from tierkv.core.errors import ConfigError, GeometryMismatch
from tierkv.core.geometry import DTYPE_BYTES, Form, KVGeometry
from tierkv.core.models import MODELS, model_geometry

Settings: TypeAlias = Mapping[str, object]

_CONFIG_BYTES_MAX: Final = 4 << 20
#: What follows a known model's name in the names of its variants that have the same shape.
_VARIANT: Final = r"(-(instruct|chat|base|it|hf|v[0-9.]+))*"

#: Settings whose presence says that some layers keep no K and V of every token.
_STATE_KEYS: Final = (
    *("mamba_d_state", "ssm_state_size", "state_size", "linear_num_key_heads", "mamba_num_heads"),
    *("hybrid_override_pattern", "linear_attn_config", "rwkv_hidden_size"),
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as it was named, with its shape where that is known.

    `odd_layers` says in words what is not full attention; `source` where the shape came from.
    """

    name: str
    geometry: KVGeometry | None = None
    source: str = ""
    has_state_layers: bool = False
    odd_layers: str = ""
    is_directory: bool = False
    is_geometry_only: bool = False  # a name of ours, that no engine can load

    @property
    def shown(self) -> str:
        """The name on one printable line."""
        return "".join(c if c.isprintable() else "?" for c in self.name)[:200]

    @property
    def for_engine(self) -> str:
        """The name as an engine is to be told it: a directory by its absolute path."""
        return str(Path(self.name).expanduser().absolute()) if self.is_directory else self.name


def model_facts(name: str) -> ModelFacts:
    """All that can be known of a model by its name.

    Raises ConfigError for a directory that holds no model, and for a name with parts (``:tp8``)
    that `model_geometry` refuses.
    """
    place = Path(name).expanduser()
    if place.is_dir():
        path = place / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"--model: {name} holds no config.json; name the checkpoint's own directory"
            )
        return _described(name, path, is_directory=True)
    head = name.partition(":")[0].lower()
    if head in MODELS:
        return ModelFacts(name, model_geometry(name), "the published shape", is_geometry_only=True)
    path_in_cache = next(_cached(name), None)
    if path_in_cache is not None:
        return _described(name, path_in_cache, is_directory=False)
    last = name.rpartition("/")[2].lower().removeprefix("meta-")
    for known, geometry in MODELS.items():
        if re.fullmatch(re.escape(known) + _VARIANT, last):
            return ModelFacts(name, geometry, f"the published shape of {known}")
    return ModelFacts(name)


def _described(name: str, path: Path, *, is_directory: bool) -> ModelFacts:
    try:
        if path.stat().st_size > _CONFIG_BYTES_MAX:
            raise ConfigError(f"--model: {path} is too large for a config.json")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: {path}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--model: {path} is not a JSON object")
    nested = settings.get("text_config")
    text = {**settings, **nested} if isinstance(nested, dict) else settings
    odd = _odd_layers(text)
    has_state = any(text.get(key) for key in _STATE_KEYS) or "linear" in odd or "mamba" in odd
    return ModelFacts(
        name,
        _geometry(text),
        "its config.json",
        has_state_layers=has_state,
        odd_layers=odd or ("layers that keep a state" if has_state else ""),
        is_directory=is_directory,
    )


def _geometry(text: Settings) -> KVGeometry | None:
    """The shape that a config.json says; None where it says none that we know."""
    layers = _count(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = _count(text, "num_attention_heads", "n_head", "n_heads")
    hidden = _count(text, "hidden_size", "n_embd", "d_model")
    dtype = text.get("dtype") or text.get("torch_dtype") or "float32"
    if not layers or not heads or dtype not in DTYPE_BYTES:
        return None
    try:
        latent, rope = _count(text, "kv_lora_rank"), _count(text, "qk_rope_head_dim")
        if latent:
            return KVGeometry(layers, 1, latent + rope, dtype=str(dtype), form=Form.LATENT)
        dim = _count(text, "head_dim") or hidden // heads
        kv_heads = _count(text, "num_key_value_heads", "num_kv_heads")
        kv_heads = kv_heads or (1 if text.get("multi_query") else heads)
        return KVGeometry(layers, kv_heads, dim, dtype=str(dtype))
    except GeometryMismatch:
        return None


def _count(text: Settings, *names: str) -> int:
    for name in names:
        value = text.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24:
            return value
    return 0


def _odd_layers(text: Settings) -> str:
    """Which layers are not full attention, in words."""
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        odd = sorted({str(kind)[:40] for kind in kinds} - {"full_attention", "attention"})
        return f"{len(kinds)} layers, some of them {', '.join(odd)}" if odd else ""
    window = text.get("sliding_window")
    if isinstance(window, int) and window and text.get("use_sliding_window", True):
        return f"sliding windows of {window} tokens"
    return ""


def _cached(name: str) -> Iterator[Path]:
    """The config.json files of a hub's model that its client keeps, the newest first."""
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        return
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    try:
        folder = hub.expanduser() / f"models--{name.replace('/', '--')}" / "snapshots"
        yield from sorted(
            folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True
        )
    except (OSError, RuntimeError):
        return
