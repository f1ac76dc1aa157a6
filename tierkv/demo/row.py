"""What one run of the demo measured. No torch here: tables and JSON are made of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Row:
    """One prompt answered once. Times in seconds, `*_tokens` as counts, `*_bytes` as bytes."""

    name: str
    note: str = ""
    prompt_tokens: int
    device_tokens: int = 0
    host_tokens: int = 0
    cold_tokens: int = 0
    #: From the call until the first new token was known: lookup and loading included.
    ttft_s: float
    #: The same of the run without tierkv that computes the whole prompt.
    recompute_ttft_s: float
    total_s: float
    load_s: float = 0.0
    loaded_bytes: int = 0
    store_s: float = 0.0
    stored_bytes: int = 0
    #: Pages on NVMe that were found damaged since the row before, or since the store was opened.
    damaged_pages: int = 0
    answer: str = ""
    answer_tokens: list[int]
    tokens_identical: bool

    @property
    def reused_tokens(self) -> int:
        """Tokens whose K and V were loaded."""
        return self.device_tokens + self.host_tokens + self.cold_tokens

    @property
    def recomputed_tokens(self) -> int:
        """Tokens of the prompt that the model computed."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def reuses_most(self) -> bool:
        """Whether more was loaded than computed; below that a faster answer is chance."""
        return self.reused_tokens > self.recomputed_tokens

    @property
    def ratio(self) -> float:
        """Time to the first token as a part of what recomputing takes."""
        return self.ttft_s / self.recompute_ttft_s


@dataclass(slots=True, kw_only=True)
class Check:
    """A promise of the demo, and whether it was kept."""

    name: str
    ok: bool
    text: str
