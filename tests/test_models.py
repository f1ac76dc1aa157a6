from __future__ import annotations

import pytest

from tierkv import ConfigError
from tierkv.core.geometry import Form
from tierkv.core.models import MODELS, model_geometry


@pytest.mark.parametrize(
    ("spec", "token_bytes"),
    [
        # layers x planes x KV heads x head dim x bytes, from the published config.json files.
        ("llama-3-8b", 32 * 2 * 8 * 128 * 2),
        ("llama-3-70b", 80 * 2 * 8 * 128 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("qwen3-8b", 36 * 2 * 8 * 128 * 2),
        ("mistral-7b", 32 * 2 * 8 * 128 * 2),
        ("smollm2-135m", 30 * 2 * 3 * 64 * 2),
        ("gpt2", 12 * 2 * 12 * 64 * 4),
        ("falcon-7b", 32 * 2 * 1 * 64 * 2),
        ("llama-3-70b:tp8", 80 * 2 * 1 * 128 * 2),
        ("llama-3-70b:tp8:fp8", 80 * 2 * 1 * 128),
        ("llama-3-70b:int8:tp2", 80 * 2 * 4 * 128),
        ("falcon-7b:tp4", 32 * 2 * 1 * 64 * 2),
        ("deepseek-v3:tp8", 61 * 576 * 2),
        ("gpt2:fp16", 12 * 2 * 12 * 64 * 2),
        (" LLaMA-3-8B ", 32 * 2 * 8 * 128 * 2),
    ],
)
def test_a_token_takes_what_the_published_numbers_say(spec: str, token_bytes: int) -> None:
    assert model_geometry(spec).token_bytes == token_bytes


def test_every_kind_of_attention_is_there() -> None:
    assert MODELS["deepseek-v3"].form is Form.LATENT
    assert MODELS["falcon-7b"].kv_heads == 1
    assert MODELS["gpt2"].kv_heads == 12
    assert MODELS["llama-3-8b"].kv_heads == 8


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_found_by_its_name(name: str) -> None:
    assert model_geometry(name) == MODELS[name]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lama-3-8b", "did you mean 'llama-3-8b'?"),
        ("claude", "known: "),
        ("", "known: "),
        ("gpt2:fp61", "did you mean 'fp16'?"),
        ("gpt2:tp0", "neither tpN nor a dtype"),
        ("gpt2:tp5", "neither divide over 5 ranks nor replicate"),
        ("gpt2:tp2:tp4", "says tp twice"),
        ("gpt2:fp16:int8", "says dtype twice"),
        ("gpt2:", "neither tpN nor a dtype"),
        ("gpt2:tp99999", "neither tpN nor a dtype"),
    ],
)
def test_a_wrong_spec_is_a_config_error_with_the_cure(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_geometry(spec)
    assert message in str(caught.value)
