"""LMCache: `TierKVL2Adapter`, a second level of `lmcache server` that is verified and survives.

::

    lmcache server --l1-size-gb 60 --l2-adapter '{"type": "plugin",
        "module_path": "tierkv.engines.lmcache", "class_name": "TierKVL2Adapter",
        "adapter_params": {"cold": "1TiB", "directory": "kv"}}'

LMCache cuts prompts into chunks, gives each a key and keeps its first level (host memory) itself;
what is here is below that. A chunk is opaque bytes, and a block of tierkv with no parent. `forms`
opens a store for each form of chunk, `shelf` is one such store in a chunk's words, `lanes` are the
threads, `adapter` is what LMCache calls. A fault is a chunk that is not found.
"""

__all__ = ["TierKVL2Adapter"]


def __getattr__(name: str) -> object:
    """The adapter, which imports LMCache; the rest does not."""
    if name != "TierKVL2Adapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tierkv.engines.lmcache.adapter import TierKVL2Adapter

    return TierKVL2Adapter
