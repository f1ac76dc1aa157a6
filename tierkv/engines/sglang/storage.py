"""What SGLang calls: its words on one side, ours on the other. See the package.

Salts. SGLang 0.5.23 seeds the hash of a request's first page with its salt, its adapter and its
extra key (`storage_namespace_seed`), so a tenant's names are a tenant's own, and a backend is told
nothing else of whose a page is. An SGLang that does not do so gives two tenants one name for one
text, which no backend can tell apart; it is refused, unless the option `one_tenant` says that there
is but one.

Which thread calls what: prefetches, their queries and backups are three threads of SGLang's; the
scheduler's registers pools, clears and closes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sglang
import torch
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from tierkv.config import Config
from tierkv.core.errors import ConfigError
from tierkv.engines.options import config_of, part_of
from tierkv.engines.sglang.host import Form, HostPool, TensorPlace, form_of, places_in
from tierkv.engines.sglang.layout import arguments_of, block_tokens_of, layout_of, weights_of
from tierkv.engines.sglang.pages import Pages, Place

logger = logging.getLogger(__name__)

_PLACE: Final = "--hicache-storage-backend-extra-config"
#: What SGLang has for itself in the same mapping.
_RESERVED: Final = frozenset({
    "backend_name", "module_path", "class_name", "interface_v1", "prefetch_threshold",
    "prefetch_timeout_base", "prefetch_timeout_per_ki_token", "hicache_storage_pass_prefix_keys",
    "tp_lcm_size", "file_storage_path",
})  # fmt: skip
#: What is ours besides `options.OPTIONS`.
_MORE: Final = ("namespace", "weights", "one_tenant")
_KV: Final = PoolName.KV.value
_STATS_MAX: Final = 4096
#: Warm pages that a pool has at least, however small its share is.
_PAGES_MIN: Final = 4


@dataclass(slots=True)
class _Pool:
    """A host pool, and the pages that are stored of it."""

    name: str
    host: HostPool
    form: Form
    #: None until it is opened, and of a pool that has no bytes of its own.
    pages: Pages | None = None


class TierKVStorage(HiCacheStorage):  # type: ignore[misc]
    """Pages of one rank, for each of its host pools in a store of its own."""

    def __init__(
        self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None
    ) -> None:
        extra = dict(storage_config.extra_config or {})
        self._options = {name: value for name, value in extra.items() if name not in _RESERVED}
        self._storage_config = storage_config
        self._by_pointers = bool(extra.get("interface_v1", 0))
        self._namespace = str(self._options.get("namespace", "default"))
        self._pools: dict[str, _Pool] = {}
        self._opening = threading.Lock()
        self._weights: str | None = None
        self._stats: dict[str, list[float]] = {}
        self._check(self._config(block_tokens=1))

    def _check(self, config: Config) -> None:
        """Refuse what cannot be served, with the cure."""
        one = self._storage_config
        if self._namespace not in config.namespaces:
            known = ", ".join(config.namespaces)
            raise ConfigError(
                f"{_PLACE}: namespace: unknown {self._namespace!r}; configured: {known}"
            )
        if not self._options.get("one_tenant") and not has_salts():
            raise ConfigError(
                f"SGLang {sglang.__version__} leaves the salt of a request out of its pages' "
                "names, so that tenants would share them; cure: SGLang 0.5.23 or later, or "
                f'"one_tenant": true in {_PLACE} where there is but one'
            )
        if one.is_mla_model and one.tp_size > 1:
            raise ConfigError(
                f"SGLang writes the pages of an MLA model on one of its {one.tp_size} ranks, and "
                "expects all to read them; a tierkv directory belongs to one process; cure: "
                "--enable-dp-attention, with which each rank writes its own"
            )

    def _config(self, *, block_tokens: int) -> Config:
        return config_of(self._options, place=_PLACE, block_tokens=block_tokens, more=_MORE)

    # ---- pools

    def register_mem_pool_host(self, mem_pool_host: HostPool) -> None:
        """The pool of K and V."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(_KV, mem_pool_host, by_pointers=self._by_pointers)

    def register_mem_host_pool_v2(self, host_pool: HostPool, host_pool_name: str) -> None:
        """A pool beside it, or itself again under its name."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = PoolName(host_pool_name).value
        if name != _KV:
            self._register(name, host_pool, by_pointers=True)

    def _register(self, name: str, host: HostPool, *, by_pointers: bool) -> None:
        with self._opening:
            old = self._pools.pop(name, None)
            if old is not None and old.pages is not None:
                old.pages.close()
            self._pools[name] = _Pool(name, host, form_of(host, by_pointers=by_pointers))

    def on_host_pools_registered(self) -> None:
        """Open the stores; raises where that cannot be, and SGLang does not start then."""
        with self._opening:
            self._open([pool for pool in self._pools.values() if pool.pages is None])

    def _open(self, pools: Iterable[_Pool]) -> None:
        """Open stores, which share the configured capacities as the host pools share memory."""
        whole = sum(_host_bytes(pool) for pool in self._pools.values())
        opened: list[_Pool] = []
        try:
            for pool in pools:
                if pool.form.page_bytes:
                    pool.pages = self._pages(pool, _host_bytes(pool) / whole)
                    pool.pages.open()
                    opened.append(pool)
        except BaseException:
            for pool in self._pools.values():
                if pool.pages is not None:
                    pool.pages.close()
                    pool.pages = None
            raise

    def _pages(self, pool: _Pool, share: float) -> Pages:
        config = self._config(block_tokens=block_tokens_of(pool.host, pool.form))
        arguments = server_arguments()
        if self._weights is None:
            option, model = self._options.get("weights"), self._storage_config.model_name
            self._weights = weights_of(option, arguments, model)
        layout = layout_of(
            pool.name,
            pool.host,
            pool.form,
            self._storage_config,
            version=str(sglang.__version__),
            weights=self._weights,
            arguments=arguments_of(arguments),
            targets=config.pages.targets,
        )
        if share < 1:
            least = _PAGES_MIN * layout.pages.warm_page_bytes
            config = part_of(config, share, least_bytes=least, has_log=pool.name == _KV)
        return Pages(config, layout, namespace=self._namespace)

    def _pool(self, name: str) -> _Pool | None:
        """A pool, whose store is opened if it is not: pools may come later than the others."""
        pool = self._pools.get(name)
        if pool is None or pool.pages is not None or not pool.form.page_bytes:
            return pool
        with self._opening:
            if pool.pages is None:
                try:
                    self._open([pool])
                except Exception:  # a pool that cannot be served has no pages
                    logger.exception("not opened pool=%s", name)
                    self._pools.pop(name, None)
                    return None
        return pool

    # ---- the plain interface: tensors

    def get(
        self,
        key: str,
        target_location: torch.Tensor | None = None,
        target_sizes: object = None,
    ) -> torch.Tensor | None:
        """Fill a tensor with a page, or give a new one; None if it is not stored."""
        targets = None if target_location is None else [target_location]
        return self.batch_get([key], targets)[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: object = None,
    ) -> list[torch.Tensor | None]:
        """As `get`, for each page."""
        pool = self._pool(_KV)
        if pool is None or not pool.form.is_flat:
            return [None] * len(keys)  # with pointers a page's bytes have another order
        targets = target_locations
        if targets is None:
            targets = [pool.host.get_dummy_flat_data_page() for _ in keys]
        found = self._tensors(pool, keys, targets, self._read)
        return [target if has else None for target, has in zip(targets, found, strict=True)]

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Store a page; True if it is stored now, or was."""
        return value is not None and self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        """As `set`, for all pages; those before the first that is not stored are."""
        pool = self._pool(_KV)
        if pool is None or values is None or not pool.form.is_flat:
            return False
        return all(self._tensors(pool, keys, values, self._write))

    def exists(self, key: str) -> bool:
        """Whether a page is stored."""
        return self.batch_exists([key]) == 1

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many of the first pages are stored. Waits for no disk."""
        pool = self._pool(_KV)
        return 0 if pool is None or pool.pages is None else pool.pages.leading(keys)

    # ---- pointers into the host pool

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Fill pages of the host pool; which were."""
        return self._indexed(_KV, keys, host_indices, self._read)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Store pages of the host pool; which are stored now."""
        return self._indexed(_KV, keys, host_indices, self._write)

    # ---- more pools than one

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The longest prefix that all pools can give, and those that each can."""
        transfers = pool_transfers or []
        kv = self._pool(_KV)
        # A pool without bytes of its own holds whatever the others do.
        is_logical = kv is not None and not kv.form.page_bytes and bool(transfers)
        pages = len(keys) if is_logical else self.batch_exists(keys)
        hits: dict[str, int] = {PoolName.KV: pages} if pages else {}
        lengths = list(range(1, pages + 1))
        for transfer in transfers:
            if not lengths:
                break
            if transfer.hit_policy is PoolHitPolicy.BLOCK_GROUPS:
                continue  # such a pool never keeps a prefix back, and need not be reported
            possible = self._possible(keys[:pages], transfer)
            if possible:
                hits[transfer.name] = possible[-1]
            lengths = sorted(set(lengths).intersection(possible))
        return PoolTransferResult(lengths[-1] if lengths else 0, hits, lengths)

    def _possible(self, keys: list[str], transfer: PoolTransfer) -> list[int]:
        """Lengths of prefixes, in order, that a pool can give."""
        pool = self._pool(PoolName(transfer.name).value)
        if pool is None or pool.pages is None:
            return []
        if transfer.hit_policy is PoolHitPolicy.ALL_PAGES:
            return list(range(1, pool.pages.leading(keys) + 1))
        has, window = pool.pages.has(keys), max(1, len(transfer.keys or ()))
        return [n for n in range(1, len(keys) + 1) if all(has[max(0, n - window) : n])]

    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """Fill pages of pools; which were, by pool."""
        return {
            one.name: self._indexed(one.name, one.keys or [], one.host_indices, self._read)
            for one in transfers
        }

    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """Store pages of pools; which are stored now, by pool."""
        return {
            one.name: self._indexed(one.name, one.keys or [], one.host_indices, self._write)
            for one in transfers
        }

    # ---- the rest

    def clear(self) -> bool:
        """Make everything a miss, on the disk too; whether that was done."""
        try:
            done = [pool.pages.clear() for pool in self._pools.values() if pool.pages]
        except Exception:  # what could not be cleared stays closed, and is a miss in this life
            logger.exception("not cleared")
            return False
        return all(done)

    def close(self) -> None:
        """Make everything durable and let it go; from here on all is a miss."""
        for pool in self._pools.values():
            if pool.pages is not None:
                pool.pages.close()

    def get_stats(self) -> object:
        """Pages and GB/s of the batches since this was last asked; None unless SGLang measures."""
        if not self._storage_config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        stats, self._stats = self._stats, {}
        return StorageMetrics(
            prefetch_pgs=[int(pages) for pages in stats.get("read_pages", [])],
            backup_pgs=[int(pages) for pages in stats.get("write_pages", [])],
            prefetch_bandwidth=stats.get("read_rate", []),
            backup_bandwidth=stats.get("write_rate", []),
        )

    def snapshot(self) -> dict[str, dict[str, dict[str, int]]]:
        """By pool what `Store.snapshot` says."""
        return {name: pool.pages.snapshot() for name, pool in self._pools.items() if pool.pages}

    def _indexed(
        self, name: str, keys: list[str], indices: torch.Tensor | None, move: _Move
    ) -> list[bool]:
        pool = self._pool(PoolName(name).value)
        if pool is None:
            return [False] * len(keys)
        if pool.pages is None:
            return [True] * len(keys)  # it has no bytes to move
        try:
            places = places_in(pool.host, pool.form, len(keys), indices)
        except Exception:  # a pool that cannot say where its pages are has none
            logger.exception("no places pool=%s", name)
            places = None
        if places is None:
            logger.error("other indices than pages pool=%s pages=%d", name, len(keys))
            return [False] * len(keys)
        return move(pool, keys, places)

    def _tensors(
        self, pool: _Pool, keys: list[str], tensors: Sequence[torch.Tensor], move: _Move
    ) -> list[bool]:
        """Move pages from or to tensors; one of another size is as one that is not stored."""
        if pool.pages is None:
            return [True] * len(keys)
        places = [TensorPlace(pool.form, tensor) for tensor in tensors]
        fit = [number for number, place in enumerate(places) if place.fits]
        moved = move(pool, [keys[number] for number in fit], [places[number] for number in fit])
        done = {number for number, has in zip(fit, moved, strict=True) if has}
        return [number in done for number in range(len(keys))]

    def _read(self, pool: _Pool, keys: list[str], places: Sequence[Place]) -> list[bool]:
        assert pool.pages is not None
        start = time.perf_counter()
        done = pool.pages.read(keys, places)
        self._note("read", sum(done), pool.form, time.perf_counter() - start)
        return done

    def _write(self, pool: _Pool, keys: list[str], places: Sequence[Place]) -> list[bool]:
        assert pool.pages is not None
        start = time.perf_counter()
        done = pool.pages.write(keys, places)
        self._note("write", sum(done), pool.form, time.perf_counter() - start)
        return done

    def _note(self, what: str, pages: int, form: Form, seconds: float) -> None:
        stats = self._stats
        if self._storage_config.enable_storage_metrics and pages:
            for name, value in (
                ("pages", pages),
                ("rate", pages * form.page_bytes / seconds / 1e9),
            ):
                row = stats.setdefault(f"{what}_{name}", [])
                if len(row) < _STATS_MAX:
                    row.append(value)


_Move = Callable[[_Pool, list[str], Sequence[Place]], list[bool]]


def has_salts() -> bool:
    """Whether this SGLang has salts, adapters and extra keys in its pages' names."""
    seed = getattr(utils, "storage_namespace_seed", None)
    if seed is None:
        return False
    seeds = {seed(None, None), seed("a", None), seed(None, "a"), seed("a", "a"), seed("aa", None)}
    return len(seeds) == 5


def server_arguments() -> object:
    """SGLang's arguments, if this is a process of a server."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except (ImportError, ValueError):  # it has none, or not yet
        return None


def _host_bytes(pool: _Pool) -> int:
    """How much memory the engine gave to a pool."""
    pages = getattr(pool.host, "page_num", None) or 1
    return max(1, int(pages) * pool.form.page_bytes)
