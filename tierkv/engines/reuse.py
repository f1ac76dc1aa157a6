"""What a cache took from the store and gave to it, for people and for tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tierkv.store import Match

_TIER_NAMES: Final = {"device": "device", "host": "host", "cold": "nvme"}


@dataclass(slots=True)
class Reuse:
    """What one cache took from the store and gave to it; `str()` is one line for people."""

    prompt_tokens: int
    reused_tokens: int = 0
    #: Tokens that were stored, but too few of the prompt to make its first token sooner.
    declined_tokens: int = 0
    reused_bytes: int = 0
    load_s: float = 0.0
    stored_tokens: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    #: Reused tokens by tier: "device", "host", "cold".
    tokens_by_tier: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        line = f"reused {self.reused_tokens:,} of {self.prompt_tokens:,} tokens"
        if self.reused_tokens:
            tiers = (f"{_TIER_NAMES.get(t, t)} {n:,}" for t, n in self.tokens_by_tier.items() if n)
            line += f" ({', '.join(tiers)}): {_megabytes(self.reused_bytes)} in {self.load_s:.2f} s"
        if self.declined_tokens:
            line += f" ({self.declined_tokens:,} stored ones are computed sooner than used)"
        if self.stored_tokens:
            line += f"; stored {self.stored_tokens:,}: {_megabytes(self.stored_bytes)}"
            line += f" in {self.store_s:.2f} s"
        return line


def delivered_by_tier(match: Match, tokens: int) -> dict[str, int]:
    """Tokens by tier of the part of a match that arrived; the slowest tier is what fails."""
    by_tier = dict(match.tokens_by_tier)
    missing = match.tokens - tokens
    for tier in ("cold", "host", "device"):
        lost = min(missing, by_tier.get(tier, 0))
        by_tier[tier] = by_tier.get(tier, 0) - lost
        missing -= lost
    return by_tier


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
