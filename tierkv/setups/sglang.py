"""SGLang: `TierKVStorage`, a storage backend of its hierarchical cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

from tierkv.core.geometry import Form
from tierkv.doctor_hardware import Finding, State
from tierkv.setups import checks
from tierkv.setups.base import Asked, EngineSetup, Start, shell

#: Tokens of a page that are worth a transfer.
_PAGE_TOKENS: Final = 64


class SglangSetup(EngineSetup):
    """See the module."""

    name: ClassVar[str] = "sglang"
    packages: ClassVar[tuple[str, ...]] = ("sglang",)
    tested: ClassVar[str] = "0.5.23"
    install: ClassVar[str] = "pip install 'sglang==0.5.23' (a GPU with CUDA 13), tierkv beside it"
    loads: ClassVar[str] = "from tierkv.engines.sglang import TierKVStorage"
    known_faults: ClassVar[Mapping[str, str]] = checks.TORCHVISION
    block_words: ClassVar[str] = "SGLang's own --page-size is used instead of this."
    shm_bytes_min: ClassVar[int] = checks.ENGINE_SHM_BYTES

    def start_lines(self, start: Start) -> list[str]:
        """The server with a hierarchical cache over tierkv."""
        storage = {
            "backend_name": "tierkv",
            "module_path": "tierkv.engines.sglang",
            "class_name": "TierKVStorage",
            "interface_v1": 1,
            "config": str(start.config),
        }
        command = ["python", "-m", "sglang.launch_server", "--model-path", start.model,
                   "--page-size", str(_PAGE_TOKENS),
                   "--enable-hierarchical-cache", "--hicache-mem-layout", "page_first",
                   "--hicache-storage-backend", "dynamic",
                   "--hicache-storage-backend-extra-config", json.dumps(storage)]  # fmt: skip
        words = "# SGLang's own host pool comes on top of --dram; --hicache-ratio says how large."
        return [shell(command), words]

    def own_findings(self, asked: Asked, facts: Mapping[str, str]) -> Iterator[Finding]:
        """Pages of several ranks, which SGLang does not give a backend for every model."""
        size = asked.arguments.get("page-size", "")
        tokens = int(size) if size.isdecimal() and 0 < int(size) <= 4096 else 1
        if tokens == 1:
            detail = "not said: with most backends SGLang takes 1 token, each moved alone"
            yield Finding("page size", State.NOTE, detail, f"--page-size {_PAGE_TOKENS}")
        else:
            yield Finding("page size", State.OK, f"{tokens} tokens, as asked for")
        yield from checks.model(asked.config, asked.model, tokens)
        names = ("tp", "tp-size", "tensor-parallel-size")
        ranks = [asked.arguments.get(name, "1") for name in names]
        geometry = asked.model.geometry if asked.model is not None else None
        is_latent = geometry is not None and geometry.form is Form.LATENT
        if is_latent and set(ranks) != {"1"} and "enable-dp-attention" not in asked.arguments:
            detail = "latent attention (MLA) over several ranks: one of them writes for all"
            yield Finding("ranks", State.PROBLEM, detail, "--enable-dp-attention")
