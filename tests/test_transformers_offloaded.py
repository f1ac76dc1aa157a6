"""Offloaded decode: the tokens of a cache on the device, with two layers of it there at most."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tierkv.config import Config  # noqa: E402
from tierkv.core.errors import StoreClosed  # noqa: E402
from tierkv.core.geometry import KVGeometry  # noqa: E402
from tierkv.engines.kv_buffer import BlockForm, TieredLayer  # noqa: E402
from tierkv.engines.transformers import TieredCache, layout_of  # noqa: E402
from tierkv.engines.transformers.offloaded import OffloadedLayer, Workbench  # noqa: E402
from tierkv.store import Store  # noqa: E402

LAYERS = 6
VOCABULARY = 200
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(name: str = "Llama", **changes: object) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def mistral() -> transformers.PreTrainedModel:
    return llama("Mistral", sliding_window=24)


def prompt(tokens: int, *, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def opened(
    model: transformers.PreTrainedModel,
    directory: Path,
    *,
    host: str = "8MiB",
    device: str | int = 0,
) -> Store:
    config = Config.model_validate(
        {
            "pages": {"hot": "1KiB", "warm": "64KiB", "cold": "256KiB"},
            "tiers": {
                "device": {"capacity": device},
                "host": {"capacity": host},
                "cold": {"capacity": "8MiB", "directory": str(directory), "segment_cold_pages": 4},
            },
        }
    )
    return Store.open(config, layout_of(model, targets=config.pages.targets))


def generate(
    model: transformers.PreTrainedModel,
    inputs: dict[str, torch.Tensor] | torch.Tensor,
    cache: TieredCache | None = None,
    **options: object,
) -> torch.Tensor:
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    settings = {"max_new_tokens": 20, "do_sample": False, "past_key_values": cache} | options
    return model.generate(**inputs, **settings)


def asked(
    model: transformers.PreTrainedModel,
    inputs: dict[str, torch.Tensor] | torch.Tensor,
    store: Store,
    **options: object,
) -> TieredCache:
    """Ask twice, the second time from the store; both answers must be those of their own cache."""
    expected = generate(model, inputs, **options)
    for _ in range(2):
        cache = TieredCache.open(model, inputs, store=store, offloaded=True, always_load=True)
        out = generate(model, inputs, cache, **options)
        assert torch.equal(out, expected)
        cache.commit(out)
    return cache


def computed_bytes(cache: TieredCache) -> int:
    return sum(layer.tail.held_bytes for layer in cache.layers)


@pytest.mark.parametrize("make", [llama, mistral], ids=["llama", "mistral"])
def test_two_layers_are_on_the_device_and_the_rest_is_where_the_store_has_it(
    make: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    model, ids = make(), prompt(1000)
    with opened(model, tmp_path) as store:
        cache = asked(model, ids, store)
        assert cache.report.reused_tokens == 992
        whole = 1020 * store.layout.geometry.token_bytes
        assert cache.bench.held_bytes <= 2 * 1280 * store.layout.geometry.token_layer_bytes
        assert cache.bench.held_bytes < whole / 2
        assert [layer.base_tokens for layer in cache.layers] == [992] * LAYERS
        assert computed_bytes(cache) < whole / 8, "the prefix is in memory twice"
        host = store._memory.host.blocks
        for layer in cache.layers:
            for data in layer._base(layer.number):
                assert np.shares_memory(data, host)


def test_every_layer_but_the_first_ones_was_there_when_its_turn_came(tmp_path: Path) -> None:
    model, ids = llama(), prompt(200)
    with opened(model, tmp_path) as store:
        bench = asked(model, ids, store).bench
    assert bench.late == 1
    assert bench.ready == 20 * LAYERS - 1


def test_a_prompt_that_was_computed_moves_into_the_store(tmp_path: Path) -> None:
    model, ids = llama(), prompt(500)
    with opened(model, tmp_path) as store:
        cache = TieredCache.open(model, ids, store=store, offloaded=True)
        assert torch.equal(generate(model, ids, cache), generate(model, ids))
        assert cache.layers[0].base_tokens == 496
        assert cache.commit() == 16
        del cache
        gc.collect()
        store.check()


def test_a_store_whose_host_memory_is_too_small_costs_a_copy_and_no_token(tmp_path: Path) -> None:
    model, ids = llama(), prompt(500)
    with opened(model, tmp_path, host="256KiB") as store:
        cache = asked(model, ids, store)
        assert cache.layers[0].base_tokens == 0
        assert cache.layers[0].tail.get_seq_length() == 519
        assert cache.report.reused_tokens > 0


def test_blocks_in_the_device_tier_are_copied_out_of_it(tmp_path: Path) -> None:
    model, ids = llama(), prompt(100)
    with opened(model, tmp_path, device="512KiB") as store:
        cache = asked(model, ids, store)
        assert cache.layers[0].base_tokens == 0
        assert cache.report.reused_tokens == 96


def test_a_store_that_was_closed_under_a_cache_is_an_error(tmp_path: Path) -> None:
    model, ids = llama(), prompt(100)
    with opened(model, tmp_path) as store:
        cache = asked(model, ids, store)
    with pytest.raises(StoreClosed, match="while its blocks were leased"):
        generate(model, torch.cat([ids, ids], 1), cache)


def test_the_lease_ends_with_the_cache(tmp_path: Path) -> None:
    model, ids = llama(), prompt(500)
    with opened(model, tmp_path, host="1MiB") as store:
        for seed in range(4):
            cache = TieredCache.open(model, ids, store=store, offloaded=True)
            assert torch.equal(generate(model, ids, cache), generate(model, ids))
            ids = prompt(500, seed=seed)
            assert cache.layers[0].base_tokens == 496, "an older cache's lease is in the way"


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 32}],
    ids=["beams", "lookup", "chunks"],
)
def test_other_ways_to_decode(options: dict[str, object], tmp_path: Path) -> None:
    model = llama()
    with opened(model, tmp_path) as store:
        cache = asked(model, prompt(30).repeat(1, 4), store, **options)
        assert cache.report.reused_tokens == 112


def test_a_padded_batch(tmp_path: Path) -> None:
    model = llama()
    ids = torch.cat([prompt(90), torch.nn.functional.pad(prompt(60, seed=4), (30, 0))])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with opened(model, tmp_path) as store:
        assert asked(model, batch, store).reused_tokens == [78, 48]
        assert asked(model, batch, store, num_beams=2).reused_tokens == [78, 48]


@pytest.mark.parametrize("left", [600, 510, 500, 491, 480, 3], ids=lambda left: f"to-{left}")
def test_a_crop_into_what_is_leased(left: int, tmp_path: Path) -> None:
    model, ids = llama(), prompt(590)
    with opened(model, tmp_path) as store:
        asked(model, ids[:, :500], store)
        cache = TieredCache.open(model, ids, store=store, offloaded=True)
        generate(model, ids, cache)
        cache.crop(-(cache.get_seq_length() - left))
        assert cache.get_seq_length() == left
        other = torch.cat([ids[:, :left], prompt(40, seed=9)], 1)
        if left > 590:
            other[:, 590:left] = generate(model, ids)[:, 590:left]
        out = generate(model, other, cache)
        assert torch.equal(out, generate(model, other))
        cache.commit(out)
        again = TieredCache.open(model, out, store=store, always_load=True)
        assert again.report.reused_tokens == (out.shape[1] - 1) // 16 * 16
        assert torch.equal(generate(model, out, again), generate(model, out))


def test_a_reset_cache_computes_everything_again(tmp_path: Path) -> None:
    model, ids = llama(), prompt(100)
    with opened(model, tmp_path) as store:
        cache = asked(model, ids, store)
        cache.reset()
        assert torch.equal(generate(model, ids, cache), generate(model, ids))


def test_layers_do_what_dynamic_layers_do_when_rows_change() -> None:
    """Rows picked, repeated and cut between steps: what was fetched ahead is fetched again."""
    form = BlockForm(KVGeometry(layers=3, kv_heads=2, head_dim=8, dtype="float32"))
    bench = Workbench(form, CPU)
    ours = [
        OffloadedLayer(n, TieredLayer(form, capacity=4, tokens_max=999), bench) for n in range(3)
    ]
    theirs = [transformers.cache_utils.DynamicLayer() for _ in range(3)]
    rng = torch.Generator().manual_seed(1)
    rows = 2
    for step in range(40):
        tokens = 1 + 5 * (step % 7 == 0)
        for mine, plain in zip(ours, theirs, strict=True):
            states = torch.randn((2, rows, 2, tokens, 8), generator=rng)
            for got, expected in zip(mine.update(*states), plain.update(*states), strict=True):
                assert torch.equal(got, expected)
        for layer in (*ours, *theirs):
            if step % 3 == 1:
                layer.crop(-2)
            if step % 5 == 2:
                layer.reorder_cache(torch.arange(rows).flip(0))
            if step == 10:
                layer.batch_repeat_interleave(2)
            if step == 20:
                layer.batch_select_indices(torch.tensor([3, 0, 2]))
        rows = {10: 4, 20: 3}.get(step, rows)
