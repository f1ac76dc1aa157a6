"""vLLM: `TierKVConnector`, a KV connector whose prefixes outlive the engine.

::

    LLM(model, kv_transfer_config={
        "kv_connector": "TierKVConnector", "kv_connector_module_path": "tierkv.engines.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": "4GiB", "cold": "64GiB", "directory": "kv"}})

Names are vLLM's own block hashes, which hold the tokens, the adapter, images and the salt of a
request; bytes are whole blocks of the engine's cache, in the engine's own form, which nothing here
looks into. Each rank has a store (`opening`) and moves its bytes (`worker`, `loading`); it tells
the scheduler what it has (`mirror`), which decides what is loaded and saved (`scheduler`, `split`,
`wishes`) and tells it in a `step`. `connector` is what vLLM calls. A fault costs blocks, which vLLM
computes again.
"""

__all__ = ["TierKVConnector"]


def __getattr__(name: str) -> object:
    """The connector, which imports vLLM; the sides do not."""
    if name != "TierKVConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tierkv.engines.vllm.connector import TierKVConnector

    return TierKVConnector
