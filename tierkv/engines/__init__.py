"""Engines: an engine's words for a cache, and the store's. One file per engine, one line here.

Nothing is imported until an engine is asked for by name, or by `import tierkv.engines.<name>`.
"""

from tierkv.core.registry import Registry

ENGINES = Registry(
    "engines",
    {
        "lmcache": "tierkv.engines.lmcache.adapter:TierKVL2Adapter",
        "sglang": "tierkv.engines.sglang:TierKVStorage",
        "transformers": "tierkv.engines.transformers:TieredCache",
        "vllm": "tierkv.engines.vllm.connector:TierKVConnector",
    },
)
