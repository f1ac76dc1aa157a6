"""Costs: how long prefill, decode and links take, and what they cost in money and energy.

Times come from a roofline: the larger of what arithmetic takes at a share of the GPU's peak, and
what reading the weights and the cache from its memory takes. A calibration file (JSON or YAML, any
fields of `Costs` beside `model` and `gpu`) replaces what was measured. One tensor-parallel rank is
modelled: work and bytes are those of a rank, prices and energy those of all ranks.

Prices are assumptions of the order of public lists, to be replaced by one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from tierkv.core.errors import ConfigError
from tierkv.core.models import model_geometry
from tierkv.core.registry import known_name


class Gpu(NamedTuple):
    """Public figures of one device: dense 16-bit arithmetic, its own memory, board power."""

    flops_per_second: float
    memory_bytes_per_second: float
    watts: float
    usd_per_hour: float
    link_bytes_per_second: float


#: PCIe of 16 lanes in one direction: 16 or 32 GT/s a lane, 128 of 130 bits (PCIe base
#: specifications 4.0 and 5.0), a tenth taken off for packet headers.
_PCIE_4: Final = 16 * 16e9 / 8 * 128 / 130 * 0.9
_PCIE_5: Final = 2 * _PCIE_4

GPUS: Final[Mapping[str, Gpu]] = {
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s BF16 dense, 3.35 TB/s, 700 W.
    "h100": Gpu(989e12, 3.35e12, 700, 3.0, _PCIE_5),
    # NVIDIA H200 SXM data sheet: 989 TFLOP/s, 4.8 TB/s, 700 W.
    "h200": Gpu(989e12, 4.8e12, 700, 3.6, _PCIE_5),
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s, 2.039 TB/s, 400 W.
    "a100": Gpu(312e12, 2.039e12, 400, 1.8, _PCIE_4),
    # NVIDIA L40S data sheet: 362 TFLOP/s dense, 864 GB/s, 350 W.
    "l40s": Gpu(362e12, 864e9, 350, 1.0, _PCIE_4),
    # Intel Xeon 8480+: 56 cores at 2.0 GHz, 2,048 BF16 operations a cycle (AMX), eight channels
    # of DDR5-4800, 350 W. Its "link" is a copy within memory.
    "cpu": Gpu(56 * 2.0e9 * 2048, 307.2e9, 350, 1.2, 100e9),
}


class Size(NamedTuple):
    """What a model's weights are, beside its KV geometry."""

    parameters: float
    active_parameters: float
    query_heads: int
    score_dim: float  # mean width of what a query meets in K and in V


#: From the published model cards and `config.json` files.
SIZES: Final[Mapping[str, Size]] = {
    "deepseek-v3": Size(671e9, 37e9, 128, (192 + 128) / 2),
    "falcon-7b": Size(7.22e9, 7.22e9, 71, 64),
    "gpt2": Size(124e6, 124e6, 12, 64),
    "llama-3-8b": Size(8.03e9, 8.03e9, 32, 128),
    "llama-3-70b": Size(70.6e9, 70.6e9, 64, 128),
    "mistral-7b": Size(7.25e9, 7.25e9, 32, 128),
    "qwen3-8b": Size(8.19e9, 8.19e9, 32, 128),
    "smollm2-135m": Size(134.5e6, 134.5e6, 9, 64),
}

#: What a large prefill reaches of the peak, and decoding of the memory's rate.
_COMPUTE_SHARE: Final = 0.5
_MEMORY_SHARE: Final = 0.8
_WEIGHT_BYTES: Final = 2


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One direction between two tiers. A rate of 0 stands for a link that takes no time."""

    bytes_per_second: float
    latency_seconds: float = 0.0

    def seconds(self, size_bytes: int) -> float:
        """What so many bytes take on the idle link."""
        moving = size_bytes / self.bytes_per_second if self.bytes_per_second else 0.0
        return self.latency_seconds + moving


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that takes time, money or energy. See the module."""

    prefill_seconds_per_token: float
    #: A query with one key, in all layers and heads.
    prefill_seconds_per_pair: float
    #: Reading the weights once: no prefill and no step of decoding takes less.
    weights_seconds: float
    decode_seconds_per_context_token: float
    flops_per_token: float
    flops_per_pair: float
    cold_to_host: Link
    host_to_cold: Link
    host_to_device: Link
    device_to_host: Link
    gpus: int = 1
    usd_per_gpu_hour: float = 3.0
    # Memory of rented machines differs by about this much an hour and GiB between sizes that are
    # otherwise alike; local NVMe is some fifty times cheaper.
    usd_per_dram_gib_hour: float = 0.004
    usd_per_nvme_gib_hour: float = 0.00008
    joules_per_flop: float = 0.7e-12
    # About 4 pJ a bit for stacked memory, 15 for DIMMs, 5 for a link; a drive of 8 W at 7 GB/s.
    joules_per_device_byte: float = 32e-12
    joules_per_host_byte: float = 120e-12
    joules_per_link_byte: float = 40e-12
    joules_per_nvme_byte: float = 1.2e-9
    #: A data-centre drive of 3.84 TB, for drive writes per day.
    drive_bytes: int = 3_840_000_000_000

    @classmethod
    def roofline(cls, model: str = "llama-3-8b", gpu: str = "h100") -> Self:
        """From public figures. Raises ConfigError for an unknown model or GPU."""
        geometry, device = model_geometry(model), _gpu(gpu)
        size, ranks = SIZES[model.strip().partition(":")[0].lower()], geometry.tp_size
        pair = 4 * geometry.layers * size.query_heads * size.score_dim
        rate = device.flops_per_second * _COMPUTE_SHARE * ranks
        memory = device.memory_bytes_per_second * _MEMORY_SHARE
        link = Link(device.link_bytes_per_second, 10e-6)
        return cls(
            prefill_seconds_per_token=2 * size.active_parameters / rate,
            prefill_seconds_per_pair=pair / rate,
            weights_seconds=size.active_parameters * _WEIGHT_BYTES / (memory * ranks),
            decode_seconds_per_context_token=geometry.token_bytes / memory,
            flops_per_token=2 * size.active_parameters,
            flops_per_pair=pair,
            # Samsung PM9A3 data sheet: 6.9 GB/s read, 4.1 GB/s written; about 0.1 ms a read.
            cold_to_host=Link(6.9e9, 100e-6),
            host_to_cold=Link(4.1e9, 30e-6),
            host_to_device=link,
            device_to_host=link,
            gpus=ranks,
            usd_per_gpu_hour=device.usd_per_hour,
            joules_per_flop=device.watts / device.flops_per_second,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a calibration file. Raises ConfigError where it cannot be read or used."""
        try:
            found = _decoded(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
        model, gpu = found.pop("model", "llama-3-8b"), found.pop("gpu", "h100")
        base = msgspec.to_builtins(cls.roofline(str(model), str(gpu)))
        try:
            return msgspec.convert({**base, **found}, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}: {error}") from None

    def prefill_seconds(self, tokens: int, context_tokens: int) -> float:
        """Computing `tokens` tokens behind a context that is there; 0 for none."""
        if tokens <= 0:
            return 0.0
        return max(
            self.weights_seconds,
            self.prefill_seconds_per_token * tokens
            + self.prefill_seconds_per_pair * _pairs(tokens, context_tokens),
        )

    def prefill_joules(self, tokens: int, context_tokens: int) -> float:
        """The energy of the same."""
        pairs = _pairs(tokens, context_tokens)
        return self.joules_per_flop * (self.flops_per_token * tokens + self.flops_per_pair * pairs)

    def step_seconds(self, batch: int, context_tokens: int) -> float:
        """One step of decoding for `batch` requests with so many tokens of context together."""
        compute = self.prefill_seconds_per_token * batch
        reading = self.weights_seconds + self.decode_seconds_per_context_token * context_tokens
        return max(compute, reading)

    def decode_joules(
        self, tokens: int, batch: int, context_tokens: int, token_bytes: int
    ) -> float:
        """`tokens` tokens of one request that is decoded beside others."""
        weights = self.flops_per_token / 2 * _WEIGHT_BYTES / batch
        read = weights + context_tokens * token_bytes * self.gpus
        flops = self.flops_per_token + self.flops_per_pair * context_tokens
        return tokens * (read * self.joules_per_device_byte + flops * self.joules_per_flop)


def _pairs(tokens: int, context_tokens: int) -> float:
    return tokens * context_tokens + tokens * (tokens + 1) / 2


def _gpu(name: str) -> Gpu:
    try:
        return GPUS[known_name(name, GPUS)]
    except ValueError as error:
        raise ConfigError(f"gpu: {error}") from None


def _decoded(path: Path) -> dict[str, object]:
    if path.suffix == ".json":
        found: object = msgspec.json.decode(path.read_bytes())
    else:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        try:
            found = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        except YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(found, dict):
        raise ValueError("a calibration is a mapping of names to numbers")
    return {str(name): value for name, value in found.items()}
