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
from tierkv.engines.vllm import shared
from tierkv.engines.vllm.scheduler import SchedulerSide
from tierkv.engines.vllm.step import Step
from tierkv.engines.vllm.worker import WorkerSide, bytes_of
from tierkv.store import Store
from tierkv.tiers.host import HostTier

LAYERS, BLOCK, BLOCK_BYTES, PLACES = 4, 8, 512, 40


@dataclass
class Request:
    """As vLLM's, as far as it is used."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)

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
        self.scheduler = SchedulerSide(store, block_tokens=BLOCK)
        self.worker = WorkerSide(store)
        generator = torch.Generator().manual_seed(seed)
        shape = (LAYERS, PLACES, 2, BLOCK, BLOCK_BYTES // BLOCK // 8)
        self.cache = torch.rand(shape, generator=generator, dtype=torch.float32)
        self.names = [f"layer.{number}" for number in range(LAYERS)]
        self.worker.register(dict(zip(self.names, self.cache, strict=True)))

    def compute(self, request: Request, places: list[int], tokens: int) -> set[int]:
        """Schedule a request whose external tokens were asked for, run a step; what failed."""
        matched, is_async = self.scheduler.matched(request, request.num_computed_tokens)
        self.scheduler.allocated(request, places, matched)
        if is_async:
            self.step()
            while request.request_id not in self.worker.arrived(is_idle=True):
                pass
            failed = self.worker.not_loaded()
            if failed:
                self.scheduler.failed()
                return failed
        self.scheduler.scheduled(request.request_id, places, matched, tokens - matched)
        return self.step()

    def step(self) -> set[int]:
        """What vLLM does around a forward pass."""
        step = self.scheduler.step(is_idle=False)
        self.worker.begin(step)
        for name in self.names:
            self.worker.wait_for_layer(name)
        self.worker.end()
        self.worker.save(step)
        failed = self.worker.not_loaded()
        if failed:
            self.scheduler.failed()
        return failed


@pytest.fixture
def engine() -> Iterator[Engine]:
    with opened(config_of()) as store:
        made = Engine(store)
        yield made
        made.worker.close()


def test_what_one_request_computed_another_loads_bit_for_bit(engine: Engine) -> None:
    first = Request("a", 8 * BLOCK + 3)
    assert engine.scheduler.matched(first, 0) == (0, False)
    assert engine.compute(first, list(range(8)), first.num_tokens) == set()
    assert engine.worker.saved_blocks == 8

    second = Request("b", 8 * BLOCK + 3)
    assert engine.scheduler.matched(second, 0) == (8 * BLOCK, False)
    assert engine.compute(second, [30, 21, 9, 10, 11, 39, 20, 8], second.num_tokens) == set()
    assert torch.equal(engine.cache[:, [30, 21, 9, 10, 11, 39, 20, 8]], engine.cache[:, :8])
    assert engine.worker.saved_blocks == 8, "what is stored is not put again"


def test_one_token_is_left_to_compute_and_what_the_engine_has_is_not_loaded(engine: Engine) -> None:
    engine.compute(Request("a", 8 * BLOCK), list(range(8)), 8 * BLOCK)
    assert engine.scheduler.matched(Request("b", 8 * BLOCK), 0) == (7 * BLOCK, False)
    assert engine.scheduler.matched(Request("b", 8 * BLOCK), 5 * BLOCK) == (2 * BLOCK, False)
    assert engine.scheduler.matched(Request("b", 8 * BLOCK), 7 * BLOCK) == (0, False)
    assert engine.scheduler.matched(Request("c", 3), 0) == (0, False)


def test_a_block_is_saved_when_all_its_tokens_are_computed(engine: Engine) -> None:
    request = Request("a", 3 * BLOCK + 5)
    engine.compute(request, [1, 2, 3, 4], BLOCK + 5)
    assert engine.store.match_keys(request.block_hashes).blocks == 1
    engine.scheduler.scheduled("a", [1, 2, 3, 4], BLOCK + 5, 3)
    engine.step()
    assert engine.store.match_keys(request.block_hashes).blocks == 2
    engine.scheduler.scheduled("a", [1, 2, 3, 4], 2 * BLOCK, BLOCK + 5)
    engine.scheduler.finished("a")
    engine.step()
    assert engine.store.match_keys(request.block_hashes).blocks == 3, "also of one that has ended"
    engine.scheduler.scheduled("a", [1, 2, 3, 4], 0, 3 * BLOCK)
    assert engine.scheduler.step(is_idle=True).saves == []


def test_what_is_on_disk_is_loaded_beside_the_steps(tmp_path: Path) -> None:
    with opened(config_of(tmp_path)) as store:
        one = Engine(store)
        one.compute(Request("a", 8 * BLOCK + 1), list(range(8)), 8 * BLOCK + 1)
        one.worker.close()
    with opened(config_of(tmp_path)) as store:
        other = Engine(store, seed=1)
        request = Request("b", 8 * BLOCK + 1)
        assert other.scheduler.matched(request, 0) == (8 * BLOCK, True)
        assert other.compute(request, list(range(10, 19)), request.num_tokens) == set()
        assert torch.equal(other.cache[:, 10:18], one.cache[:, :8])
        other.worker.close()


@pytest.mark.parametrize("how", ["forgotten", "an error"])
def test_blocks_that_are_not_there_any_more_are_named_and_nothing_computed_on_them_is_saved(
    engine: Engine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.compute(Request("a", 8 * BLOCK + 1), list(range(8)), 8 * BLOCK + 1)
    longer = Request("b", 12 * BLOCK + 1)
    matched, _ = engine.scheduler.matched(longer, 0)
    places = list(range(20, 33))
    engine.scheduler.allocated(longer, places, matched)
    engine.scheduler.scheduled("b", places, matched, 4 * BLOCK + 1)
    if how == "forgotten":
        from tierkv.store import Hint, HintKind

        engine.store.hint(Hint(HintKind.FORGET, list(longer.block_hashes[:8])))
    else:
        monkeypatch.setattr(Store, "lease", lambda *_, **__: 1 / 0)
    failed = engine.step()
    assert failed == set(places[:8])
    assert engine.store.match_keys(longer.block_hashes).blocks == (0 if how == "forgotten" else 8)

    monkeypatch.undo()
    engine.scheduler.scheduled("b", places, 0, 12 * BLOCK + 1)
    assert engine.step() == set()
    assert engine.store.match_keys(longer.block_hashes).blocks == 12, "computed anew, and saved"


def test_a_step_that_was_made_before_a_failure_was_known_saves_nothing(engine: Engine) -> None:
    engine.worker._not_loaded = {3}
    early = engine.scheduler.step(is_idle=False)
    assert engine.worker.not_loaded() == {3}
    request = Request("a", 2 * BLOCK)
    engine.scheduler.allocated(request, [1, 2], 0)
    engine.scheduler.scheduled("a", [1, 2], 0, 2 * BLOCK)
    early.saves = engine.scheduler.step(is_idle=False).saves
    engine.worker.save(early)
    assert engine.store.match_keys(request.block_hashes).blocks == 0
    engine.scheduler.failed()
    engine.scheduler.scheduled("a", [1, 2], 2 * BLOCK, 1)
    engine.worker.save(engine.scheduler.step(is_idle=False))
    assert engine.store.match_keys(request.block_hashes).blocks == 2


def test_a_put_that_raises_stops_no_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HostTier, "write", lambda *_, **__: 1 / 0)
    assert engine.compute(Request("a", 8 * BLOCK), list(range(8)), 8 * BLOCK) == set()
    assert "not saved request=a" in caplog.text


def test_a_layer_is_ready_before_those_after_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierkv.engines.vllm import worker

    engine.compute(Request("a", 8 * BLOCK + 1), list(range(8)), 8 * BLOCK + 1)
    request = Request("b", 8 * BLOCK + 1)
    engine.scheduler.allocated(request, list(range(20, 29)),
                               engine.scheduler.matched(request, 0)[0])  # fmt: skip
    ready: list[list[bool]] = []
    real = worker._fill

    def fill(*arguments: object) -> None:
        loading = engine.worker._loading
        assert loading is not None
        ready.append([event.is_set() for event in loading.done])
        real(*arguments)

    monkeypatch.setattr(worker, "_fill", fill)
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
        parallel_config=SimpleNamespace(world_size=1, distributed_executor_backend="uni"),
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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"layers": LAYERS}))
    (place / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(5000))
    return place


def test_changed_weights_are_another_model_and_a_copy_is_the_same(model: Path) -> None:
    config = vllm_config(model).model_config
    before = shared.weights_identity(config)
    (model / "README.md").write_text("words are no weights")
    assert shared.weights_identity(config) == before
    data = bytearray((model / "model.safetensors").read_bytes())
    data[2500] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert shared.weights_identity(config) != before


def test_mistakes_in_the_connectors_options_are_named_with_the_cure(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown cpu_bytes; known: .*directory"):
        shared.config_of({"cpu_bytes": 5}, vllm_config(model))
    with pytest.raises(ConfigError, match=r"tiers\.host\.capacity: .*64GiB"):
        shared.config_of({"host": "a lot"}, vllm_config(model))
    config = vllm_config(model, host="1MiB")
    config.parallel_config.world_size = 2
    with pytest.raises(ConfigError, match="--distributed-executor-backend uni"):
        shared.shared_store(config, SimpleNamespace(kv_cache_groups=[]))
    config = vllm_config(model, host="1MiB")
    config.cache_config.prefix_caching_hash_algo = "xxhash"
    with pytest.raises(ConfigError, match="hash-algo sha256"):
        shared.shared_store(config, SimpleNamespace(kv_cache_groups=[]))
    two = SimpleNamespace(kv_cache_groups=[SimpleNamespace(), SimpleNamespace()])
    with pytest.raises(GeometryMismatch, match="2 groups"):
        shared.shared_store(vllm_config(model, host="1MiB"), two)


def test_an_idle_step_waits_for_a_load_and_a_busy_one_does_not(engine: Engine) -> None:
    assert engine.worker.arrived(is_idle=True) == set()
    engine.worker.begin(Step())
    assert engine.worker.not_loaded() == set()
