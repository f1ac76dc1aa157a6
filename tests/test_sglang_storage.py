"""`TierKVStorage` against SGLang's wheel: its base class, its factory, its file backend as oracle.

Run by the Python of `.venv-sglang`, as `make engines` does. Pools, hashes and controllers are
SGLang's own; see `tools/sglang_cpu.py`.
"""

from __future__ import annotations

import inspect
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import sglang_cpu as cpu

cpu.ready()

from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheFile,
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from tierkv.core.errors import ConfigError
from tierkv.engines import ENGINES
from tierkv.engines.sglang import TierKVStorage
from tierkv.engines.sglang.layout import weights_of

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

PAGES = 12
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
NAMES = [f"{number:064x}" for number in range(8)]
few = settings(max_examples=20)


def a_config(extra: dict[str, Any] | None = None, **more: Any) -> HiCacheStorageConfig:
    plain = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
        "attn_cp_size": 1, "is_mla_model": False, "enable_storage_metrics": False,
        "is_page_first_layout": False, "model_name": "org/a-model",
    }  # fmt: skip
    return HiCacheStorageConfig(**{**plain, **more}, extra_config=extra)


def made(directory: Path, extra: dict[str, Any] | None = None, **more: Any) -> Any:
    """A backend as SGLang makes it, without pools yet."""
    options = {
        "backend_name": "tierkv", "module_path": "tierkv.engines.sglang",
        "class_name": "TierKVStorage", "host": "8MiB", "cold": "64MiB",
        "directory": str(directory), **(extra or {}),
    }  # fmt: skip
    return StorageBackendFactory.create_backend("dynamic", a_config(options, **more), None)


@contextmanager
def opened(directory: Path, pool: Any, extra: Any = None, **more: Any) -> Iterator[Any]:
    """A backend with a pool of K and V, closed in the end."""
    backend = made(directory, extra, **more)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    try:
        yield backend
    finally:
        backend.close()


def a_pool(layout: str = "page_first", dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    device = cpu.device_pool(dtype=dtype, layers=layers, heads=2)
    pool = cpu.host_pool(device, tokens=PAGES * cpu.PAGE_TOKENS, layout=layout)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return pool


def page_of(pool: Any, page: int) -> torch.Tensor:
    """A copy of a page of a pool."""
    return pool.get_data_page(page * cpu.PAGE_TOKENS, flat=True).clone()


def indices(pages: list[int]) -> torch.Tensor:
    size = cpu.PAGE_TOKENS
    return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])


@pytest.fixture(scope="module")
def pool() -> Any:
    return a_pool()


# ---- what SGLang asks of a backend


def test_nothing_of_the_base_class_is_left_abstract_and_every_signature_is_its_own() -> None:
    assert issubclass(TierKVStorage, HiCacheStorage)
    assert not TierKVStorage.__abstractmethods__
    for name, base in vars(HiCacheStorage).items():
        if not inspect.isfunction(base):
            continue
        assert name in vars(TierKVStorage), f"{name} is not ours"
        ours = inspect.signature(getattr(TierKVStorage, name)).parameters
        theirs = inspect.signature(base).parameters
        assert list(ours) == list(theirs)
        assert [one.default for one in ours.values()] == [one.default for one in theirs.values()]


def test_the_factory_makes_it_and_the_registry_knows_it(tmp_path: Path) -> None:
    assert isinstance(made(tmp_path), TierKVStorage)
    assert ENGINES.load("sglang") is TierKVStorage


@pytest.mark.parametrize(
    ("extra", "more", "says"),
    [
        ({"hosts": "1GiB"}, {}, r"extra-config: unknown hosts; known: config, host, cold"),
        ({"host": "much"}, {}, r"extra-config: tiers.host.capacity"),
        ({"namespace": "alice"}, {}, r"unknown 'alice'; configured: default"),
        ({}, {"is_mla_model": True, "tp_size": 2}, r"MLA model on one of its 2 ranks"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    tmp_path: Path, extra: Any, more: Any, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        made(tmp_path, extra, **more)


def test_what_is_sglangs_in_the_options_is_left_to_it(tmp_path: Path) -> None:
    made(tmp_path, {"prefetch_threshold": 1, "interface_v1": 1, "file_storage_path": "x"})


def test_an_sglang_that_drops_salts_is_refused_unless_there_is_one_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(utils, "storage_namespace_seed")
    with pytest.raises(ConfigError, match="leaves the salt"):
        made(tmp_path)
    made(tmp_path, {"one_tenant": True})


def test_a_directory_in_use_is_refused_when_pools_are_registered(tmp_path: Path, pool: Any) -> None:
    with opened(tmp_path, pool):
        second = made(tmp_path)
        second.register_mem_pool_host(pool)
        with pytest.raises(Exception, match="use"):
            second.on_host_pools_registered()


# ---- the plain interface is as SGLang's file backend

ops = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["set", "get"]), st.sampled_from(NAMES), st.integers(0, 3)),
        st.tuples(st.just("exists"), st.sampled_from(NAMES)),
        st.tuples(st.just("batch_exists"), st.lists(st.sampled_from(NAMES))),
        st.tuples(st.just("batch_get"), st.lists(st.sampled_from(NAMES))),
        st.tuples(st.just("batch_set"), st.lists(st.sampled_from(NAMES), unique=True)),
        st.tuples(st.sampled_from(["clear", "restart"])),
    ),
    max_size=16,
)


@contextmanager
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A directory for ours, and one for the file backend."""
    root = Path(tempfile.mkdtemp(prefix="sglang-"))
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(root / "theirs"))
    try:
        yield root / "ours", root / "theirs"
    finally:
        shutil.rmtree(root)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two answers say the same."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@few
@given(ops=ops)
def test_plain_answers_are_those_of_the_file_backend(layout: str, ops: list[Any]) -> None:
    pool = a_pool(layout)
    with pytest.MonkeyPatch.context() as patch, places(patch) as (ours_at, _):
        ours = made(ours_at)
        ours.register_mem_pool_host(pool)
        theirs = HiCacheFile(a_config())
        for op, *args in ops:
            if op == "restart":
                ours.close()
                ours = made(ours_at)
                ours.register_mem_pool_host(pool)
                ours.on_host_pools_registered()
                theirs = HiCacheFile(a_config())
            elif op == "clear":
                assert ours.clear() == theirs.clear()
            elif op == "set":
                value = page_of(pool, args[1])
                assert ours.set(args[0], value) == theirs.set(args[0], value)
            elif op == "get":
                found = [
                    one.get(args[0], pool.get_dummy_flat_data_page()) for one in (ours, theirs)
                ]
                assert same(*found)
            elif op == "batch_get":
                found = [
                    one.batch_get(args[0], [pool.get_dummy_flat_data_page() for _ in args[0]])
                    for one in (ours, theirs)
                ]
                assert same(*found)
            elif op == "batch_set":
                values = [page_of(pool, number) for number in range(len(args[0]))]
                assert ours.batch_set(args[0], values) == theirs.batch_set(args[0], values)
            else:
                assert getattr(ours, op)(*args) == getattr(theirs, op)(*args)
        ours.close()


def test_a_page_of_another_size_or_no_page_is_a_miss(tmp_path: Path, pool: Any) -> None:
    with opened(tmp_path, pool) as backend:
        assert not backend.set(NAMES[0], torch.zeros(7))
        assert not backend.set(NAMES[0])
        assert backend.set(NAMES[0], page_of(pool, 0))
        assert backend.get(NAMES[0], torch.zeros(7)) is None
        assert torch.equal(backend.get(NAMES[0]), page_of(pool, 0))
        apart = torch.zeros(2, page_of(pool, 0).numel()).T[:, 0]
        assert torch.equal(backend.get(NAMES[0], apart), page_of(pool, 0))
        assert torch.equal(apart, page_of(pool, 0))


# ---- pointers into the host pool


@pytest.mark.parametrize("by_pointers", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@few
@given(seed=st.integers(0, 1 << 32))
def test_v1_moves_pages_between_the_pool_and_the_store(
    layout: str, dtype: torch.dtype, by_pointers: int, seed: int
) -> None:
    rng, pool, known = random.Random(seed), a_pool(layout, dtype), dict[str, torch.Tensor]()
    with pytest.MonkeyPatch.context() as patch, places(patch) as (at, _):
        for _ in range(2):  # two lives
            with opened(at, pool, {"interface_v1": by_pointers}) as backend:
                for _ in range(4):
                    names = rng.sample(NAMES, rng.randint(1, len(NAMES)))
                    pages = rng.sample(range(PAGES), len(names))
                    if rng.random() < 0.5:
                        assert backend.batch_set_v1(names, indices(pages)) == [True] * len(names)
                        for name, page in zip(names, pages, strict=True):
                            known.setdefault(name, page_of(pool, page))
                        continue
                    before = pool.kv_buffer.clone()
                    found = backend.batch_get_v1(names, indices(pages))
                    assert found == [name in known for name in names]
                    for name, page, has in zip(names, pages, found, strict=True):
                        if has:
                            assert torch.equal(page_of(pool, page), known[name])
                    others = sorted(set(range(PAGES)) - set(pages))
                    now = [page_of(pool, page) for page in others]
                    pool.kv_buffer.copy_(before)
                    assert same(now, [page_of(pool, page) for page in others])


def test_v1_with_other_indices_than_pages_is_a_miss(tmp_path: Path, pool: Any) -> None:
    with opened(tmp_path, pool, {"interface_v1": 1}) as backend:
        assert backend.batch_set_v1(NAMES[:2], indices([0])) == [False, False]
        assert backend.batch_get_v1(NAMES[:2], indices([0, 1, 2])) == [False, False]
        assert backend.batch_get([NAMES[0]], [page_of(pool, 0)]) == [None]
        assert not backend.batch_set([NAMES[0]], [page_of(pool, 0)])


# ---- more pools than one

transfers = st.lists(
    st.tuples(
        st.sampled_from([PoolName.DRAFT, PoolName.SWA]),
        st.sampled_from([PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES]),
        st.integers(0, 3),
    ),
    max_size=2,
    unique_by=lambda one: one[0],
)
sets = st.lists(
    st.tuples(
        st.sampled_from([PoolName.KV, PoolName.DRAFT, PoolName.SWA]),
        st.lists(st.sampled_from(NAMES), unique=True),
    ),
    max_size=5,
)


@few
@given(sets=sets, asked=st.lists(transfers, max_size=4), window=st.lists(st.sampled_from(NAMES)))
def test_v2_answers_are_those_of_the_file_backend(
    sets: list[Any], asked: list[Any], window: list[str]
) -> None:
    pools = {
        PoolName.KV: a_pool("page_first"),
        PoolName.DRAFT: a_pool("layer_first", layers=1),
        PoolName.SWA: a_pool("page_first_direct", torch.bfloat16),
    }
    with pytest.MonkeyPatch.context() as patch, places(patch) as (at, _):
        ours, theirs = made(at), HiCacheFile(a_config())
        for one in (ours, theirs):
            one.register_mem_pool_host(pools[PoolName.KV])
            for name, pool in pools.items():
                one.register_mem_host_pool_v2(pool, name)
            one.on_host_pools_registered()
        for name, keys in sets:
            wanted = PoolTransfer(
                name, indices(list(range(len(keys)))) if keys else None, keys=keys
            )
            if keys:
                assert ours.batch_set_v2([wanted]) == theirs.batch_set_v2([wanted])
        for transfer in asked:
            wanted = [
                PoolTransfer(name, keys=NAMES[:size], hit_policy=policy)
                for name, policy, size in transfer
            ]
            for keys in (NAMES, NAMES[:3], window):
                assert ours.batch_exists_v2(keys, wanted) == theirs.batch_exists_v2(keys, wanted)
        for name, pool in pools.items():
            read = PoolTransfer(name, indices(list(range(len(NAMES)))), keys=NAMES)
            found, pages = [], []
            for one in (ours, theirs):
                pool.kv_buffer.zero_()
                found.append(one.batch_get_v2([read]))
                pages.append(pool.kv_buffer.clone())
            assert found[0] == found[1]
            assert torch.equal(*pages)
        ours.close()


def test_v2_of_a_pool_that_comes_late_and_of_one_without_bytes(tmp_path: Path) -> None:
    logical = LogicalHostPool(PAGES * cpu.PAGE_TOKENS, cpu.PAGE_TOKENS)
    sidecar = a_pool()
    with opened(tmp_path, logical) as backend:
        assert backend.batch_exists(NAMES) == 0
        backend.register_mem_host_pool_v2(sidecar, PoolName.SWA)
        moved = PoolTransfer(PoolName.SWA, indices([0, 1]), keys=NAMES[:2])
        kv = PoolTransfer(PoolName.KV, indices([0, 1]), keys=NAMES[:2])
        assert backend.batch_set_v2([moved, kv]) == {
            PoolName.SWA: [True, True],
            PoolName.KV: [True, True],
        }
        found = backend.batch_exists_v2(NAMES, [PoolTransfer(PoolName.SWA, keys=NAMES)])
        assert (found.kv_hit_pages, found.extra_pool_hit_pages[PoolName.SWA]) == (2, 2)
        unknown = PoolTransfer(PoolName.MAMBA, indices([0]), keys=NAMES[:1])
        assert backend.batch_get_v2([unknown]) == {PoolName.MAMBA: [False]}


# ---- whose pages they are


@pytest.mark.parametrize(
    ("more", "extra"),
    [
        ({"model_name": "org/other"}, {}),
        ({"tp_size": 2}, {}),
        ({"pp_size": 2, "pp_rank": 1}, {}),
        ({"attn_cp_size": 2}, {}),
        ({"is_mla_model": True}, {}),
        ({"dp_rank": 1}, {}),
        ({}, {"weights": "others"}),
        ({}, {"interface_v1": 1}),
    ],
)
def test_what_differs_in_meaning_or_rank_shares_nothing(
    tmp_path: Path, pool: Any, more: Any, extra: Any
) -> None:
    with opened(tmp_path, pool) as backend:
        assert backend.set(NAMES[0], page_of(pool, 0))
    with opened(tmp_path, pool, extra, **more) as backend:
        assert not backend.exists(NAMES[0])
    with opened(tmp_path, pool) as backend:
        assert backend.exists(NAMES[0])


def test_pools_of_another_layout_or_type_share_nothing(tmp_path: Path, pool: Any) -> None:
    with opened(tmp_path, pool) as backend:
        assert backend.set(NAMES[0], page_of(pool, 0))
    for other in (a_pool("layer_first"), a_pool(dtype=torch.int32)):
        with opened(tmp_path, other) as backend:
            assert not backend.exists(NAMES[0])


def test_namespaces_of_a_configuration_share_nothing(tmp_path: Path, pool: Any) -> None:
    file = tmp_path / "tierkv.yaml"
    file.write_text(
        "tiers:\n  host: {capacity: 8MiB}\n  device: {capacity: 0}\n"
        f"  cold: {{capacity: 64MiB, directory: {tmp_path / 'kv'}}}\n"
        "namespaces:\n  default: {}\n  alice: {salt: a}\n"
    )
    options = {"config": str(file)}
    with opened(tmp_path, pool, options) as backend:
        assert backend.set(NAMES[0], page_of(pool, 0))
    with opened(tmp_path, pool, {**options, "namespace": "alice"}) as backend:
        assert not backend.exists(NAMES[0])


def test_salts_and_adapters_make_names_that_share_nothing() -> None:
    tokens = list(range(3 * cpu.PAGE_TOKENS))
    names = [cpu.hashes_of(tokens, salt) for salt in (None, "alice", "bob")]
    adapter = cpu.key_of(tokens)
    adapter.extra_key = "alice"
    names.append(utils.get_storage_hash_str(adapter, None, page_size=cpu.PAGE_TOKENS))
    assert len(set().union(*names)) == 4 * 3


def test_weights_are_told_apart_by_their_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"first")
    first = weights_of(str(tmp_path), None, "m")
    weights.write_bytes(b"other")
    assert weights_of(str(tmp_path), None, "m") != first
    assert weights_of(None, None, str(tmp_path)) == weights_of(None, None, str(tmp_path))
    assert weights_of(None, None, "org/model") == "org/model None None"


# ---- faults


def damage(directory: Path, seed: int) -> int:
    """Turn bits over all over the segments; how many."""
    rng, done = random.Random(seed), 0
    for file in directory.rglob("segment-*"):
        data = bytearray(file.read_bytes())
        for at in range(8192, len(data) - 512, 512):
            if rng.random() < 0.01 and any(data[at : at + 64]):
                data[at + 5] ^= 0x10
                done += 1
        file.write_bytes(data)
    return done


@pytest.mark.parametrize("by_pointers", [0, 1])
def test_damage_on_the_disk_is_a_miss_and_never_other_bytes(
    tmp_path: Path, pool: Any, by_pointers: int
) -> None:
    pages = [page_of(pool, number) for number in range(len(NAMES))]
    extra = {"interface_v1": by_pointers}
    with opened(tmp_path, pool, extra) as backend:
        assert all(backend.batch_set_v1(NAMES, indices(list(range(len(NAMES))))))
    assert damage(tmp_path, 1)
    with opened(tmp_path, pool, extra) as backend:
        found = backend.batch_get_v1(NAMES, indices(list(range(len(NAMES)))))
        assert not all(found)
        for number, has in enumerate(found):
            if has:
                assert torch.equal(page_of(pool, number), pages[number])
        assert not all(backend.batch_get_v1(NAMES, indices(list(range(len(NAMES))))))
        pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))


def test_after_close_all_is_a_miss_and_nothing_raises(tmp_path: Path, pool: Any) -> None:
    with opened(tmp_path, pool) as backend:
        assert backend.set(NAMES[0], page_of(pool, 0))
    backend.close()
    assert not backend.exists(NAMES[0])
    assert backend.get(NAMES[0], page_of(pool, 0)) is None
    assert not backend.set(NAMES[1], page_of(pool, 1))
    assert backend.batch_get_v1(NAMES[:1], indices([0])) == [False]
    assert backend.batch_exists_v2(NAMES).kv_hit_pages == 0
    assert not backend.clear()
    assert not made(tmp_path).exists(NAMES[0])


def test_threads_that_read_write_and_clear_get_the_right_bytes_or_none(
    tmp_path: Path, pool: Any
) -> None:
    wrong: list[str] = []
    with opened(tmp_path, pool) as backend:

        def work(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(60):
                number = rng.randrange(len(NAMES))
                if rng.random() < 0.5:
                    backend.set(NAMES[number], page_of(pool, number))
                else:
                    page = backend.get(NAMES[number], pool.get_dummy_flat_data_page())
                    if page is not None and not torch.equal(page, page_of(pool, number)):
                        wrong.append(NAMES[number])

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            assert backend.clear()
        for thread in threads:
            thread.join()
        assert not wrong
        assert backend.clear()
        assert backend.batch_exists(NAMES) == 0
    with opened(tmp_path, pool) as backend:
        assert not any(backend.exists(name) for name in NAMES)


# ---- under SGLang's own controller


def backed_up(engine: Any, pool: Any, tokens: list[int]) -> int:
    """Write the first pages of a pool as those of a text; tokens that SGLang counts as written."""
    names = cpu.hashes_of(tokens)
    engine.write_storage(indices(list(range(len(names)))), tokens, names)
    return int(engine.ack_backup_queue.get(timeout=60).completed_tokens)


def prefetched(engine: Any, tokens: list[int], salt: str | None = None) -> tuple[int, int]:
    """Tokens that SGLang finds, and those that it brings to the last pages of its pool."""
    engine.prefetch("a-request", cpu.key_of(tokens, salt))
    operation = engine.prefetch_hit_queue.get(timeout=60)
    found = operation.storage_hit_count
    if not found:
        return 0, 0
    pages = found // cpu.PAGE_TOKENS
    operation.host_indices = indices(list(range(PAGES - pages, PAGES)))
    engine.prefetch_buffer.put(operation)
    loaded = 0
    while True:
        ack = engine.ack_prefetch_queue.get(timeout=60)
        loaded = loaded if ack.completed_tokens is None else ack.completed_tokens
        if ack.completed_req:
            return found, loaded


@contextmanager
def controlled(directory: Path, pool: Any, by_pointers: int) -> Iterator[Any]:
    device = cpu.device_pool(layers=2, heads=2)
    extra = {"host": "8MiB", "cold": "64MiB", "directory": str(directory)}
    engine = cpu.controller(device, pool, {**extra, "interface_v1": by_pointers})
    try:
        yield engine
    finally:
        engine.detach_storage_backend()


@pytest.mark.parametrize("by_pointers", [0, 1])
def test_sglangs_fault_injection_costs_pages_and_never_brings_other_bytes(
    tmp_path: Path, by_pointers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.004")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.3")
    pool, count = a_pool(), 4
    with controlled(tmp_path, pool, by_pointers) as engine:
        assert type(engine.storage_backend).__name__ == "HiCacheStorageFailureInjector"
        wrote, got = [], []
        for text in range(24):
            tokens = list(range(text * 1000, text * 1000 + count * cpu.PAGE_TOKENS))
            pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
            pages = [page_of(pool, number) for number in range(count)]
            wrote.append(backed_up(engine, pool, tokens))
            found, loaded = prefetched(engine, tokens)
            assert loaded <= found
            first = PAGES - found // cpu.PAGE_TOKENS
            for number in range(loaded // cpu.PAGE_TOKENS):
                assert torch.equal(page_of(pool, first + number), pages[number])
            got.append(loaded)
    whole = count * cpu.PAGE_TOKENS
    assert set(wrote) == {0, whole}
    assert {0, whole} <= set(got)


@pytest.mark.parametrize("by_pointers", [0, 1])
def test_a_prefetch_that_begins_in_the_middle_and_a_tenant_who_asks_find_their_own(
    tmp_path: Path, by_pointers: int
) -> None:
    pool, tokens = a_pool(), list(range(4 * cpu.PAGE_TOKENS))
    whole = len(tokens)
    with controlled(tmp_path, pool, by_pointers) as engine:
        assert backed_up(engine, pool, tokens) == whole
    with controlled(tmp_path, pool, by_pointers) as engine:
        assert prefetched(engine, tokens, "alice") == (0, 0)
        assert prefetched(engine, [*tokens, *range(64)]) == (whole, whole)
        last = cpu.hashes_of(tokens)[1]
        engine.prefetch("middle", cpu.key_of(tokens[2 * cpu.PAGE_TOKENS :]), last)
        operation = engine.prefetch_hit_queue.get(timeout=60)
        assert operation.storage_hit_count == 2 * cpu.PAGE_TOKENS


def test_sglang_gets_what_it_measures(tmp_path: Path, pool: Any) -> None:
    with opened(tmp_path, pool, enable_storage_metrics=True) as backend:
        backend.batch_set(NAMES[:3], [page_of(pool, number) for number in range(3)])
        backend.batch_get(NAMES[:3], [page_of(pool, number) for number in range(3)])
        stats = backend.get_stats()
        assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [3])
        assert stats.prefetch_bandwidth[0] > 0
        assert backend.get_stats().prefetch_pgs == []
        assert backend.snapshot()["kv"]["tiers"]["blocks_known"] == 3
    with opened(tmp_path, pool) as backend:
        assert backend.get_stats() is None
