"""Hugging Face transformers: `TieredCache` as `past_key_values`, from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

from tierkv.core.geometry import Form
from tierkv.doctor_hardware import Finding, State
from tierkv.setups.base import Asked, EngineSetup, Start

_SNIPPET: Final = """\
from tierkv import Store, load_config
from tierkv.engines.transformers import TieredCache, layout_of
from transformers import AutoModelForCausalLM, AutoTokenizer

config, name = load_config({config!r}), {model!r}
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = tokenizer("A long document, and a question about it.", return_tensors="pt")
layout = layout_of(model, block_tokens=config.block_tokens, targets=config.pages.targets)
with Store.open(config, layout) as store:  # one for all prompts; closing makes it durable
    cache = TieredCache.open(model, inputs, store=store)
    print(tokenizer.decode(model.generate(**inputs, past_key_values=cache, max_new_tokens=20)[0]))
    print(cache.report)  # tokens reused, and from which tier"""


class TransformersSetup(EngineSetup):
    """See the module."""

    name: ClassVar[str] = "transformers"
    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    tested: ClassVar[str] = "5.23"
    install: ClassVar[str] = "pip install 'tierkv-offload[hf]'"
    loads: ClassVar[str] = "from tierkv.engines.transformers import TieredCache"
    has_device_tier: ClassVar[bool] = True
    block_words: ClassVar[str] = "Larger blocks lose more tokens at the end of a shared prefix."

    def start_lines(self, start: Start) -> list[str]:
        """A program that answers one prompt."""
        return _SNIPPET.format(config=str(start.config), model=start.model).splitlines()

    def own_findings(self, asked: Asked, facts: Mapping[str, str]) -> Iterator[Finding]:
        """Models that `TieredCache` refuses."""
        yield from super().own_findings(asked, facts)
        model = asked.model
        if model is None:
            return
        if model.odd_layers:
            detail = f"{model.odd_layers}: TieredCache keeps K and V of every token"
            cure = "a model with full attention in every layer"
            yield Finding("layers", State.PROBLEM, detail, cure)
        if model.geometry is not None and model.geometry.form is Form.LATENT:
            detail = "latent attention (MLA): TieredCache keeps plain K and V"
            yield Finding("layers", State.PROBLEM, detail, "a model with MHA, GQA or MQA")
