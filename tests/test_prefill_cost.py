"""PrefillCost: where loading a prefix makes the first token sooner."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tierkv.core.geometry import KVGeometry  # noqa: E402
from tierkv.engines.prefill_cost import PrefillCost  # noqa: E402


def test_a_masked_rest_may_be_dearer_than_the_whole() -> None:
    sdpa = PrefillCost(token_ops=1000, pair_ops=10, skips_future=True)
    # whole 100 x (1000 + 500); rest (100 - n) x (1000 + 1000): even at n = 25
    assert [sdpa.spares(100, n) for n in (0, 24, 25, 26, 99)] == [False, False, False, True, True]
    eager = PrefillCost(token_ops=1000, pair_ops=10, skips_future=False)
    assert [eager.spares(100, n) for n in (0, 1)] == [False, True]
    assert PrefillCost(1, 1000, True).spares(2, 1), "a single token needs no mask"


def test_costs_of_a_model_are_its_weights_without_embeddings_and_its_query_heads() -> None:
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    geometry = KVGeometry(layers=2, kv_heads=2, head_dim=16, dtype="float32")
    cost = PrefillCost.of(transformers.LlamaForCausalLM(config), geometry)

    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # Q and O, K and V, the MLP
    assert cost == PrefillCost(2 * 2 * layer, 4 * 2 * 4 * 16, skips_future=True)
