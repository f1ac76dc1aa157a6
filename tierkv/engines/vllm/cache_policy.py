"""`TierKVCachePolicy`: an eviction policy of tierkv in vLLM's own CPU tier.

::

    "kv_connector_extra_config": {"cpu_bytes_to_use": 68719476736,
        "eviction_policy": "TierKVCachePolicy",
        "cache_policy_module_path": "tierkv.engines.vllm.cache_policy"}

`TierKVCachePolicy` is `lru`; `"eviction_policy": "tierkv-NAME"` takes any policy of
`tierkv.plan.policies`, or of another package. vLLM gives a policy nothing but its capacity, so the
choice is in the name.

To a policy a chunk is its slot in vLLM's tier. A prefix is touched leaf first when its request
ends, so that it is given up from its end. What vLLM pins is not evictable, and an eviction takes
all that it was asked for or changes nothing; so a policy may not refuse here, and learns what comes
only when there is room for it. Single owner: the scheduler's thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from tierkv.core.errors import ConfigError
from tierkv.plan.policies import POLICIES
from tierkv.plan.policies.base import About

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext

    from tierkv.plan.policies.base import EvictionPolicy

_PREFIX: Final = "tierkv-"


class TierKVCachePolicy(CachePolicy):  # type: ignore[misc]
    """See the module. Invariants: every chunk is tracked by its slot, and no two have the same."""

    #: A name of `tierkv.plan.policies`.
    policy_name: ClassVar[str] = "lru"

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._pages = cache_capacity
        self._clear()

    def _clear(self) -> None:
        self._policy: EvictionPolicy = POLICIES.load(self.policy_name)(self._pages)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._keys: dict[int, OffloadKey] = {}
        self._evictable: set[OffloadKey] = set()

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """The chunk of that name."""
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        """A chunk was given a slot; it is the most recent."""
        self._chunks[key] = chunk
        self._keys[chunk.chunk_id] = key
        self._policy.expect((key,))
        self._policy.track(chunk.chunk_id, time.monotonic_ns(), About(key))
        if chunk.ref_cnt == 0:
            self._evictable.add(key)

    def remove(self, key: OffloadKey) -> None:
        """A chunk is gone. Raises KeyError for one that is not there."""
        chunk = self._chunks.pop(key)
        del self._keys[chunk.chunk_id]
        self._evictable.discard(key)
        self._policy.forget(chunk.chunk_id)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Chunks were used, the first of a prefix first; unknown ones are ignored."""
        self._use(list(keys))

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """A request has used these chunks, over all groups from its first to its last."""
        self._use(order_request_keys(key_groups, req_context))

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """Give up exactly `n` chunks; None, changing nothing, where that cannot be."""
        free = len(self._evictable) - sum(key in self._evictable for key in protected)
        if n > free:
            return None
        slots = self._policy.evict(
            n,
            lambda slot: (key := self._keys[slot]) in self._evictable and key not in protected,
            time.monotonic_ns(),
            must=True,
        )
        assert len(slots) == n, "the policy lost track of a chunk"
        given_up = []
        for slot in slots:
            key = self._keys.pop(slot)
            self._evictable.remove(key)
            given_up.append((key, self._chunks.pop(key)))
        return given_up

    def clear(self) -> None:
        """Forget every chunk, and what was learned."""
        self._clear()

    def mark_evictable(self, key: OffloadKey) -> None:
        """Nobody reads or writes the chunk any more."""
        self._evictable.add(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """Somebody reads the chunk; it keeps its rank."""
        self._evictable.remove(key)

    def _use(self, keys: Sequence[OffloadKey]) -> None:
        chunks = (self._chunks.get(key) for key in reversed(keys))
        slots = [chunk.chunk_id for chunk in chunks if chunk is not None]
        self._policy.touch(slots, time.monotonic_ns())


def __getattr__(name: str) -> type[TierKVCachePolicy]:
    """``tierkv-NAME``: the class with that policy of ours."""
    if name.startswith(_PREFIX):
        chosen = name.removeprefix(_PREFIX)
        try:
            POLICIES.load(chosen)
        except ConfigError as error:
            raise AttributeError(f"eviction_policy {name!r}: {error}") from None
        return type(name, (TierKVCachePolicy,), {"policy_name": chosen})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
