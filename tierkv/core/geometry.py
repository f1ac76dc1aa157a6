"""Geometry: the one place that converts tokens, blocks, pages and bytes.

A **block** is `block_tokens` consecutive tokens, all layers of one tensor-parallel rank. Its
canonical bytes are ``(layers, planes, block_tokens, heads, dim)``: a K plane then a V plane per
layer, or one latent plane for MLA (DeepSeek-V2, section 2.1). Seen from the store a block is
``(layers, block_layer_bytes)`` bytes; what lies inside a layer may be an engine's own order, as
long as `Layout.engine_layout` names it.

Pages, by tier (sizes in `PageTargets` are targets, rounded here to whole tokens and blocks):

=====  ==========================================  ==================================
tier   page                                        layout inside
=====  ==========================================  ==================================
hot    one layer, one plane, `hot_page_tokens`     a contiguous slice of a block
warm   `warm_page_blocks` blocks, all layers       ``(layers, warm_page_blocks, block_layer_bytes)``
cold   `cold_page_warm_pages` warm pages           warm pages, each behind its header
=====  ==========================================  ==================================

A warm page is layer-major, so one layer of a run of blocks in it is one contiguous copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from tierkv.core.errors import GeometryMismatch

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

#: O_DIRECT and page-table granularity: every page that may touch a disk is a multiple of it.
ALIGN_BYTES: Final = 4096

DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "float8_e4m3": 1,
        "float8_e5m2": 1,
        "int8": 1,
        "uint8": 1,
    }
)


class Form(StrEnum):
    """How a model keeps its cache: K and V per head, or one latent per token (MLA)."""

    KV = "kv"
    LATENT = "latent"


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one model's KV cache, as one tensor-parallel rank sees it.

    `kv_heads` counts the whole model: equal to the query heads is MHA, 1 is MQA, between is GQA.
    For `Form.LATENT` set `kv_heads=1` and `head_dim` to the latent width (`kv_lora_rank +
    qk_rope_head_dim`); every rank then keeps the whole latent. `value_dim` differs from
    `head_dim` in models whose V is narrower than K.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    form: Form = Form.KV
    value_dim: int | None = None
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "tp_size"):
            _check_count(name, getattr(self, name))
        if self.value_dim is not None:
            _check_count("value_dim", self.value_dim)
        try:
            object.__setattr__(self, "form", Form(self.form))
        except ValueError:
            raise GeometryMismatch(f"form {self.form!r} is not one of kv, latent") from None
        if self.value_dim == self.head_dim:
            object.__setattr__(self, "value_dim", None)  # one shape, one fingerprint
        if not 0 <= self.tp_rank < self.tp_size:
            raise GeometryMismatch(f"tp_rank {self.tp_rank} is outside 0..{self.tp_size - 1}")
        if self.dtype not in DTYPE_BYTES:
            raise GeometryMismatch(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if self.form is Form.LATENT and (self.kv_heads != 1 or self.value_dim is not None):
            raise GeometryMismatch("a latent cache has kv_heads=1 and no value_dim")
        if self.kv_heads % self.tp_size and self.tp_size % self.kv_heads:
            raise GeometryMismatch(
                f"{self.kv_heads} KV heads neither divide over {self.tp_size} ranks "
                "nor replicate to them"
            )

    @property
    def heads(self) -> int:
        """KV heads this rank keeps; heads are replicated when there are fewer than ranks."""
        return max(1, self.kv_heads // self.tp_size)

    @property
    def plane_dims(self) -> tuple[int, ...]:
        """Elements per token of each plane of one layer: (K, V), or (latent,)."""
        key = self.heads * self.head_dim
        if self.form is Form.LATENT:
            return (key,)
        return (key, self.heads * (self.value_dim or self.head_dim))

    @property
    def token_layer_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return sum(self.plane_dims) * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers of this rank."""
        return self.layers * self.token_layer_bytes


@dataclass(frozen=True, slots=True)
class PageTargets:
    """Wanted page sizes in bytes; `PagePlan` says what they become for a model."""

    hot_bytes: int = 16 * KIB
    warm_bytes: int = 2 * MIB
    cold_bytes: int = 64 * MIB

    def __post_init__(self) -> None:
        for name in ("hot_bytes", "warm_bytes", "cold_bytes"):
            _check_count(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class PagePlan:
    """The three page sizes as they come out for one model; see the module's table."""

    layers: int
    block_tokens: int
    block_layer_bytes: int
    hot_page_tokens: int
    hot_page_bytes: int
    warm_page_blocks: int
    warm_page_bytes: int
    cold_page_warm_pages: int

    @classmethod
    def of(
        cls, geometry: KVGeometry, *, block_tokens: int = 16, targets: PageTargets | None = None
    ) -> PagePlan:
        """Round the targets: down to what fits, but never below one token, block or warm page."""
        _check_count("block_tokens", block_tokens)
        targets = targets or PageTargets()
        itemsize = DTYPE_BYTES[geometry.dtype]
        widths = [dim * itemsize for dim in geometry.plane_dims]
        block_layer_bytes = block_tokens * sum(widths)
        # One plane of some tokens; where V is narrower than K, as many bytes as both of them take,
        # so that pages are equal and cut a block's layer without a rest.
        token_bytes = widths[0] if len(set(widths)) == 1 else sum(widths)
        hot_tokens = _largest_divisor(block_tokens, targets.hot_bytes // token_bytes)
        hot_bytes = hot_tokens * token_bytes
        warm_blocks = max(1, targets.warm_bytes // (geometry.layers * block_layer_bytes))
        warm_bytes = align_up(warm_blocks * geometry.layers * block_layer_bytes, ALIGN_BYTES)
        return cls(
            layers=geometry.layers,
            block_tokens=block_tokens,
            block_layer_bytes=block_layer_bytes,
            hot_page_tokens=hot_tokens,
            hot_page_bytes=hot_bytes,
            warm_page_blocks=warm_blocks,
            warm_page_bytes=warm_bytes,
            cold_page_warm_pages=max(1, targets.cold_bytes // warm_bytes),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.layers * self.block_layer_bytes

    @property
    def hot_pages_per_block(self) -> int:
        """Hot pages that one block takes in HBM."""
        return self.block_bytes // self.hot_page_bytes

    @property
    def cold_page_bytes(self) -> int:
        """Payload bytes of one cold page (its headers not counted)."""
        return self.cold_page_warm_pages * self.warm_page_bytes

    @property
    def warm_page_shape(self) -> tuple[int, int, int]:
        """A warm page's payload as bytes: (layers, warm_page_blocks, block_layer_bytes)."""
        return (self.layers, self.warm_page_blocks, self.block_layer_bytes)

    @property
    def warm_payload_bytes(self) -> int:
        """Bytes of a warm page that hold blocks; the rest, under 4 KiB, is padding."""
        return self.warm_page_blocks * self.block_bytes

    def blocks_in(self, tokens: int) -> int:
        """Whole blocks in `tokens` tokens; a partial tail is not a block."""
        return tokens // self.block_tokens

    def tokens_in(self, blocks: int) -> int:
        """Tokens in `blocks` whole blocks."""
        return blocks * self.block_tokens

    def hot_blocks_in(self, capacity_bytes: int) -> int:
        """Blocks that fit a device budget of `capacity_bytes`."""
        return capacity_bytes // (self.hot_pages_per_block * self.hot_page_bytes)

    def warm_pages_in(self, capacity_bytes: int) -> int:
        """Whole warm pages that fit `capacity_bytes` of host memory."""
        return capacity_bytes // self.warm_page_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that must be equal for two blocks of bytes to mean the same thing."""

    geometry: KVGeometry
    block_tokens: int = 16
    model: str = ""
    revision: str = ""
    codec: str = "raw"
    engine_layout: str = "canonical"
    targets: PageTargets = field(default_factory=PageTargets)

    def __post_init__(self) -> None:
        _check_count("block_tokens", self.block_tokens)

    @property
    def pages(self) -> PagePlan:
        """Page sizes for this layout."""
        return PagePlan.of(self.geometry, block_tokens=self.block_tokens, targets=self.targets)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 over the identity of this layout; 32 bytes. Page targets are not part of it.

        Fields are written as length-prefixed ``name=value``, so no two layouts collide by joining.
        """
        fields = {f"geometry.{k}": v for k, v in asdict(self.geometry).items()}
        fields |= {
            "block_tokens": self.block_tokens,
            "model": self.model,
            "revision": self.revision,
            "codec": self.codec,
            "engine_layout": self.engine_layout,
        }
        digest = hashlib.sha256(b"tierkv/layout/1")
        for name in sorted(fields):
            item = f"{name}={fields[name]}".encode("utf-8", "surrogatepass")
            digest.update(len(item).to_bytes(4, "little") + item)
        return digest.digest()


def align_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GeometryMismatch(f"{name} must be a whole number of at least 1, got {value!r}")


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`; 1 if there is none."""
    return next((d for d in range(min(number, max(1, limit)), 0, -1) if number % d == 0), 1)
