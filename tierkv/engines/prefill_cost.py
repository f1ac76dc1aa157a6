"""What a prefill costs a transformers model, to tell whether loading a prefix spares anything.

Arithmetic only, in floating point operations. With nothing loaded, PyTorch's scaled dot product
attention is causal and skips the half of the scores that lies in the future. Behind a loaded
prefix transformers gives it a mask instead, and then every score is computed. A short prefix of a
long prompt therefore costs more than it spares: 16 tokens of 1,249 made the first token 18 %
later on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tierkv.core.geometry import KVGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """`token_ops`: a token through the weights. `pair_ops`: a query with one key, all layers."""

    token_ops: int
    pair_ops: int
    #: Whether a prompt without a prefix computes only the scores that it needs.
    skips_future: bool

    @classmethod
    def of(cls, model: PreTrainedModel, geometry: KVGeometry, *, is_masked: bool = False) -> Self:
        """From the weights and the attention implementation. Experts count as if all were used.

        `is_masked`: the prompt is padded, so it gets a mask in any case.
        """
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        ends = {id(end.weight) for end in embeddings if end is not None}
        weights = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in ends)
        config = model.config.get_text_config(decoder=True)
        # A latent is expanded to K of this size before attention.
        head_dim = getattr(config, "qk_head_dim", None) or geometry.head_dim
        pair_ops = 4 * geometry.layers * config.num_attention_heads * head_dim
        skips_future = model.config._attn_implementation == "sdpa" and not is_masked
        return cls(2 * weights, pair_ops, skips_future)

    def spares(self, prompt_tokens: int, loaded_tokens: int) -> bool:
        """Whether computing what lies behind a loaded prefix is less work than the whole prompt."""
        left = prompt_tokens - loaded_tokens
        share = 0.5 if self.skips_future else 1.0
        whole = prompt_tokens * (self.token_ops + share * self.pair_ops * prompt_tokens)
        rest = left * (self.token_ops + self.pair_ops * prompt_tokens)
        return left == 1 or rest < whole
