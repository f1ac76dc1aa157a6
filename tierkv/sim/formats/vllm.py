"""vLLM's KV events; see `kv_events.py` for what becomes of them."""

from __future__ import annotations

from pathlib import Path

from tierkv.sim.formats.kv_events import KvEvents


class VLLM(KvEvents):
    """Reads vLLM's KV events."""

    name = "vllm"

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        return any(kind in head for kind in (b'"BlockStored"', b'"AllBlocksCleared"'))
