"""The store at its edges: what is refused at once, and what a fault in the middle leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tierkv.config import Config
from tierkv.core.errors import ConfigError, GeometryMismatch
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.core.tier import TierId
from tierkv.plan.event_log import head_line, replay
from tierkv.store import Hint, HintKind, Store
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles, from_then_on
from tierkv.transfer.bandwidth import LinkEstimate

Bytes = npt.NDArray[np.uint8]

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
PAGES = {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"}


def config_of(directory: Path | None = None, *, tiers: dict[str, Any] | None = None,
              **more: object) -> Config:  # fmt: skip
    parts: dict[str, Any] = {"host": {"capacity": "512KiB"}, "device": {"device": "cpu"}}
    if directory is not None:
        cold = {"capacity": "4MiB", "directory": str(directory), "segment_cold_pages": 2}
        parts["cold"] = {**cold, "threads": 2}
    for name, changes in (tiers or {}).items():
        parts[name] = {**parts.get(name, {}), **changes}
    return Config.model_validate({"pages": PAGES, "tiers": parts, **more})


def opened(config: Config, files: FaultyFiles | None = None) -> Store:
    layout = Layout(GEOMETRY, targets=config.pages.targets, model="m")
    return Store.open(config, layout, files_for=None if files is None else lambda _root: files)


def tokens_of(blocks: int, seed: int = 0) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, 1000, blocks * 16)]


def bytes_of(store: Store, blocks: int, seed: int = 0) -> Bytes:
    shape = (store.plan.layers, blocks, store.plan.block_layer_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read_all(store: Store, tokens: list[int]) -> Bytes:
    match = store.match(tokens)
    out = np.zeros((store.plan.layers, match.blocks, store.plan.block_layer_bytes), np.uint8)
    return out[:, : store.get(match, out)]


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ({"host": {"capacity": "16KiB"}}, r"tiers\.host\.capacity: 16 KiB holds 0 warm pages"),
        ({"cold": {"capacity": "16KiB"}}, r"tiers\.cold\.capacity: 16 KiB is less than one"),
        ({"device": {"capacity": "5KiB"}}, r"tiers\.device\.capacity: 5 KiB is less than one"),
        ({"cold": {"capacity": "512TiB"}}, r"tiers\.cold\.capacity: [\d,]+ warm pages of 32 KiB"),
        ({"host": {"capacity": "32KiB"}}, "1 warm pages of 32 KiB; at least 2 are needed"),
    ],
)
def test_a_tier_too_small_or_too_large_to_work_is_refused_by_its_key(
    tiers: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(config_of(tmp_path, tiers=tiers))


def test_one_host_page_is_enough_without_a_cold_tier() -> None:
    with opened(config_of(tiers={"host": {"capacity": "32KiB"}})) as store:
        data = bytes_of(store, 2)
        assert store.put(tokens_of(2), data) == 2
        assert np.array_equal(read_all(store, tokens_of(2)), data)


def test_quotas_bound_a_tenant_in_both_tiers(tmp_path: Path) -> None:
    spaces = {"small": {"host_quota": "64KiB", "cold_quota": "128KiB"}, "default": {}}
    with opened(config_of(tmp_path, namespaces=spaces)) as store:
        specs = {one.name: one.quota_pages for one in store._parts.spec.namespaces}
        assert specs["default"] == {}
        assert specs["small"] == {TierId.HOST: 2, TierId.COLD: 4}
        data = bytes_of(store, 60)
        store.put(tokens_of(60), data, namespace="small")
        store.flush()
        pools = {tier: table.pool for tier, table in store._runtime.planner.tables.items()}
        assert pools[TierId.HOST].owned["small"] <= 2
        assert pools[TierId.COLD].owned["small"] <= 4


@pytest.mark.parametrize("wrong", ["rank", "layers", "bytes", "dtype"])
def test_bytes_of_another_shape_or_type_are_refused(wrong: str) -> None:
    with opened(config_of()) as store:
        data = bytes_of(store, 2)
        bad = {
            "rank": data[0],
            "layers": data[:2],
            "bytes": data[:, :, :-1],
            "dtype": data.astype(np.int8),
        }[wrong]
        with pytest.raises(GeometryMismatch, match=r"must be \(layers=3|must be uint8, got int8"):
            store.put(tokens_of(2), bad)
        assert store.match(tokens_of(2)).blocks == 0
        assert store.put(tokens_of(2), data) == 2


def test_tensors_are_put_and_read_as_arrays_are() -> None:
    torch = pytest.importorskip("torch")
    with opened(config_of()) as store:
        data = bytes_of(store, 6)
        assert store.put(tokens_of(6), torch.from_numpy(data)) == 6
        out = torch.zeros(data.shape, dtype=torch.uint8)
        assert store.get(store.match(tokens_of(6)), out) == 6
        assert np.array_equal(out.numpy(), data)
        with pytest.raises(GeometryMismatch, match="must be uint8, got float32"):
            store.put(tokens_of(6), torch.zeros(data.shape))
        # To a tensor that is no array, as one of a device is, the bytes go through torch.
        out.zero_()
        with store.lease(store.match(tokens_of(6))) as lease:
            assert store._memory.copy_out(lease._parts, out) == 6
        assert np.array_equal(out.numpy(), data)


def test_a_lease_shows_layers_of_blocks_that_only_the_device_has() -> None:
    pytest.importorskip("torch")
    tiers = {"host": {"capacity": "64KiB"}, "device": {"capacity": "128KiB"}}
    with opened(config_of(tiers=tiers)) as store:
        data = bytes_of(store, 4)
        store.put(tokens_of(4), data)
        with store.lease(store.match(tokens_of(4)), first_block=1) as lease:
            assert {part.tier for part in lease._parts} == {TierId.DEVICE}
            for layer in range(3):
                assert np.array_equal(np.concatenate(lease.layer(layer)), data[layer, 1:])
        assert lease.layer(0) == []
        lease.release()  # a second time


def test_nothing_is_put_where_nothing_is_offered() -> None:
    with opened(config_of()) as store:
        data = bytes_of(store, 2)
        assert store.put(tokens_of(2), data, first_block=2) == 0
        assert store.put(tokens_of(2), data, first_block=5) == 0
        assert store.put([], data) == 0
        assert store.put(tokens_of(2), data[:, :0]) == 0


def test_a_get_whose_target_cannot_be_written_leaves_nothing_pinned(tmp_path: Path) -> None:
    tiers = {"host": {"capacity": "96KiB"}}
    with opened(config_of(tmp_path, tiers=tiers)) as store:
        data = bytes_of(store, 40)
        store.put(tokens_of(40), data)
        assert store.flush()
        out = np.zeros_like(data)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            store.get(store.match(tokens_of(40)), out)
        assert np.array_equal(read_all(store, tokens_of(40)), data)
        for table in store._runtime.planner.tables.values():
            assert not any(table.pins), "a pin leaked"


def test_a_flush_ends_at_its_deadline_while_the_disk_waits() -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")))
    gate = threading.Event()

    def held(_number: int, _operation: str) -> None:
        assert gate.wait(60), "nobody opened the gate"

    with opened(config_of(Path("disk")), files) as store:
        data = bytes_of(store, 10)
        files.schedule = held
        store.put(tokens_of(10), data)
        assert not store.flush(deadline_s=0.01)
        gate.set()
        assert store.flush()
        assert np.array_equal(read_all(store, tokens_of(10)), data)


def test_an_erasure_that_fails_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")))
    with opened(config_of(Path("disk")), files) as store:
        kept = bytes_of(store, 10, seed=1)
        store.put(tokens_of(10), bytes_of(store, 10))
        store.put(tokens_of(10, seed=1), kept)
        assert store.flush()
        files.schedule = from_then_on(0, Fault.EIO)
        store.hint(Hint(HintKind.FORGET, list(store.keys(tokens_of(10)))))
        files.schedule = None

        assert any("erase failed" in record.message for record in caplog.records)
        assert store.match(tokens_of(10)).blocks == 0
        assert np.array_equal(read_all(store, tokens_of(10, seed=1)), kept)


def test_a_log_whose_place_goes_away_ends_and_the_store_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "logs" / "events"
    with opened(config_of(event_log=str(log))) as store:
        assert log.read_bytes() == head_line(store._parts.spec)
        log.unlink()
        log.mkdir()
        data = bytes_of(store, 3)
        store.put(tokens_of(3), data)
        store._runtime.write_log(force=True)
        assert any("event log ends here" in record.message for record in caplog.records)
        assert np.array_equal(read_all(store, tokens_of(3)), data)
        store._runtime.write_log(force=True)
    assert list(log.iterdir()) == []


def test_a_log_is_written_at_the_end_and_replays(tmp_path: Path) -> None:
    log = tmp_path / "events"
    with opened(config_of(event_log=str(log))) as store:
        store.put(tokens_of(3), bytes_of(store, 3))
        read_all(store, tokens_of(3))
    result = replay(log.read_bytes().splitlines(keepends=True))
    assert result.events > 3
    assert result.different == []


def test_a_links_estimate_learns_bandwidth_from_large_batches_and_latency_from_small() -> None:
    link = LinkEstimate()
    assert link.expected_ns(1) is None
    link.observe(0, 5)
    link.observe(5, 0)
    link.observe(-1, 5)
    assert (link.batches, link.expected_ns(1)) == (0, None)
    link.observe(1 << 20, 1 << 20)  # a byte a nanosecond
    assert link.bytes_per_second == 1e9
    assert link.expected_ns(1000) == 1000
    link.observe(1000, 6000)
    assert link.latency_ns == 5000
    assert link.expected_ns(2000) == 7000
    link.observe(1000, 11_000)  # a fifth of the way from 5000 to 10000
    assert link.latency_ns == 6000
    link.observe(1 << 20, 6000 + (1 << 19))  # two bytes a nanosecond
    assert link.bytes_per_second == pytest.approx(1.2e9)
    link.observe(1 << 20, 1)  # faster than the latency: no division by nothing
    assert link.bytes_per_second > 1e9
    assert link.batches == 5


def gated(files: FaultyFiles) -> threading.Event:
    """Have every read wait until the event is set."""
    gate = threading.Event()

    def held(_number: int, operation: str) -> None:
        assert operation != "read" or gate.wait(60), "nobody opened the gate"

    files.schedule = held
    return gate


def test_a_get_joins_a_prefetch_that_is_under_way() -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")))
    with opened(config_of(Path("disk"), tiers={"host": {"capacity": "96KiB"}}), files) as store:
        data = bytes_of(store, 40)
        assert store.put(tokens_of(40), data) == 40
        assert store.flush()
        gate = gated(files)
        first = tokens_of(40)[: 16 * 5]
        store.hint(Hint(HintKind.PREFETCH, list(store.keys(first))))
        found: list[Bytes] = []
        reader = threading.Thread(target=lambda: found.append(read_all(store, first)))
        reader.start()
        stats = store._runtime.planner.stats
        until(lambda: stats.get("tierkv_prefetch_bytes_total", "late") > 0)
        gate.set()
        reader.join(60)
        assert np.array_equal(found[0], data[:, :5])


def test_a_prefetch_gives_way_to_a_put_that_lacks_room() -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")))
    with opened(config_of(Path("disk"), tiers={"host": {"capacity": "96KiB"}}), files) as store:
        data = bytes_of(store, 40)
        assert store.put(tokens_of(40), data) == 40
        assert store.flush()
        gate = gated(files)
        store.hint(Hint(HintKind.PREFETCH, list(store.keys(tokens_of(40)[: 16 * 15]))))
        (prefetch,) = store._runtime.planner.movement.flights.values()
        new = bytes_of(store, 20, seed=1)
        stored: list[int] = []
        writer = threading.Thread(target=lambda: stored.append(store.put(tokens_of(20, 1), new)))
        writer.start()
        until(lambda: prefetch.cancelled)
        gate.set()
        writer.join(60)
        assert prefetch.cancelled
        assert stored[0] > 0
        assert np.array_equal(read_all(store, tokens_of(20, 1)), new[:, : stored[0]])
        assert np.array_equal(read_all(store, tokens_of(40)), data)


def until(is_so: Callable[[], bool]) -> None:
    """Wait for another thread to come so far."""
    for _ in range(60_000):
        if is_so():
            return
        time.sleep(0.001)
    raise AssertionError("it never came so far")
