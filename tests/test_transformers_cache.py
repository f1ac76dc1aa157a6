"""TieredCache against plain transformers: the same tokens, the same bytes, or nothing at all."""

from __future__ import annotations

import copy
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tierkv.config import Config  # noqa: E402
from tierkv.core.errors import GeometryMismatch  # noqa: E402
from tierkv.core.geometry import PageTargets  # noqa: E402
from tierkv.engines import ENGINES  # noqa: E402
from tierkv.engines.checkpoint import model_digest  # noqa: E402
from tierkv.engines.transformers import (  # noqa: E402
    Reuse,
    TieredCache,
    close_stores,
    layout_of,
    open_store,
)
from tierkv.store import Store  # noqa: E402

BLOCK = 16
VOCABULARY = 200
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 384,
    # Greedy runs must not stop early, or there is little to compare.
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(
    *, seed: int = 7, kv_heads: int = 2, dtype: str = "float32", **changes: object
) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SMALL | {"num_key_value_heads": kv_heads} | changes)
    return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def tiny_gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=384, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tiny_falcon() -> transformers.PreTrainedModel:
    """Multi-query: one KV head for four query heads, said by `multi_query` alone."""
    torch.manual_seed(7)
    small = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(**small, multi_query=True)
    ).eval()


def prompt(tokens: int, *, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def open_test_store(
    model: transformers.PreTrainedModel, directory: Path, *, host: str = "4MiB"
) -> Store:
    config = Config.model_validate(
        {
            "pages": {"hot": "1KiB", "warm": "64KiB", "cold": "256KiB"},
            "tiers": {
                "device": {"capacity": "256KiB"},
                "host": {"capacity": host},
                "cold": {
                    "capacity": "8MiB",
                    "directory": str(directory),
                    "segment_cold_pages": 4,
                    "threads": 2,
                },
            },
        }
    )
    return Store.open(config, layout_of(model, targets=config.pages.targets))


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return tiny_model()


@pytest.fixture
def store(model: transformers.PreTrainedModel, tmp_path: Path) -> Iterator[Store]:
    with open_test_store(model, tmp_path / "cold") as opened:
        yield opened


def generate(
    model: transformers.PreTrainedModel,
    ids: torch.Tensor,
    cache: transformers.Cache | None = None,
    *,
    new_tokens: int = 20,
    **options: object,
) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        **options,
    )


def answer(
    model: transformers.PreTrainedModel, ids: torch.Tensor, store: Store, **options: object
) -> tuple[torch.Tensor, TieredCache]:
    cache = TieredCache.open(model, ids, store=store)
    return generate(model, ids, cache, **options), cache


# ---- the same answer


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model(kv_heads=4),
        lambda: tiny_model(kv_heads=2),
        lambda: tiny_model(kv_heads=1),
        lambda: tiny_model(kv_heads=2, dtype="bfloat16"),
        lambda: tiny_model(kv_heads=2, head_dim=32),
        tiny_gpt2,
        tiny_falcon,
    ],
    ids=["mha", "gqa", "mqa", "bfloat16", "wide-heads", "gpt2", "falcon"],
)
def test_answer_with_a_reused_prefix_is_the_one_that_recomputing_gives(
    make: Callable[[], object], tmp_path: Path
) -> None:
    model = make()
    ids = prompt(150)
    expected = generate(model, ids)
    with open_test_store(model, tmp_path) as store:
        first, cold = answer(model, ids, store)
        second, warm = answer(model, ids, store)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert (cold.report.reused_tokens, cold.report.stored_tokens) == (0, 144)
    assert (warm.report.reused_tokens, warm.report.stored_tokens) == (144, 0)


def test_reused_keys_and_values_are_bit_for_bit_those_that_were_computed(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(100)
    _, first = answer(model, ids, store, new_tokens=1)
    again = TieredCache.open(model, ids, store=store)
    assert again.get_seq_length() == 96
    for computed, loaded in zip(first.layers, again.layers, strict=True):
        assert torch.equal(computed.keys[:, :, :96], loaded.keys)
        assert torch.equal(computed.values[:, :, :96], loaded.values)


def test_another_question_reuses_what_the_prompts_share(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    document, question = prompt(96), prompt(30, seed=4)
    answer(model, torch.cat([document, prompt(40, seed=5)], 1), store)
    ids = torch.cat([document, question], 1)
    out, cache = answer(model, ids, store)
    assert torch.equal(out, generate(model, ids))
    assert cache.report.reused_tokens == 96


def test_a_prompt_of_whole_blocks_leaves_a_token_to_compute(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(4 * BLOCK)
    answer(model, ids, store)
    out, cache = answer(model, ids, store)
    assert cache.report.reused_tokens == 3 * BLOCK
    assert torch.equal(out, generate(model, ids))


@pytest.mark.parametrize("tokens", [1, 2, BLOCK, BLOCK + 1])
def test_prompts_around_one_block_work(
    model: transformers.PreTrainedModel, store: Store, tokens: int
) -> None:
    ids = prompt(tokens)
    expected = generate(model, ids)
    for _ in range(2):
        out, cache = answer(model, ids, store)
        assert torch.equal(out, expected)
    assert cache.report.reused_tokens == (tokens - 1) // BLOCK * BLOCK


def test_chunked_prefill_stores_the_prompt_once_it_is_whole(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(150)
    out, cache = answer(model, ids, store, prefill_chunk_size=32)
    assert torch.equal(out, generate(model, ids, prefill_chunk_size=32))
    assert cache.report.stored_tokens == 144
    again = TieredCache.open(model, ids, store=store)
    assert again.report.reused_tokens == 144


def test_beams_share_the_reused_prefix(model: transformers.PreTrainedModel, store: Store) -> None:
    ids = prompt(100)
    expected = generate(model, ids, num_beams=3)
    for reused in (0, 96):
        out, cache = answer(model, ids, store, num_beams=3)
        assert cache.report.reused_tokens == reused
        assert torch.equal(out, expected)
    cache.commit(out)
    assert TieredCache.open(model, out, store=store).report.reused_tokens == 112


def test_a_cache_goes_on_into_a_second_generate_like_any_other(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    first, cache = answer(model, prompt(60), store)
    ids = torch.cat([first, prompt(25, seed=9)], 1)
    second = generate(model, ids, cache)
    assert torch.equal(second, generate(model, ids))
    cache.commit(second)
    assert TieredCache.open(model, second, store=store).report.reused_tokens == 112


def test_cache_filled_under_inference_mode_may_be_used_outside_it(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(60)
    with torch.inference_mode():
        out, cache = answer(model, ids, store, new_tokens=270)
    more = torch.cat([out, prompt(4, seed=2)], 1)
    generate(model, more, cache, new_tokens=2)
    assert cache.get_seq_length() == more.shape[1] + 1


# ---- restart, and what must not be shared


def test_prefix_survives_a_restart(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    ids = prompt(150)
    with open_test_store(model, tmp_path) as store:
        expected, _ = answer(model, ids, store)
    with open_test_store(tiny_model(), tmp_path) as store:
        out, cache = answer(tiny_model(), ids, store)
    assert torch.equal(out, expected)
    assert cache.report.tokens_by_tier["cold"] == cache.report.reused_tokens == 144


def test_bytes_damaged_on_disk_are_recomputed_and_the_answer_is_the_same(
    model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    ids = prompt(150)
    with open_test_store(model, tmp_path) as store:
        expected, cold = answer(model, ids, store)
        keys = cold.layers[0].keys[0, :, :BLOCK].clone()
    needle = keys.permute(1, 0, 2).contiguous().numpy().tobytes()
    damaged = 0
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if (at := content.find(needle)) >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([content[at] ^ 1]))
            damaged += 1
    assert damaged == 1, "the first block's keys lie on disk as they are in memory"
    with open_test_store(model, tmp_path) as store:
        out, cache = answer(model, ids, store)
    assert torch.equal(out, expected)
    assert cache.report.reused_tokens == 0


def test_other_weights_under_the_same_name_share_nothing(tmp_path: Path) -> None:
    ids = prompt(100)
    model, other = tiny_model(seed=7), tiny_model(seed=8)
    with open_test_store(model, tmp_path) as store:
        answer(model, ids, store)
        with pytest.raises(GeometryMismatch, match="revision"):
            TieredCache.open(other, ids, store=store)
    with open_test_store(other, tmp_path) as store:
        out, cache = answer(other, ids, store)
        assert cache.report.reused_tokens == 0
        assert torch.equal(out, generate(other, ids))


def test_one_changed_weight_makes_another_digest(model: transformers.PreTrainedModel) -> None:
    before = model_digest(model)
    assert model_digest(model) == before
    assert model_digest(copy.deepcopy(model)) == before
    with torch.no_grad():
        model.model.embed_tokens.weight[123, 45] += 1e-3
    assert model_digest(model) != before


def test_weights_merged_behind_autograd_make_another_digest(
    model: transformers.PreTrainedModel,
) -> None:
    before = model_digest(model)
    model.model.layers[0].self_attn.q_proj.weight.data += 1e-3  # counts no version
    assert model_digest(model) != before


def test_another_rope_base_over_the_same_weights_makes_another_digest() -> None:
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    assert model_digest(tiny_model()) != model_digest(tiny_model(rope_parameters=rope))


# ---- commit


def test_a_committed_answer_is_skipped_by_the_next_turn(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    first, cache = answer(model, prompt(60), store)
    assert cache.commit(first) == 16  # 79 tokens have K and V: 4 whole blocks, 3 were the prompt's
    turn = torch.cat([first, prompt(20, seed=5)], 1)
    out, again = answer(model, turn, store)
    assert again.report.reused_tokens == 64
    assert torch.equal(out, generate(model, turn))


def test_commit_refuses_an_answer_that_this_cache_did_not_give(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    out, cache = answer(model, prompt(60), store)
    out[0, 70] = (out[0, 70] + 1) % VOCABULARY
    with pytest.raises(ValueError, match="not what was generated"):
        cache.commit(out)


def test_commit_twice_stores_once(model: transformers.PreTrainedModel, store: Store) -> None:
    out, cache = answer(model, prompt(60), store)
    assert cache.commit(out) == 16
    assert cache.commit() == 0


# ---- crop and reset


def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(60)
    _, cache = answer(model, ids, store)
    cache.crop(-(cache.get_seq_length() - 50))
    assert cache.get_seq_length() == 50
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)


def test_tokens_that_replaced_cropped_ones_are_what_is_committed(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(60)
    _, cache = answer(model, ids, store)
    cache.crop(-(cache.get_seq_length() - 62))
    other = torch.cat([ids, prompt(40, seed=11)], 1)
    # Tokens 60 and 61 are still those of the first answer.
    other[:, 60:62] = generate(model, ids)[:, 60:62]
    out = generate(model, other, cache)
    cache.commit(out)
    assert TieredCache.open(model, out, store=store).report.reused_tokens == 112
    assert torch.equal(answer(model, out, store)[0], generate(model, out))


def test_a_cache_cropped_to_what_two_prompts_share_serves_the_other(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(100)
    _, cache = answer(model, ids, store)
    cache.crop(-(cache.get_seq_length() - 40))
    other = torch.cat([ids[:, :40], prompt(60, seed=12)], 1)
    out = generate(model, other, cache)
    assert torch.equal(out, generate(model, other))
    cache.commit(out)
    again, reusing = answer(model, out, store)
    assert reusing.report.reused_tokens == 112
    assert torch.equal(again, generate(model, out))


def test_prompt_lookup_decoding_gives_the_same_answer(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    """Candidates enter with the prompt and are cropped where they were wrong."""
    ids = prompt(30).repeat(1, 3)
    out, cache = answer(model, ids, store, prompt_lookup_num_tokens=4)
    assert torch.equal(out, generate(model, ids))
    assert cache.report.stored_tokens == 80
    cache.commit(out)
    again, reusing = answer(model, out, store)
    assert reusing.report.reused_tokens == 96
    assert torch.equal(again, generate(model, out))


def test_a_reset_cache_computes_everything_again(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(60)
    expected, cache = answer(model, ids, store)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, ids, cache), expected)


# ---- what is refused


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones((1, 2, 20), dtype=torch.long), "rows, columns"),
        (
            {
                "input_ids": prompt(20),
                "attention_mask": torch.arange(20)[None].flip(1).clamp(max=1),
            },
            "on its left",
        ),
        ({"input_ids": prompt(20), "attention_mask": torch.zeros(1, 20)}, "masked"),
        ({"input_ids": prompt(20), "pixel_values": torch.zeros(1)}, "pixel_values"),
        ({"inputs_embeds": torch.zeros(1, 4, 64)}, "input_ids"),
        (torch.ones((1, 0), dtype=torch.long), "empty"),
        (torch.full((1, 20), VOCABULARY), "outside"),
        (torch.ones((1, 385), dtype=torch.long), "context"),
    ],
    ids=["nested", "padding", "nothing", "image", "no-ids", "empty", "vocabulary", "too-long"],
)
def test_inputs_that_are_not_one_plain_prompt_are_refused(
    model: transformers.PreTrainedModel, store: Store, inputs: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TieredCache.open(model, inputs, store=store)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: transformers.Lfm2ForCausalLM(
                transformers.Lfm2Config(
                    **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]
                )
            ),
            "linear",
        ),
        (
            lambda: tiny_model(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "dynamic",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8
                )
            ),
            "encoder-decoder",
        ),
    ],
    ids=["convolutions", "dynamic-rope", "encoder-decoder"],
)
def test_models_whose_cache_is_another_kind_are_refused(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(GeometryMismatch, match=message):
        layout_of(make())


def test_another_prompt_than_the_cache_was_opened_for_raises_before_it_computes(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(60)
    cache = TieredCache.open(model, ids, store=store)
    with pytest.raises(ValueError, match="other tokens"):
        generate(model, ids.flip(1), cache)
    assert cache.get_seq_length() == 0
    assert store.match(ids.flip(1)[0].numpy()).tokens == 0


def test_masked_or_embedded_prompts_raise(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    ids = prompt(60)
    cache = TieredCache.open(model, ids, store=store)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    with torch.no_grad():
        with pytest.raises(ValueError, match="causal mask"):
            model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="position_ids"):
            model(ids, position_ids=torch.arange(5, 65)[None], past_key_values=cache)
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 60, 64), past_key_values=cache)


def test_tokens_that_were_not_seen_are_not_stored(
    model: transformers.PreTrainedModel, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt(60)
    cache = TieredCache.open(model, ids, store=store)
    with torch.no_grad():
        model.model(ids, past_key_values=cache)  # past the hook on the whole model
    assert cache.get_seq_length() == 60
    assert cache.report.stored_tokens == 0
    assert "not seen" in caplog.text


def test_neither_a_store_nor_a_directory_is_an_error(model: transformers.PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"store=.* or directory="):
        TieredCache.open(model, prompt(20))


# ---- stores by directory


def test_a_directory_is_enough_and_outlives_the_model(tmp_path: Path) -> None:
    ids = prompt(100)
    sizes = {"host": "32MiB", "cold": "128MiB"}
    model = tiny_model()
    expected = generate(model, ids)
    for _ in range(2):
        cache = TieredCache.open(model, ids, directory=tmp_path, **sizes)
        assert torch.equal(generate(model, ids, cache), expected)
    assert cache.report.reused_tokens == 96
    assert open_store(model, tmp_path, **sizes) is cache.store
    close_stores(model)
    del model, cache
    gc.collect()
    again = tiny_model()
    cache = TieredCache.open(again, ids, directory=tmp_path, **sizes)
    assert cache.report.tokens_by_tier["cold"] == 96
    close_stores(again)


SCRIPT = """
import sys, torch, transformers
from tierkv.engines.transformers import TieredCache

torch.manual_seed(7)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)).eval()
ids = torch.arange(1, 101)[None]
cache = TieredCache.open(model, ids, directory=sys.argv[1], host="32MiB", cold="128MiB")
out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                     max_new_tokens=8, do_sample=False)
print(cache.report.tokens_by_tier.get("cold", 0), out[0, 100:].tolist())
"""


def test_a_script_that_closes_nothing_still_leaves_its_blocks_to_the_next(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    said = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    reused, answers = zip(*(line.split(" ", 1) for line in said), strict=True)
    assert reused == ("0", "96")
    assert answers[0] == answers[1]


def test_dropped_caches_leave_no_hook_on_the_model(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    for _ in range(3):
        answer(model, prompt(40), store, new_tokens=1)
    gc.collect()
    assert not model._forward_pre_hooks


# ---- the report


def test_a_short_prefix_of_a_long_prompt_is_computed_sooner_than_loaded(
    model: transformers.PreTrainedModel, store: Store
) -> None:
    long = prompt(300)
    answer(model, long[:, : 2 * BLOCK], store)
    plain = generate(model, long)
    out, cache = answer(model, long, store)

    assert torch.equal(out, plain)
    assert (cache.report.reused_tokens, cache.report.declined_tokens) == (0, 2 * BLOCK)
    assert store.match(long[0].numpy()).tokens == 300 // BLOCK * BLOCK, (
        "the rest is put all the same"
    )
    assert "(32 stored ones are computed sooner than used)" in str(cache.report)
    forced = TieredCache.open(model, long, store=store, always_load=True)
    assert forced.report.reused_tokens == 299 // BLOCK * BLOCK


def test_report_is_one_line_for_people() -> None:
    report = Reuse(6021, reused_tokens=5984, reused_bytes=275_742_720, load_s=0.31)
    report.tokens_by_tier = {"device": 0, "host": 0, "cold": 5984}
    assert str(report) == "reused 5,984 of 6,021 tokens (nvme 5,984): 275.7 MB in 0.31 s"


def test_report_of_a_real_run_adds_up(model: transformers.PreTrainedModel, store: Store) -> None:
    ids = prompt(150)
    answer(model, ids, store)
    _, cache = answer(model, ids, store)
    report = cache.report
    assert sum(report.tokens_by_tier.values()) == report.reused_tokens == 144
    assert report.reused_bytes == 144 * store.layout.geometry.token_bytes
    assert re.fullmatch(r"reused 144 of 150 tokens \(.*\): 0\.1 MB in \d+\.\d\d s", str(report))


def test_engine_is_registered_by_name() -> None:
    assert ENGINES.load("transformers") is TieredCache


def test_layout_of_a_model_says_its_shape(model: transformers.PreTrainedModel) -> None:
    layout = layout_of(model, targets=PageTargets())
    geometry = layout.geometry
    assert (geometry.layers, geometry.kv_heads, geometry.head_dim) == (2, 2, 16)
    assert (geometry.dtype, layout.model, len(layout.revision)) == ("float32", "llama", 32)
