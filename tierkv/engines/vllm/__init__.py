"""vLLM: `TierKVConnector`, a KV connector whose prefixes outlive the engine.

::

    LLM(model, kv_transfer_config={
        "kv_connector": "TierKVConnector", "kv_connector_module_path": "tierkv.engines.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": "4GiB", "cold": "64GiB", "directory": "kv"}})

Names are vLLM's own block hashes, which hold the tokens, the adapter, images and the salt of a
request; bytes are whole blocks of the engine's cache, in the engine's own form, which nothing here
looks into. Each rank has a store (`opening`) and moves its bytes (`worker`, `loading`, `saving`);
it tells the scheduler what it has (`mirror`), which decides what is loaded and saved (`scheduler`,
`split`, `wishes`) and tells it in a `step`. `connector` is what vLLM calls. A fault costs blocks,
which vLLM computes again.

Beside the connector there are three smaller hooks for vLLM's own offloading, each a file:
`secondary_tier` (tierkv under vLLM's CPU tier), `cache_policy` (a policy of ours in it) and
`offloading_spec` (both put together, and vLLM's tiers made to work on the CPU).
"""

from importlib import import_module
from typing import Final

__all__ = ["TierKVConnector"]

#: What vLLM asks for by name. These import vLLM, and only when they are asked for.
_MODULES: Final = {
    "TierKVConnector": "tierkv.engines.vllm.connector",
    "TierKVSecondaryTier": "tierkv.engines.vllm.secondary_tier",
    "TierKVCachePolicy": "tierkv.engines.vllm.cache_policy",
    "TierKVOffloadingSpec": "tierkv.engines.vllm.offloading_spec",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_MODULES[name]), name)
    return found
