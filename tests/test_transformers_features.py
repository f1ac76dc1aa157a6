"""What `generate` can do, done with a TieredCache, against transformers' own cache: same tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tierkv.config import Config  # noqa: E402
from tierkv.core.errors import ConfigError, GeometryMismatch  # noqa: E402
from tierkv.core.geometry import Form  # noqa: E402
from tierkv.engines.transformers import (  # noqa: E402
    TieredCache,
    close_stores,
    layout_of,
    open_store,
)
from tierkv.store import Store  # noqa: E402

BLOCK = 16
VOCABULARY = 200
WINDOW = 24
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 384,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
}

Model = transformers.PreTrainedModel


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(name: str, *, seed: int = 7, **changes: object) -> Model:
    torch.manual_seed(seed)
    text = "Text" if name in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{name}{text}Config")(**SMALL | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def llama(**changes: object) -> Model:
    return made("Llama", **changes)


def mistral() -> Model:
    """A window in every layer."""
    return made("Mistral", sliding_window=WINDOW)


def gemma() -> Model:
    """A window in the first and third layer, of two kinds of RoPE."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return made(
        "Gemma3", num_hidden_layers=4, head_dim=16, layer_types=kinds, sliding_window=WINDOW
    )


def deepseek() -> Model:
    return made("DeepseekV3", **LATENT)


def gpt2() -> Model:
    torch.manual_seed(7)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=384,
            eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip


KINDS = [llama, mistral, gemma, deepseek, gpt2]
kinds = pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)


def prompt(tokens: int, *, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def padded(*prompts: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch, padded on the left with token 0."""
    columns = max(ids.shape[1] for ids in prompts)
    rows = [torch.nn.functional.pad(ids[0], (columns - ids.shape[1], 0)) for ids in prompts]
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def opened(model: Model, directory: Path, **tiers: object) -> Store:
    config = Config.model_validate(
        {
            "pages": {"hot": "1KiB", "warm": "64KiB", "cold": "256KiB"},
            "tiers": {
                "device": {"capacity": 0},
                "host": {"capacity": "4MiB"},
                "cold": {"capacity": "8MiB", "directory": str(directory), "segment_cold_pages": 4},
            }
            | tiers,
        }
    )
    return Store.open(config, layout_of(model, targets=config.pages.targets))


def generate(
    model: Model,
    inputs: dict[str, torch.Tensor] | torch.Tensor,
    cache: transformers.Cache | None = None,
    *,
    new_tokens: int = 20,
    **options: object,
) -> torch.Tensor:
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False, **options
    )


def twice(
    model: Model,
    inputs: dict[str, torch.Tensor] | torch.Tensor,
    store: Store,
    *,
    settings: dict[str, object] | None = None,
    **options: object,
) -> TieredCache:
    """Ask, commit and ask again: both answers must be those of transformers' own cache."""
    expected = generate(model, inputs, **options)
    for _ in range(2):
        cache = TieredCache.open(model, inputs, store=store, always_load=True, **settings or {})
        out = generate(model, inputs, cache, **options)
        assert torch.equal(out, expected)
        cache.commit(out)
    return cache


# ---- kinds of models


@kinds
@pytest.mark.parametrize("tokens", [WINDOW - 4, 100])
def test_kinds_of_models_answer_as_with_their_own_cache(
    make: Callable[[], Model], tokens: int, tmp_path: Path
) -> None:
    model = make()
    with opened(model, tmp_path) as store:
        cache = twice(model, prompt(tokens), store, new_tokens=40)
        assert cache.report.reused_tokens == (tokens - 1) // BLOCK * BLOCK


@kinds
def test_kinds_of_models_go_on_from_what_a_prefix_shares(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    """The shared part ends in another place than the stored one: windows are whole there too."""
    model = make()
    with opened(model, tmp_path) as store:
        twice(model, torch.cat([prompt(64), prompt(70, seed=5)], 1), store)
        cache = twice(model, torch.cat([prompt(64), prompt(30, seed=6)], 1), store)
        assert cache.report.reused_tokens == 80


@kinds
def test_kinds_of_models_survive_a_crop(make: Callable[[], Model], tmp_path: Path) -> None:
    """Back past the window: a layer of transformers' own has forgotten what is needed there."""
    model, ids = make(), prompt(100)
    with opened(model, tmp_path) as store:
        cache = TieredCache.open(model, ids, store=store)
        generate(model, ids, cache)
        cache.crop(-(cache.get_seq_length() - 50))
        assert torch.equal(generate(model, ids, cache), generate(model, ids))


def test_a_window_layer_hands_out_its_window_and_stores_every_token(tmp_path: Path) -> None:
    model, ids = gemma(), prompt(100)
    with opened(model, tmp_path) as store:
        twice(model, ids, store)
        cache = TieredCache.open(model, ids, store=store)
        seen = [layer.update(*torch.zeros((2, 1, 2, 1, 16)))[0].shape[2] for layer in cache.layers]
    assert seen == [WINDOW, 97, WINDOW, 97]


def test_a_latent_model_keeps_latents_and_not_heads(tmp_path: Path) -> None:
    geometry = layout_of(deepseek()).geometry
    assert (geometry.form, geometry.kv_heads, geometry.head_dim) == (Form.LATENT, 1, 40)
    assert geometry.token_bytes == 2 * 40 * 4


def test_chunked_attention_is_as_with_its_own_cache_and_has_no_static_shapes(
    tmp_path: Path,
) -> None:
    model = made(
        "Llama4", attention_chunk_size=WINDOW, head_dim=16, intermediate_size_mlp=96,
        num_local_experts=2, layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    with opened(model, tmp_path) as store:
        for tokens in (WINDOW - 4, 100):
            twice(model, prompt(tokens), store, new_tokens=40)
        with pytest.raises(ConfigError, match="chunked attention"):
            TieredCache.open(model, prompt(100), store=store, max_tokens=200)


def mimo(*kinds: str) -> Model:
    return made(
        "MiMoV2Flash", head_dim=24, v_head_dim=16, layer_types=list(kinds), sliding_window=WINDOW,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip


def test_heads_whose_values_are_narrower_than_their_keys_come_back(tmp_path: Path) -> None:
    model = mimo("full_attention", "full_attention")
    geometry = layout_of(model).geometry
    assert (geometry.head_dim, geometry.value_dim) == (24, 16)
    with opened(model, tmp_path) as store:
        assert twice(model, prompt(100), store).report.reused_tokens == 96


def test_layers_that_cache_unlike_heads_are_refused() -> None:
    with pytest.raises(GeometryMismatch, match="one shape in all of them"):
        layout_of(mimo("full_attention", "sliding_attention"))


# ---- ways to decode


@kinds
def test_beams_share_a_reused_prefix_and_the_best_is_committed(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    model, ids = make(), prompt(100)
    with opened(model, tmp_path) as store:
        cache = twice(model, ids, store, num_beams=3, new_tokens=40)
        assert cache.report.reused_tokens == 96
        best = generate(model, ids, num_beams=3, new_tokens=40)
        again = TieredCache.open(model, torch.cat([best, ids], 1), store=store)
        assert again.report.reused_tokens >= 112, "the answer was committed"
        assert torch.equal(
            generate(model, torch.cat([best, ids], 1), again),
            generate(model, torch.cat([best, ids], 1)),
        )


def test_several_beams_returned_are_each_their_own_row(tmp_path: Path) -> None:
    model = llama()
    with opened(model, tmp_path) as store:
        twice(model, prompt(100), store, num_beams=3, num_return_sequences=3)
        twice(model, padded(prompt(60), prompt(90, seed=4)), store, num_beams=2)


@kinds
@pytest.mark.parametrize("helper", ["draft", "lookup"])
def test_assisted_decoding_starts_behind_a_reused_prefix(
    make: Callable[[], Model], helper: str, tmp_path: Path
) -> None:
    """transformers gives the model the whole prompt again; what is held is left out of it."""
    model = make()
    ids = prompt(30).repeat(1, 3)
    options = (
        {"assistant_model": llama(seed=8)} if helper == "draft" else {"prompt_lookup_num_tokens": 4}
    )
    given: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: given.append(args[0].shape[1])
    )
    with opened(model, tmp_path) as store:
        expected = generate(model, ids, new_tokens=40)
        for reused in (0, 80):
            given.clear()
            cache = TieredCache.open(model, ids, store=store, always_load=True)
            out = generate(model, ids, cache, new_tokens=40, **options)
            assert torch.equal(out, expected)
            assert cache.report.reused_tokens == reused
            assert given[0] < 100 - reused + 10, "the held part was computed again"
            cache.commit(out)
        assert TieredCache.open(model, out, store=store).report.reused_tokens == 128


def test_a_second_assisted_answer_goes_on_with_the_same_cache(tmp_path: Path) -> None:
    model, ids = llama(), prompt(60)
    with opened(model, tmp_path) as store:
        cache = TieredCache.open(model, ids, store=store)
        more = torch.cat([generate(model, ids, cache), prompt(20, seed=5)], 1)
        out = generate(model, more, cache, prompt_lookup_num_tokens=4)
        assert torch.equal(out, generate(model, more))


def test_ids_of_cropped_tokens_are_not_put_over_what_was_computed_unseen(tmp_path: Path) -> None:
    model, ids = llama(), prompt(60)
    with opened(model, tmp_path) as store, torch.no_grad():
        cache = TieredCache.open(model, ids, store=store)
        generate(model, ids, cache)
        cache.crop(-(cache.get_seq_length() - 62))
        model.model(prompt(16, seed=12), past_key_values=cache)  # past the hook
        assert cache.get_seq_length() == 78
        assert cache.commit() == 0


def test_an_answer_is_streamed_from_a_thread(tmp_path: Path) -> None:
    model, ids = llama(), prompt(100)
    words = {f"w{n}": n for n in range(VOCABULARY)}
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    expected = generate(model, ids)[0, 100:].tolist()
    with opened(model, tmp_path) as store:
        for _ in range(2):
            cache = TieredCache.open(model, ids, store=store)
            streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
            thread = threading.Thread(
                target=generate, args=(model, ids, cache), kwargs={"streamer": streamer}
            )
            thread.start()
            text = "".join(streamer)
            thread.join()
            assert [words[word] for word in text.split()] == expected
        assert cache.report.reused_tokens == 96


# ---- batches


@kinds
def test_rows_of_a_padded_batch_keep_their_own_prefixes(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    model = make()
    prompts = [prompt(90), prompt(60, seed=4), prompt(75, seed=5)]
    with opened(model, tmp_path) as store:
        cache = twice(model, padded(*prompts), store)
        # The rows end in column 76: 64 + 15 of 75 tokens, the least that is stored of one.
        assert min(cache.reused_tokens) > 0
        assert cache.report.reused_tokens == sum(cache.reused_tokens)
        for ids in prompts:
            assert twice(model, ids, store).report.reused_tokens == (ids.shape[1] - 1) // 16 * 16


@kinds
def test_prefixes_stored_alone_are_found_by_a_padded_row(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    """So padding poisons no key: a row's blocks are those of its prompt alone."""
    model = make()
    prompts = [prompt(90), prompt(61, seed=4)]
    with opened(model, tmp_path) as store:
        for ids in prompts:
            twice(model, ids, store)
        cache = TieredCache.open(model, padded(*prompts), store=store, always_load=True)
        assert cache.reused_tokens == [77, 48]
        assert cache.get_seq_length() == 77
        out = generate(model, padded(*prompts), cache)
        assert torch.equal(out, generate(model, padded(*prompts)))


def test_padded_rows_store_the_bytes_that_they_have_alone(tmp_path: Path) -> None:
    model, ids = llama(), prompt(60)
    alone = TieredCache.open(model, ids, store=(store := opened(model, tmp_path)))
    generate(model, ids, alone, new_tokens=1)
    row = TieredCache.open(model, padded(prompt(90, seed=4), ids), store=store)
    generate(model, padded(prompt(90, seed=4), ids), row, new_tokens=1)
    for ours, theirs in zip(alone.layers, row.layers, strict=True):
        assert torch.allclose(ours.keys[0], theirs.keys[1, :, 30:], atol=1e-5)
        assert torch.allclose(ours.values[0], theirs.values[1, :, 30:], atol=1e-5)
    store.close()


def test_a_padded_row_is_not_computed_without_its_mask(tmp_path: Path) -> None:
    model, batch = llama(), padded(prompt(60), prompt(40, seed=4))
    with opened(model, tmp_path) as store, torch.no_grad():
        cache = TieredCache.open(model, batch, store=store)
        with pytest.raises(ValueError, match="attention_mask"):
            model(batch["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match="position_ids"):
            model(**batch, past_key_values=cache)
        mask = batch["attention_mask"].clone()
        mask[1, 25] = 0
        with pytest.raises(ValueError, match="causal mask"):
            model(batch["input_ids"], attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="causal mask"):
            model(batch["input_ids"], mask, past_key_values=cache)
        assert not store.match(prompt(60)[0].numpy()).tokens


def test_a_batch_whose_rows_share_a_document_stores_it_once(tmp_path: Path) -> None:
    model, document = llama(), prompt(96)
    batch = padded(*(torch.cat([document, prompt(20, seed=n)], 1) for n in range(3)))
    with opened(model, tmp_path) as store:
        cache = TieredCache.open(model, batch, store=store)
        generate(model, batch, cache, new_tokens=2)
        assert cache.report.stored_tokens == 96 + 3 * 16


def test_a_row_that_ends_before_the_others_leaves_no_filling_in_the_store(tmp_path: Path) -> None:
    model = llama()
    batch = padded(prompt(90), prompt(60, seed=4))
    first, other = generate(model, batch, new_tokens=60).tolist()
    ends = next(token for token in first[92:] if token not in other)
    options = {"eos_token_id": ends, "pad_token_id": 0, "new_tokens": 60}
    with opened(model, tmp_path) as store:
        cache = TieredCache.open(model, batch, store=store)
        out = generate(model, batch, cache, **options)
        assert torch.equal(out, generate(model, batch, **options))
        length = out[0].tolist().index(ends, 90)
        assert not out[0, length + 1 :].any(), "the first row ended"
        cache.commit(out)
        assert store.match(out[0].numpy()).tokens == (length + 1) // BLOCK * BLOCK
        assert store.match(out[1, 30:].numpy()).tokens > 96


# ---- static shapes


@kinds
def test_static_shapes_give_the_same_tokens_and_never_change(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    model, shapes = make(), set()
    update = TieredCache.update

    def noted(self: TieredCache, *args: object, **kwargs: object) -> object:
        states = update(self, *args, **kwargs)
        shapes.add(tuple(states[0].shape))
        return states

    with opened(model, tmp_path) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TieredCache, "update", noted)
        cache = twice(model, prompt(100), store, settings={"max_tokens": 160}, new_tokens=40)
        assert cache.is_compileable
        assert cache.report.reused_tokens == 96
    assert {shape[2] for shape in shapes} == {160}


def test_static_shapes_of_padded_rows_and_of_beams(tmp_path: Path) -> None:
    model, settings = llama(), {"max_tokens": 160}
    batch = padded(prompt(90), prompt(60, seed=4))
    with opened(model, tmp_path) as store:
        assert min(twice(model, batch, store, settings=settings).reused_tokens) > 0
        twice(model, batch, store, settings=settings, num_beams=3)
        twice(model, prompt(90), store, settings=settings, num_beams=3)
        twice(model, prompt(90), store, settings=settings, prompt_lookup_num_tokens=4)


def test_static_shapes_are_compiled_once(tmp_path: Path) -> None:
    model, ids = llama(), prompt(100)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    options = transformers.CompileConfig(backend=backend, fullgraph=False, mode=None)
    options._compile_all_devices = True
    with opened(model, tmp_path) as store:
        expected = generate(model, ids)
        for _ in range(2):
            cache = TieredCache.open(model, ids, store=store, max_tokens=160)
            assert torch.equal(generate(model, ids, cache, compile_config=options), expected)
        assert cache.report.reused_tokens == 96
    graphs = len(compiled)
    assert 0 < graphs < 8, "a step was compiled again"


def test_static_shapes_say_what_does_not_fit(tmp_path: Path) -> None:
    model, ids = llama(), prompt(100)
    with opened(model, tmp_path) as store:
        with pytest.raises(ConfigError, match="no room behind a prompt of 100"):
            TieredCache.open(model, ids, store=store, max_tokens=100)
        with pytest.raises(ConfigError, match="exclude each other"):
            TieredCache.open(model, ids, store=store, max_tokens=200, offloaded=True)
        cache = TieredCache.open(model, ids, store=store, max_tokens=110)
        with pytest.raises(ValueError, match="open with more"):
            generate(model, ids, cache)


# ---- several models


def test_two_models_share_a_directory_and_no_block(tmp_path: Path) -> None:
    models = [llama(seed=7), llama(seed=8), mistral()]
    sizes = {"host": "32MiB", "cold": "128MiB"}
    ids = prompt(100)
    expected = [generate(model, ids) for model in models]
    assert not torch.equal(expected[0], expected[1])
    for turn in range(2):
        for model, tokens in zip(models, expected, strict=True):
            cache = TieredCache.open(model, ids, directory=tmp_path, **sizes)
            assert torch.equal(generate(model, ids, cache), tokens)
            assert cache.report.reused_tokens == 96 * turn
    stores = [open_store(model, tmp_path, **sizes) for model in models]
    with pytest.raises(GeometryMismatch, match="revision"):
        TieredCache.open(models[0], ids, store=stores[1])
    cache = TieredCache.open(models[0], ids, store=stores[0])
    assert torch.equal(generate(models[1], ids, cache=None), expected[1])
    for model in models:
        close_stores(model)
