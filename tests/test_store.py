"""The store: what is put is read back, from every tier, under faults and over restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tierkv.config import Config
from tierkv.core.errors import ConfigError, GeometryMismatch, StoreClosed
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.plan import events as ev
from tierkv.plan.event_log import replay
from tierkv.store import Hint, HintKind, Store
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles
from tierkv.testing.store import abandon

Bytes = npt.NDArray[np.uint8]

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
PAGES = {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"}


def config_of(
    directory: Path | None = None,
    *,
    host: object = "512KiB",
    cold: object = "4MiB",
    device: object = 0,
    **more: object,
) -> Config:
    tiers: dict[str, object] = {
        "host": {"capacity": host},
        "device": {"capacity": device, "device": "cpu"},
    }
    if directory is not None:
        tiers["cold"] = {
            "capacity": cold,
            "directory": str(directory),
            "segment_cold_pages": 2,
            "threads": 2,
        }
    return Config.model_validate({"pages": PAGES, "tiers": tiers, **more})


def layout_of(config: Config, **changes: object) -> Layout:
    named: dict[str, Any] = {"model": "m", **changes}
    return Layout(GEOMETRY, targets=config.pages.targets, **named)


def tokens_of(blocks: int, seed: int = 0) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, 1000, blocks * 16)]


def bytes_of(store: Store, blocks: int, seed: int = 0) -> Bytes:
    shape = (store.plan.layers, blocks, store.plan.block_layer_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read_all(store: Store, tokens: list[int]) -> Bytes:
    match = store.match(tokens)
    out = np.zeros((store.plan.layers, match.blocks, store.plan.block_layer_bytes), np.uint8)
    return out[:, : store.get(match, out)]


@contextmanager
def opened(config: Config, **changes: object) -> Iterator[Store]:
    with Store.open(config, layout_of(config, **changes)) as store:
        yield store
        store.check()


def test_blocks_come_back_from_host_memory() -> None:
    with opened(config_of()) as store:
        data = bytes_of(store, 20)

        assert store.put(tokens_of(20), data) == 20
        assert np.array_equal(read_all(store, tokens_of(20)), data)
        assert store.match(tokens_of(20)).tokens_by_tier == {"host": 320}


def test_only_the_shared_prefix_is_found() -> None:
    with opened(config_of()) as store:
        tokens = tokens_of(8)
        store.put(tokens, bytes_of(store, 8))

        other = [*tokens[:70], *[t + 1 for t in tokens[70:]]]
        assert store.match(other).tokens == 64
        assert store.match(tokens[:15]).tokens == 0


def test_a_partial_tail_is_not_stored() -> None:
    with opened(config_of()) as store:
        assert store.put(tokens_of(2)[:20], bytes_of(store, 2)) == 1
        assert store.match(tokens_of(2)).blocks == 1


def test_a_prompt_larger_than_host_memory_comes_back_from_the_cold_tier(tmp_path: Path) -> None:
    with opened(config_of(tmp_path, host="96KiB")) as store:
        data = bytes_of(store, 100)

        assert store.put(tokens_of(100), data) == 100
        assert store.match(tokens_of(100)).tokens_by_tier["cold"] > 1000
        assert np.array_equal(read_all(store, tokens_of(100)), data)


def test_a_snapshot_says_what_is_held_and_what_each_link_gives(tmp_path: Path) -> None:
    with opened(config_of(tmp_path, host="96KiB")) as store:
        assert store.snapshot()["links"] == {}
        store.put(tokens_of(100), bytes_of(store, 100))
        read_all(store, tokens_of(100))
        found = store.snapshot()

    assert found["links"]["host,cold,bytes_per_second"] > 0
    assert found["links"]["cold,host,bytes_per_second"] > 0
    assert found["tiers"]["blocks_known"] == 100
    assert 0 < found["tiers"]["host,used_bytes"] <= found["tiers"]["host,capacity_bytes"]


def test_everything_flushed_is_found_after_a_restart(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with opened(config) as store:
        data = bytes_of(store, 30)
        store.put(tokens_of(30), data)
        assert store.flush()
        abandon(store)
    with opened(config) as store:
        assert store.match(tokens_of(30)).tokens_by_tier == {"host": 0, "cold": 480}
        assert np.array_equal(read_all(store, tokens_of(30)), data)
        assert store.match(tokens_of(30)).tokens_by_tier == {"host": 480, "cold": 0}


def test_a_clean_close_keeps_what_was_not_flushed(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with opened(config) as store:
        data = bytes_of(store, 3)
        store.put(tokens_of(3), data)
    with opened(config) as store:
        assert np.array_equal(read_all(store, tokens_of(3)), data)


def test_another_layout_finds_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with opened(config) as store:
        store.put(tokens_of(4), bytes_of(store, 4))
    for changes in ({"model": "n"}, {"revision": "2"}, {"codec": "int8"}, {"engine_layout": "x"}):
        with opened(config, **changes) as store:
            assert store.match(tokens_of(4)).blocks == 0


def test_another_namespace_finds_nothing() -> None:
    with opened(config_of(namespaces={"a": {"salt": "1"}, "b": {}})) as store:
        store.put(tokens_of(4), bytes_of(store, 4), namespace="a")

        assert store.match(tokens_of(4), namespace="a").blocks == 4
        assert store.match(tokens_of(4), namespace="b").blocks == 0
        assert store.match(tokens_of(4)).blocks == 0
        with pytest.raises(ConfigError, match="unknown name 'c'; configured: "):
            store.match(tokens_of(4), namespace="c")


def test_a_known_block_keeps_its_first_bytes() -> None:
    with opened(config_of()) as store:
        first = bytes_of(store, 4, seed=1)
        store.put(tokens_of(4), first)

        assert store.put(tokens_of(4), bytes_of(store, 4, seed=2)) == 4
        assert np.array_equal(read_all(store, tokens_of(4)), first)


def test_a_continued_put_joins_its_prefix() -> None:
    with opened(config_of()) as store:
        data = bytes_of(store, 9)
        store.put(tokens_of(9), data[:, :5])

        assert store.put(tokens_of(9), data[:, 5:], first_block=5) == 4
        assert np.array_equal(read_all(store, tokens_of(9)), data)


def test_a_put_without_its_prefix_is_not_found_until_the_prefix_is_there() -> None:
    with opened(config_of()) as store:
        data = bytes_of(store, 6)
        store.put(tokens_of(6), data[:, 3:], first_block=3)
        assert store.match(tokens_of(6)).blocks == 0

        store.put(tokens_of(6), data[:, :3])
        assert np.array_equal(read_all(store, tokens_of(6)), data)


@pytest.mark.parametrize("order", ["layers first", "blocks first", "every second"])
def test_any_strides_are_taken(order: str) -> None:
    with opened(config_of()) as store:
        data = bytes_of(store, 8)
        view = {
            "layers first": data,
            "blocks first": data.transpose(1, 0, 2).copy().transpose(1, 0, 2),
            "every second": np.repeat(data, 2, axis=1)[:, ::2],
        }[order]
        store.put(tokens_of(8), view)
        match = store.match(tokens_of(8))
        out = np.zeros((8, *data.shape[::2]), np.uint8).transpose(1, 0, 2)

        assert store.get(match, out) == 8
        assert np.array_equal(out, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda shape: np.zeros((2, *shape[1:]), np.uint8), r"must be \(layers=3"),
        (lambda shape: np.zeros(shape, np.float16), "must be uint8, got float16"),
        (lambda shape: np.zeros(shape[0], np.uint8), r"must be \(layers=3"),
    ],
    ids=["layers", "dtype", "rank"],
)
def test_bytes_of_another_shape_are_refused(
    make: Callable[[tuple[int, int, int]], Bytes], message: str
) -> None:
    with opened(config_of()) as store:
        shape = (store.plan.layers, 4, store.plan.block_layer_bytes)
        with pytest.raises(GeometryMismatch, match=message):
            store.put(tokens_of(4), make(shape))
        assert store.match(tokens_of(4)).blocks == 0


def test_the_device_tier_serves_what_was_put_or_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = config_of(tmp_path, device="64KiB", host="96KiB")
    with opened(config) as store:
        data = bytes_of(store, 60)
        store.put(tokens_of(60), torch.from_numpy(data))
        assert store.match(tokens_of(60)).tokens_by_tier["device"] > 0
        assert np.array_equal(read_all(store, tokens_of(60)), data)
    with opened(config) as store:
        assert store.match(tokens_of(60)[:64]).tokens_by_tier["device"] == 0
        assert np.array_equal(read_all(store, tokens_of(60)[:64]), data[:, :4])
        assert store.match(tokens_of(60)[:64]).tokens_by_tier["device"] == 64
        out = torch.zeros(3, 4, store.plan.block_layer_bytes, dtype=torch.uint8)
        assert store.get(store.match(tokens_of(60)[:64]), out) == 4
        assert np.array_equal(out.numpy(), data[:, :4])


def test_a_lease_shows_layers_without_copying_and_keeps_them(tmp_path: Path) -> None:
    with opened(config_of(tmp_path, host="96KiB")) as store:
        data = bytes_of(store, 10)
        store.put(tokens_of(10), data)
        with store.lease(store.match(tokens_of(10))) as lease:
            views = lease.layer(1)
            store.put(tokens_of(60, seed=5), bytes_of(store, 60, seed=5))

            assert lease.tokens == 160
            assert np.array_equal(np.concatenate(views), data[1])
            assert all(view.base is not None for view in views)
            out = np.zeros_like(data)
            assert lease.read(out) == 10
            assert np.array_equal(out, data)
            del views


def test_a_put_that_finds_no_room_stores_a_prefix() -> None:
    config = config_of(host="64KiB", transfer={"put_deadline_ms": 50})
    with opened(config) as store:
        blocks = 2 * store.plan.warm_page_blocks
        store.put(tokens_of(blocks), bytes_of(store, blocks))
        with store.lease(store.match(tokens_of(blocks))):
            assert store.put(tokens_of(4, seed=9), bytes_of(store, 4, seed=9)) == 0
        assert store.put(tokens_of(4, seed=9), bytes_of(store, 4, seed=9)) == 4


def test_a_flipped_byte_on_disk_is_a_miss_and_the_rest_is_served(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with opened(config) as store:
        data = bytes_of(store, 30)
        store.put(tokens_of(30), data)
    segment = max(tmp_path.rglob("*"), key=lambda path: path.stat().st_size)
    raw = bytearray(segment.read_bytes())
    at = raw.find(data[1, 12].tobytes())
    assert at > 0
    raw[at + 5] ^= 1
    segment.write_bytes(raw)
    with opened(config) as store:
        seen = read_all(store, tokens_of(30))

        page = store.plan.warm_page_blocks
        assert seen.shape[1] == 12 // page * page
        assert np.array_equal(seen, data[:, : seen.shape[1]])
        assert store.match(tokens_of(30)).blocks == seen.shape[1]
        store.put(tokens_of(30), data)
        assert np.array_equal(read_all(store, tokens_of(30)), data)


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC])
def test_a_failing_disk_costs_only_what_is_on_it(tmp_path: Path, fault: Fault) -> None:
    config = config_of(tmp_path)
    files = FaultyFiles(MemoryFiles(tmp_path))
    with Store.open(config, layout_of(config), files_for=lambda _root: files) as store:
        files.schedule = lambda n, operation: fault if operation == "write" else None
        for seed in range(12):
            data = bytes_of(store, 20, seed)
            assert store.put(tokens_of(20, seed), data) == 20
            assert np.array_equal(read_all(store, tokens_of(20, seed)), data)
        store.check()
    assert files.injected[fault] > 0


def test_many_threads_read_what_was_put(tmp_path: Path) -> None:
    torn: list[int] = []
    with opened(config_of(tmp_path, host="192KiB", cold="16MiB")) as store:

        def work(worker: int) -> None:
            rng = np.random.default_rng(worker)
            for _ in range(25):
                seed = int(rng.integers(0, 12))
                data = bytes_of(store, 12, seed)
                store.put(tokens_of(12, seed), data)
                seen = read_all(store, tokens_of(12, seed))
                if not np.array_equal(seen, data[:, : seen.shape[1]]):
                    torn.append(seed)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torn == []


def test_hints_reach_the_planner(tmp_path: Path) -> None:
    with opened(config_of(tmp_path, host="96KiB")) as store:
        data = bytes_of(store, 12)
        store.put(tokens_of(12), data)
        store.put(tokens_of(60, seed=5), bytes_of(store, 60, seed=5))
        assert store.flush()
        keys = list(store.keys(tokens_of(12)))
        assert store.match(tokens_of(12)).tokens_by_tier["host"] == 0
        store.hint(Hint(HintKind.PREFETCH, keys))
        store._runtime.engine.wait(5, until=lambda: not store._runtime.engine.busy)
        store.step()

        assert store.match(tokens_of(12)).tokens_by_tier["host"] == 192
        store.hint(Hint(HintKind.FORGET, keys))
        assert store.match(tokens_of(12)).blocks == 0


def test_the_event_log_of_a_live_store_replays(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    with opened(config_of(tmp_path / "cold", host="96KiB", event_log=str(log))) as store:
        for seed in range(8):
            store.put(tokens_of(10, seed), bytes_of(store, 10, seed))
            read_all(store, tokens_of(10, seed // 2))
            store.step()
    result = replay(log.read_bytes().splitlines())

    assert result.events > 40
    assert result.different == []


def test_a_closed_store_says_so() -> None:
    config = config_of()
    store = Store.open(config, layout_of(config))
    store.close()
    store.close()
    with pytest.raises(StoreClosed):
        store.match(tokens_of(1))


def test_a_tier_too_small_to_work_is_a_configuration_error(tmp_path: Path) -> None:
    config = config_of(tmp_path, host="32KiB")
    with pytest.raises(ConfigError, match=r"tiers\.host\.capacity: .* at least 2 are needed"):
        Store.open(config, layout_of(config))
    with pytest.raises(ConfigError, match="take them from it"):
        Store.open(config_of(), Layout(GEOMETRY, block_tokens=8))


def test_a_failed_sync_is_reported_and_not_trusted(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    memory = MemoryFiles(tmp_path)
    armed = [False]

    def strike(_number: int, operation: str) -> Fault | None:
        return Fault.EIO if armed[0] and operation == "sync" else None

    with Store.open(
        config, layout_of(config), files_for=lambda root: FaultyFiles(memory, strike)
    ) as store:
        data = bytes_of(store, 20)
        store.put(tokens_of(20), data)
        armed[0] = True
        assert not store.flush()
        armed[0] = False
        assert np.array_equal(read_all(store, tokens_of(20)), data)
        assert store.flush()
        store.check()


def test_a_put_whose_bytes_cannot_be_read_leaves_nothing_half_done() -> None:
    """A tensor without bytes: the copy to host memory raises before the one to the device."""
    config = config_of(device="128KiB")
    with opened(config) as store:
        plan = store.plan
        nowhere = torch.empty(
            (plan.layers, 2, plan.block_layer_bytes), dtype=torch.uint8, device="meta"
        )
        with pytest.raises(NotImplementedError):
            store.put(tokens_of(2), nowhere)
        planner = store._runtime.planner
        assert planner.tickets == {}
        assert not any(any(table.pins) for table in planner.tables.values())
        data = bytes_of(store, 2)
        assert store.put(tokens_of(2), data) == 2
        assert np.array_equal(read_all(store, tokens_of(2)), data)


def test_a_flush_does_not_count_what_another_has_only_begun() -> None:
    """Found by the drill of interleavings: a page on its way is not dirty, and not durable."""
    config = config_of(Path("nowhere"))
    disk = MemoryFiles(Path("disk"))
    files = FaultyFiles(disk)
    store = Store.open(config, layout_of(config), files_for=lambda _root: files)
    page = store.plan.warm_page_blocks
    tokens = tokens_of(page)
    assert store.put(tokens, bytes_of(store, page)) == page  # a full page: written behind
    while store.step() or store._runtime.planner.movement.flights:
        time.sleep(0.001)
    assert store.put(tokens_of(1, seed=9), bytes_of(store, 1)) == 1

    def fails(_number: int, operation: str) -> Fault | None:
        if operation == "sync":  # another flush begins, and its write will fail as well
            with store._runtime.lock:
                store._runtime.handle(ev.Flush())
        return Fault.EIO if operation == "write" else None

    files.schedule = fails
    assert not store.flush()
    files.schedule = None
    assert store.flush()
    abandon(store)


def test_a_flush_waits_for_those_who_put_beside_it() -> None:
    """Not for what they put, but its own blocks may share a page with theirs."""
    config = config_of(Path("nowhere"))
    disk = MemoryFiles(Path("disk"))
    with Store.open(config, layout_of(config), files_for=lambda _root: disk) as store:
        assert store.put(tokens_of(1), bytes_of(store, 1)) == 1
        (fill,) = store._runtime.handle(
            ev.Put(list(store.keys(tokens_of(1, seed=1))), 0, "default")
        )
        assert isinstance(fill, ev.Fill)
        timer = threading.Timer(0.05, store._runtime.handle, [ev.Filled(fill.ticket, True)])
        timer.start()
        assert store.flush()
        timer.join()


@pytest.mark.asyncio
async def test_async_twins_do_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with Store.open(config, layout_of(config)) as store:
        data = bytes_of(store, 6)
        assert await store.aput(tokens_of(6), data) == 6
        assert await store.aflush()
        match = await store.amatch(tokens_of(6))
        out = np.zeros_like(data)
        assert await store.aget(match, out) == 6
        assert np.array_equal(out, data)
        with await store.alease(match) as lease:
            assert lease.tokens == 96
