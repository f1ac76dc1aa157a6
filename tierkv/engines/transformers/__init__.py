"""transformers: `TieredCache`, a `past_key_values` whose prefixes outlive the process.

::

    cache = TieredCache.open(model, inputs, store=store)
    out = model.generate(**inputs, past_key_values=cache)
    cache.commit(out)  # optional: the next chat turn skips the answer too

`cache.py` has the cache, `prompts.py` what may be asked of it, `ledger.py` which tokens its rows
hold, `static.py` and `offloaded.py` other kinds of layers, `stores.py` stores by directory.
"""

from tierkv.engines.checkpoint import layout_of
from tierkv.engines.reuse import Reuse
from tierkv.engines.transformers.cache import TieredCache
from tierkv.engines.transformers.stores import close_stores, open_store

__all__ = ["Reuse", "TieredCache", "close_stores", "layout_of", "open_store"]
