"""The two sides of the vLLM connector on a real store, and an engine's cache of plain tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tierkv.config import Config
from tierkv.core.errors import ConfigError, GeometryMismatch
from tierkv.core.geometry import Form, KVGeometry, Layout
from tierkv.engines.vllm import loading, opening
from tierkv.engines.vllm.mirror import DISK, MEMORY, Mirror, Report
from tierkv.engines.vllm.scheduler import SchedulerSide
from tierkv.engines.vllm.split import BlockSeconds
from tierkv.engines.vllm.step import Step
from tierkv.engines.vllm.wishes import wishes_of
from tierkv.engines.vllm.worker import WorkerSide, bytes_of
from tierkv.store import Hint, HintKind, Store
from tierkv.tiers.host import HostTier

LAYERS, BLOCK, BLOCK_BYTES, PLACES = 4, 8, 512, 40


@dataclass
class Request:
    """As vLLM's, as far as it is used."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    priority: int = 0

    def __post_init__(self) -> None:
        whole = self.num_tokens // BLOCK
        self.block_hashes = [f"{number:032d}".encode() for number in range(whole)]


def config_of(directory: Path | None = None, *, host: str = "64KiB") -> Config:
    tiers: dict[str, Any] = {"device": {"capacity": 0, "device": "cpu"}, "host": {"capacity": host}}
    if directory is not None:
        tiers["cold"] = {"capacity": "1MiB", "directory": str(directory), "segment_cold_pages": 2}
    pages = {"hot": "1KiB", "warm": "8KiB", "cold": "32KiB"}
    return Config.model_validate({"block_tokens": BLOCK, "pages": pages, "tiers": tiers})


def opened(config: Config) -> Store:
    geometry = KVGeometry(
        layers=LAYERS, kv_heads=1, head_dim=BLOCK_BYTES // BLOCK, dtype="uint8", form=Form.LATENT
    )
    layout = Layout(geometry, block_tokens=BLOCK, targets=config.pages.targets, model="m")
    return Store.open(config, layout)


class Engine:
    """Both sides, and a cache whose blocks hold what their places say."""

    def __init__(self, store: Store, seed: int = 0) -> None:
        self.store = store
        self.scheduler = SchedulerSide(block_tokens=BLOCK, block_bytes=LAYERS * BLOCK_BYTES)
        self.worker = WorkerSide({store: None})
        self.scheduler.told([self.worker.report()])
        generator = torch.Generator().manual_seed(seed)
        shape = (LAYERS, PLACES, 2, BLOCK, BLOCK_BYTES // BLOCK // 8)
        self.cache = torch.rand(shape, generator=generator, dtype=torch.float32)
        self.names = [f"layer.{number}" for number in range(LAYERS)]
        self.worker.register(dict(zip(self.names, self.cache, strict=True)))

    def compute(self, request: Request, places: list[int], tokens: int) -> set[int]:
        """Schedule a request whose external tokens were asked for, run a step; what failed."""
        matched, is_async = self.scheduler.matched(request, request.num_computed_tokens)
        self.scheduler.allocated(request, [places], matched)
        if is_async:
            failed = self.step()
            while request.request_id not in self.worker.arrived(Step())[0]:
                pass
            failed |= self.heard()
            if failed:
                return failed
        self.scheduler.scheduled(request.request_id, None, matched, tokens - matched)
        return self.step()

    def step(self) -> set[int]:
        """What vLLM does around a forward pass."""
        step = self.scheduler.step()
        self.worker.start()
        self.worker.begin(step)
        for name in self.names:
            self.worker.wait_for_layer(name)
        self.worker.end()
        self.worker.save(step)
        return self.heard()

    def heard(self) -> set[int]:
        """What the scheduler hears of a step."""
        failed = self.worker.not_loaded()
        while self.scheduler.is_saving:
            self.scheduler.told([self.worker.report()])
        self.scheduler.told([self.worker.report()])
        if failed:
            self.scheduler.failed(failed)
        return failed

    @property
    def saved_blocks(self) -> int:
        assert self.worker._saver is not None
        return self.worker._saver.saved_blocks

    def close(self) -> None:
        self.worker.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(opened(config_of()))
    yield made
    made.close()


def test_what_one_request_computed_another_loads_bit_for_bit(engine: Engine) -> None:
    first = Request("a", 8 * BLOCK + 3)
    assert engine.scheduler.matched(first, 0) == (0, False)
    assert engine.compute(first, list(range(1, 9)), first.num_tokens) == set()
    assert engine.saved_blocks == 8
    assert engine.worker.counters["saved_bytes"] == 8 * LAYERS * BLOCK_BYTES

    second = Request("b", 8 * BLOCK + 3)
    assert engine.scheduler.matched(second, 0) == (8 * BLOCK, False)
    assert engine.compute(second, [30, 21, 9, 10, 11, 39, 20, 8], second.num_tokens) == set()
    assert torch.equal(engine.cache[:, [30, 21, 9, 10, 11, 39, 20, 8]], engine.cache[:, 1:9])
    assert engine.saved_blocks == 8, "what is stored is not put again"


def test_one_token_is_left_to_compute_and_what_the_engine_has_is_not_loaded(engine: Engine) -> None:
    engine.compute(Request("a", 8 * BLOCK), list(range(1, 9)), 8 * BLOCK)
    assert engine.scheduler.matched(Request("b", 8 * BLOCK), 0) == (7 * BLOCK, False)
    assert engine.scheduler.matched(Request("b", 8 * BLOCK), 5 * BLOCK) == (2 * BLOCK, False)
    assert engine.scheduler.matched(Request("b", 8 * BLOCK), 7 * BLOCK) == (0, False)
    assert engine.scheduler.matched(Request("c", 3), 0) == (0, False)


def test_what_lies_behind_blocks_that_the_engine_has_is_loaded_behind_them(engine: Engine) -> None:
    """When a request gets its blocks, vLLM has not noted in it yet how many it had itself."""
    engine.compute(Request("a", 8 * BLOCK + 1), list(range(1, 10)), 8 * BLOCK + 1)
    before = engine.cache.clone()
    request = Request("b", 8 * BLOCK + 1)
    matched, _ = engine.scheduler.matched(request, 3 * BLOCK)
    assert matched == 5 * BLOCK
    engine.scheduler.allocated(request, [[1, 2, 3, 20, 21, 22, 23, 24, 25]], matched)
    assert engine.step() == set()
    assert torch.equal(engine.cache[:, 20:25], before[:, 4:9])
    assert torch.equal(engine.cache[:, :20], before[:, :20])


def test_a_block_is_saved_when_all_its_tokens_are_computed(engine: Engine) -> None:
    request = Request("a", 3 * BLOCK + 5)
    engine.compute(request, [1, 2, 3, 4], BLOCK + 5)
    assert engine.store.match_keys(request.block_hashes).blocks == 1
    engine.scheduler.scheduled("a", None, BLOCK + 5, 3)
    engine.step()
    assert engine.store.match_keys(request.block_hashes).blocks == 2
    engine.scheduler.scheduled("a", None, 2 * BLOCK, BLOCK + 5)
    engine.scheduler.finished("a")
    engine.step()
    assert engine.store.match_keys(request.block_hashes).blocks == 3, "also of one that has ended"
    engine.scheduler.scheduled("a", None, 0, 3 * BLOCK)
    assert engine.scheduler.step().saves == []


def test_what_is_on_disk_is_loaded_beside_the_steps(tmp_path: Path) -> None:
    one = Engine(opened(config_of(tmp_path)))
    one.compute(Request("a", 8 * BLOCK + 1), list(range(1, 9)), 8 * BLOCK + 1)
    one.close()
    other = Engine(opened(config_of(tmp_path)), seed=1)
    request = Request("b", 8 * BLOCK + 1)
    assert other.scheduler.matched(request, 0) == (8 * BLOCK, True)
    assert other.scheduler.sources(request) == (0, 8 * BLOCK)
    assert other.compute(request, list(range(10, 19)), request.num_tokens) == set()
    assert torch.equal(other.cache[:, 10:18], one.cache[:, 1:9])
    other.close()


def test_a_prompt_larger_than_the_stores_memory_is_loaded_in_parts(tmp_path: Path) -> None:
    """64 KiB are 8 warm pages, and so 32 blocks; the prompt has 36."""
    one = Engine(opened(config_of(tmp_path)))
    one.compute(Request("a", 36 * BLOCK + 1), list(range(1, 37)), 36 * BLOCK + 1)
    one.close()
    other = Engine(opened(config_of(tmp_path)), seed=1)
    request = Request("b", 36 * BLOCK + 1)
    assert other.compute(request, list(range(2, 39)), request.num_tokens) == set()
    assert torch.equal(other.cache[:, 2:38], one.cache[:, 1:37])
    other.close()


@pytest.mark.parametrize("how", ["forgotten", "an error"])
def test_blocks_that_are_not_there_any_more_are_named_and_nothing_computed_on_them_is_saved(
    engine: Engine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.compute(Request("a", 8 * BLOCK + 1), list(range(1, 9)), 8 * BLOCK + 1)
    longer = Request("b", 12 * BLOCK + 1)
    matched, _ = engine.scheduler.matched(longer, 0)
    places = list(range(20, 33))
    engine.scheduler.allocated(longer, [places], matched)
    engine.scheduler.scheduled("b", None, matched, 4 * BLOCK + 1)
    if how == "forgotten":
        engine.store.hint(Hint(HintKind.FORGET, list(longer.block_hashes[:8])))
    else:
        monkeypatch.setattr(Store, "lease", lambda *_, **__: 1 / 0)
    failed = engine.step()
    assert failed == set(places[:8])
    assert engine.store.match_keys(longer.block_hashes).blocks == (0 if how == "forgotten" else 8)

    monkeypatch.undo()
    assert engine.scheduler.matched(longer, 0) == (0, False), "it is not tried again"
    engine.scheduler.scheduled("b", None, 0, 12 * BLOCK + 1)
    assert engine.step() == set()
    assert engine.store.match_keys(longer.block_hashes).blocks == 12, "computed anew, and saved"


def test_a_step_that_was_made_before_a_failure_was_known_saves_nothing(engine: Engine) -> None:
    engine.compute(Request("a", 2 * BLOCK + 1), [1, 2, 3], 2 * BLOCK + 1)
    one, other = Request("b", 2 * BLOCK + 1), Request("c", 3 * BLOCK)
    other.block_hashes = [f"{number:032d}".encode() for number in range(100, 103)]
    for request, places in ((one, [4, 5, 6]), (other, [7, 8, 9])):
        engine.scheduler.allocated(request, [places], engine.scheduler.matched(request, 0)[0])
    engine.scheduler.scheduled("b", None, 2 * BLOCK, 1)
    engine.store.hint(Hint(HintKind.FORGET, list(one.block_hashes)))
    failing = engine.scheduler.step()
    engine.scheduler.scheduled("c", None, 0, 2 * BLOCK)
    early = engine.scheduler.step()
    engine.worker.begin(failing)
    engine.worker.end()
    engine.worker.save(early)
    assert engine.store.match_keys(other.block_hashes).blocks == 0
    assert engine.heard() == {4, 5}
    engine.scheduler.scheduled("c", None, 2 * BLOCK, 1)
    engine.step()
    assert engine.store.match_keys(other.block_hashes).blocks == 2


def test_a_put_that_raises_stops_no_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HostTier, "write", lambda *_, **__: 1 / 0)
    assert engine.compute(Request("a", 8 * BLOCK), list(range(1, 9)), 8 * BLOCK) == set()
    assert "not saved request=a" in caplog.text


def test_a_layer_is_ready_before_those_after_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.compute(Request("a", 8 * BLOCK + 1), list(range(1, 9)), 8 * BLOCK + 1)
    request = Request("b", 8 * BLOCK + 1)
    engine.scheduler.allocated(request, [list(range(20, 29))],
                               engine.scheduler.matched(request, 0)[0])  # fmt: skip
    ready: list[list[bool]] = []
    real = loading._fill

    def fill(*arguments: object) -> None:
        load = engine.worker._loading
        assert load is not None
        ready.append([event.is_set() for event in load.done])
        real(*arguments)

    monkeypatch.setattr(loading, "_fill", fill)
    engine.step()
    assert ready == [[number < at for number in range(LAYERS)] for at in range(LAYERS)]


def test_a_cache_of_another_shape_is_refused(engine: Engine) -> None:
    with pytest.raises(GeometryMismatch, match="3, 512"):
        engine.worker.register(dict(zip(engine.names[:3], engine.cache[:3], strict=True)))
    with pytest.raises(GeometryMismatch, match="not one run of bytes"):
        bytes_of("layer.0", torch.zeros(4, 6, 8).transpose(1, 2))


# ---- the store behind both


def vllm_config(model: Path, **options: object) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1, rank=0),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=options),
        cache_config=SimpleNamespace(
            block_size=BLOCK, cache_dtype="auto", prefix_caching_hash_algo="sha256"
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(
            model=str(model), revision=None, quantization=None, dtype=torch.float32,
            hf_config=SimpleNamespace(), hf_overrides={},
        ),
    )  # fmt: skip


def cache_of(*blocks: int) -> SimpleNamespace:
    """A cache of a group of attention layers for each size of blocks."""
    specs = [SimpleNamespace(block_size=size, num_kv_heads=1) for size in blocks]
    return SimpleNamespace(kv_cache_groups=[
        SimpleNamespace(kv_cache_spec=spec, layer_names=[f"layer.{number}"])
        for number, spec in enumerate(specs)
    ])  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"layers": LAYERS}))
    (place / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(5000))
    return place


def test_changed_weights_are_another_model_and_a_copy_is_the_same(model: Path) -> None:
    config = vllm_config(model).model_config
    before = opening.weights_of(config)
    (model / "README.md").write_text("words are no weights")
    assert opening.weights_of(config) == before
    data = bytearray((model / "model.safetensors").read_bytes())
    data[2500] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert opening.weights_of(config) != before


def test_mistakes_in_the_connectors_options_are_named_with_the_cure(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown cpu_bytes; known: .*directory"):
        opening.config_of({"cpu_bytes": 5}, vllm_config(model))
    with pytest.raises(ConfigError, match=r"tiers\.host\.capacity: .*64GiB"):
        opening.config_of({"host": "a lot"}, vllm_config(model))
    config = vllm_config(model, host="1MiB")
    one, two = cache_of(BLOCK), cache_of(BLOCK, BLOCK * 2)
    opening.check_served(config, one)
    config.cache_config.prefix_caching_hash_algo = "xxhash"
    with pytest.raises(ConfigError, match="hash-algo sha256"):
        opening.check_served(config, one)
    with pytest.raises(GeometryMismatch, match="blocks of 16 tokens"):
        opening.check_served(vllm_config(model, host="1MiB"), two)


def test_ranks_share_the_capacities_and_replicas_have_a_directory_each(
    model: Path, tmp_path: Path
) -> None:
    options = {"host": "64MiB", "cold": "1GiB", "directory": str(tmp_path / "kv")}
    config = vllm_config(model)
    config.parallel_config = SimpleNamespace(world_size=4, rank=2, data_parallel_rank=3)
    found = opening.config_of(options, config).tiers
    assert found.cold is not None
    assert (found.host.capacity, found.cold.capacity) == (16 << 20, 256 << 20)
    assert found.cold.directory == tmp_path / "kv" / "replica-3"


# ---- what the scheduler knows, and what it makes of it


def test_what_every_rank_has_is_found_and_the_slowest_tier_of_each_block_counts() -> None:
    mirror = Mirror(2)
    mirror.take(Report(0, [{b"a": MEMORY, b"b": MEMORY, b"c": DISK}]))
    assert mirror.match([b"a"]) == []
    mirror.take(Report(1, [{b"a": DISK, b"b": MEMORY}]))
    assert mirror.match([b"a", b"b", b"c"]) == [DISK, MEMORY]
    mirror.take(Report(0, [{b"a": 0}]))
    assert mirror.match([b"a", b"b"]) == []
    mirror.take(Report(0, [{b"a": MEMORY}]))
    assert mirror.match([b"a", b"b"]) == [DISK, MEMORY]
    mirror.take(Report(1, [None]))
    assert mirror.match([b"a", b"b"]) == []


def test_several_ranks_load_beside_the_steps_only() -> None:
    side = SchedulerSide(block_tokens=BLOCK, block_bytes=1, ranks=2)
    request = Request("a", 2 * BLOCK + 1)
    side.told([Report(n, [dict.fromkeys(request.block_hashes, MEMORY)]) for n in range(2)])
    assert side.matched(request, 0) == (2 * BLOCK, True)
    side.allocated(request, [[1, 2, 3]], 2 * BLOCK)
    step = side.step()
    assert [[part.places for part in parts] for parts in step.async_loads] == [[[1, 2]]]
    assert step.loads == []


@pytest.mark.parametrize(
    ("costs", "tiers", "loaded"),
    [
        (BlockSeconds(1, 1, 0), [MEMORY, DISK], 2),
        (BlockSeconds(0, 0, 1), [MEMORY, DISK], 2),
        (BlockSeconds(1, 20, 10), [MEMORY, MEMORY, DISK], 2),
        (BlockSeconds(1, 12, 10), [DISK, MEMORY, DISK], 2),
        (BlockSeconds(1, 50, 10), [DISK, MEMORY, DISK], 0),
        (BlockSeconds(20, 50, 10), [MEMORY, MEMORY], 0),
        (BlockSeconds(1, 1, 10), [], 0),
    ],
)
def test_a_prefix_is_loaded_up_to_where_computing_is_sooner(
    costs: BlockSeconds, tiers: list[int], loaded: int
) -> None:
    assert costs.split(tiers) == loaded


def test_a_disk_that_was_too_slow_is_tried_again_after_a_while() -> None:
    side = SchedulerSide(block_tokens=BLOCK, block_bytes=100)
    request = Request("a", 2 * BLOCK + 1)
    rates = {"disk_bytes_s": 100.0, "prefill_tokens_s": 2.0 * BLOCK}
    side.told([Report(0, [dict.fromkeys(request.block_hashes, DISK)], **rates)])
    found = [side.matched(request, 0)[0] for _ in range(10)]
    assert found[0] == 0
    assert found[-1] == 2 * BLOCK
    assert side.counters["declined_tokens"] == 2 * BLOCK * found.count(0)


def test_what_a_request_wishes_is_done_and_what_is_not_understood_is_not(engine: Engine) -> None:
    action = SimpleNamespace(action_type="demote", payload={"ttl_s": 60})
    wishes = wishes_of({"tierkv": {"hints": ["prefetch", "pin", "paint"], "colour": 3}}, [action])
    assert wishes.at_start == [(HintKind.PREFETCH, 0)]
    assert wishes.at_end == [(HintKind.PIN, 0), (HintKind.DEMOTE, 0), (HintKind.TTL, 60)]
    request = Request("a", 2 * BLOCK + 1)
    engine.scheduler.arrived(request, wishes)
    engine.compute(request, [1, 2, 3], request.num_tokens)
    engine.scheduler.finished("a")
    step = engine.scheduler.step()
    assert [wish.kind for wish in step.wishes] == [HintKind.PIN, HintKind.DEMOTE, HintKind.TTL]
    assert all(list(wish.keys) == request.block_hashes for wish in step.wishes)
    engine.worker.save(step)
    assert engine.store.snapshot()["tierkv_hints_total"] == {
        "demote": 1, "pin": 1, "prefetch": 1, "ttl": 1
    }  # fmt: skip


@pytest.mark.parametrize("odd", [None, {}, {"tierkv": 7}, {"tierkv": {"hints": 5, "ttl_s": "x"}}])
def test_odd_wishes_are_none(odd: dict[str, object] | None) -> None:
    assert wishes_of(odd) == wishes_of(None)


def test_a_request_may_be_kept_out_of_the_store(engine: Engine) -> None:
    engine.compute(Request("a", 2 * BLOCK + 1), [1, 2, 3], 2 * BLOCK + 1)
    other = Request("b", 3 * BLOCK)
    engine.scheduler.arrived(other, wishes_of({"tierkv": {"load": False, "save": False}}))
    assert engine.compute(other, [4, 5, 6], other.num_tokens) == set()
    assert engine.store.match_keys(other.block_hashes).blocks == 2
    again = Request("c", 3 * BLOCK)
    engine.scheduler.arrived(again, wishes_of({"tierkv": {"hints": "never_again"}}))
    assert engine.scheduler.matched(again, 0) == (2 * BLOCK, False)
    engine.compute(again, [7, 8, 9], again.num_tokens)
    assert engine.store.match_keys(other.block_hashes).blocks == 2


def test_a_cleared_store_has_nothing_and_takes_new_blocks(engine: Engine) -> None:
    engine.compute(Request("a", 2 * BLOCK + 1), [1, 2, 3], 2 * BLOCK + 1)
    engine.scheduler.clear()
    request = Request("b", 2 * BLOCK + 1)
    assert engine.scheduler.matched(request, 0) == (0, False)
    assert engine.compute(request, [4, 5, 6], 0) == set()
    assert engine.store.match_keys(request.block_hashes).blocks == 0
    engine.scheduler.scheduled("b", None, 0, 2 * BLOCK + 1)
    engine.step()
    assert engine.scheduler.matched(Request("c", 2 * BLOCK + 1), 0) == (2 * BLOCK, False)


# ---- layers in groups


class GroupedEngine(Engine):
    """Two groups of two layers, the second with a window of two blocks, a store for each."""

    def __init__(self) -> None:
        geometry = KVGeometry(
            layers=2, kv_heads=1, head_dim=BLOCK_BYTES // BLOCK, dtype="uint8", form=Form.LATENT
        )
        config = config_of()
        self.stores = [
            Store.open(
                config,
                Layout(geometry, block_tokens=BLOCK, targets=config.pages.targets, model=name),
            )
            for name in ("full", "windowed")
        ]
        self.names = [f"layer.{number}" for number in range(LAYERS)]
        self.scheduler = SchedulerSide(
            block_tokens=BLOCK, block_bytes=LAYERS * BLOCK_BYTES, groups=2, has_windows=True
        )
        self.worker = WorkerSide({self.stores[0]: self.names[:2], self.stores[1]: self.names[2:]})
        self.cache = torch.rand(LAYERS, PLACES, 2, BLOCK, BLOCK_BYTES // BLOCK // 8)
        self.worker.register(dict(zip(self.names, self.cache, strict=True)))

    def load(self, request: Request, places: list[list[int]]) -> tuple[int, set[str]]:
        """How much of a request was to be loaded, and who failed."""
        matched, is_beside = self.scheduler.matched(request, 0)
        self.scheduler.allocated(request, places, matched)
        assert is_beside == bool(matched)
        failed: set[str] = set()
        if is_beside:
            self.step()
            ended: set[str] = set()
            while not ended:
                ended, failed = self.worker.arrived(Step())
            self.scheduler.told([self.worker.report()])
            self.scheduler.failed_requests(failed)
        return matched, failed


@pytest.fixture
def grouped() -> Iterator[GroupedEngine]:
    made = GroupedEngine()
    yield made
    made.close()


def test_groups_are_kept_apart_and_nothing_is_loaded_behind_a_window(
    grouped: GroupedEngine,
) -> None:
    first = Request("a", 4 * BLOCK + 1)
    grouped.load(first, [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]])
    grouped.scheduler.scheduled("a", None, 0, first.num_tokens)
    grouped.step()
    assert [store.match_keys(first.block_hashes).blocks for store in grouped.stores] == [4, 4]
    before = grouped.cache.clone()

    second = Request("b", 4 * BLOCK + 1)
    grouped.load(second, [[21, 22, 23, 24, 25], [0, 0, 33, 34, 35]])
    now = grouped.cache
    assert torch.equal(now[:2, 21:25], before[:2, 1:5])
    assert torch.equal(now[2:, 33:35], before[2:, 13:15])
    assert torch.equal(now[2:, :33], before[2:, :33])
    assert torch.equal(now[:2, 25:], before[:2, 25:])


def test_a_group_that_has_lost_a_block_fails_the_whole_request_and_it_is_computed(
    grouped: GroupedEngine,
) -> None:
    first = Request("a", 4 * BLOCK + 1)
    grouped.load(first, [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]])
    grouped.scheduler.scheduled("a", None, 0, first.num_tokens)
    grouped.step()
    second = Request("b", 4 * BLOCK + 1)
    grouped.stores[1].hint(Hint(HintKind.FORGET, list(first.block_hashes)))
    assert grouped.load(second, [[21, 22, 23, 24, 25], [31, 32, 33, 34, 35]]) == (
        4 * BLOCK, {"b"}
    )  # fmt: skip
    assert grouped.worker.not_loaded() == set()
    assert grouped.scheduler.matched(second, 0) == (0, False)


def test_after_a_failure_nothing_is_saved_from_where_a_window_may_have_been(
    grouped: GroupedEngine,
) -> None:
    request = Request("a", 6 * BLOCK)
    grouped.load(request, [[1, 2, 3], [11, 12, 13]])
    grouped.scheduler.scheduled("a", None, 0, 3 * BLOCK)
    grouped.step()
    grouped.scheduler.failed_requests(["another"])
    grouped.scheduler.scheduled("a", [[4, 5, 6], [14, 15, 16]], 3 * BLOCK, 3 * BLOCK)
    assert grouped.scheduler.step().saves == []
    grouped.scheduler.scheduled(
        "a", [[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 15, 16]], 5 * BLOCK, BLOCK, is_all=True
    )
    saves = grouped.scheduler.step().saves
    assert [(part.group, part.first, part.places) for part in saves] == [
        (0, 0, [1, 2, 3, 4, 5, 6]), (1, 4, [15, 16])
    ]  # fmt: skip
