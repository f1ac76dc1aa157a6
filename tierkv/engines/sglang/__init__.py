"""SGLang: `TierKVStorage`, a HiCache storage backend whose pages outlive the engine.

::

    python -m sglang.launch_server ... --enable-hierarchical-cache --hicache-mem-layout page_first \
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
            "backend_name": "tierkv", "module_path": "tierkv.engines.sglang",
            "class_name": "TierKVStorage", "interface_v1": 1,
            "host": "4GiB", "cold": "64GiB", "directory": "kv"}'

SGLang names a page by a hash that is chained over the pages before it, seeded by the request's
salt, adapter and extra key; bytes are whole pages of its host pool, in its own form, which nothing
here looks into. `pages` keeps pages by name, `host` reads and writes them where the pool has them,
`layout` says what their bytes mean, `storage` is what SGLang calls. A fault is a page less, which
SGLang computes again.
"""

__all__ = ["TierKVStorage"]


def __getattr__(name: str) -> object:
    """The backend, which imports SGLang; the rest does not."""
    if name != "TierKVStorage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tierkv.engines.sglang.storage import TierKVStorage

    return TierKVStorage
