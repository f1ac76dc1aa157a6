"""SGLang's KV events; see `kv_events.py` for what becomes of them.

Their lines look like vLLM's, so that this format is taken only when it is named.
"""

from __future__ import annotations

from pathlib import Path

from tierkv.sim.formats.kv_events import KvEvents


class SGLang(KvEvents):
    """Reads SGLang's KV events."""

    name = "sglang"

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        return False
