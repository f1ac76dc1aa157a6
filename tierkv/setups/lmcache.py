"""LMCache: `TierKVL2Adapter` beneath its server, and vLLM as that server's client."""

from __future__ import annotations

import json
from typing import ClassVar

from tierkv.core.geometry import GIB
from tierkv.setups import checks
from tierkv.setups.base import EngineSetup, Start, shell

#: Where the server listens, which is where its connector in vLLM looks.
_PORT = 5555


class LmcacheSetup(EngineSetup):
    """See the module."""

    name: ClassVar[str] = "lmcache"
    packages: ClassVar[tuple[str, ...]] = ("lmcache",)
    tested: ClassVar[str] = "0.5.6"
    install: ClassVar[str] = "pip install 'lmcache==0.5.6', tierkv beside it"
    loads: ClassVar[str] = "from tierkv.engines.lmcache import TierKVL2Adapter"
    #: LMCache's first level is host memory as well, and what hits come from first.
    host_share: ClassVar[float] = 0.25
    block_words: ClassVar[str] = "LMCache's own --chunk-size is used instead of this."
    shm_bytes_min: ClassVar[int] = checks.ENGINE_SHM_BYTES

    def start_lines(self, start: Start) -> list[str]:
        """The server, and `vllm serve` with LMCache's connector."""
        plugin = {
            "type": "plugin",
            "module_path": "tierkv.engines.lmcache",
            "class_name": "TierKVL2Adapter",
            "adapter_params": {"config": str(start.config)},
        }
        size = f"{start.engine_host_bytes / GIB:.2f}"
        server = ["lmcache", "server", "--port", str(_PORT), "--l1-size-gb", size,
                  "--eviction-policy", "LRU", "--l2-adapter", json.dumps(plugin)]  # fmt: skip
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://localhost",
                "lmcache.mp.port": _PORT,
            },
        }
        client = ["vllm", "serve", start.model, "--kv-transfer-config", json.dumps(transfer)]
        return [shell(server), "# in another terminal, when the server listens:", shell(client)]
