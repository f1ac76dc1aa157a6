"""Chat: conversations behind one system prompt, after Mooncake's conversation trace.

A thread begins with the prompt and a first input; after each answer it goes on with a chance that
grows from turn to turn. Mostly the history is appended to; now and then its end is cut off and
written anew. A user's return is known to nobody, so that there are no pauses to hint.
"""

from __future__ import annotations

from typing import ClassVar, Final, cast

import numpy as np

from tierkv.sim.generator.base import (
    Generator,
    GeneratorSettings,
    Hours,
    Quantiles,
    Rate,
    Sink,
    poisson_times,
)
from tierkv.sim.settings import Seconds

# Measured on conversation_trace.jsonl (Mooncake, FAST'25): 12,031 requests in 3,537 s, of which
# 4,658 have at least the system prompt's and one more block in common with an earlier one.
_PROMPT_TOKENS: Final = 890
_FIRST_TOKENS: Final = Quantiles(4, 4, 7, 15, 446, 4374, 12170, 24670, 37600, 88980, 122000)
_GOES_ON: Final = (0.306, 0.419, 0.510, 0.587, 0.60, 0.677, 0.72, 0.72, 0.75, 0.75, 0.80)
_GAP_S: Final = Quantiles(3, 12, 30, 42, 66, 123, 264, 483, 615, 1477, 3000)
_NEW_TOKENS: Final = Quantiles(1, 10, 134, 278, 493, 728, 1130, 4816, 7556, 17110, 60000)
_EDITED: Final = 0.15
_EDIT_KEEPS: Final = Quantiles(0.02, 0.03, 0.053, 0.068, 0.11, 0.214, 0.452, 0.833, 0.906, 0.957, 1)
_EDIT_TOKENS: Final = Quantiles(100, 422, 896, 1773, 5790, 9567, 14830, 19890, 26340, 39350, 80000)
_OUTPUT_TOKENS: Final = Quantiles(1, 3, 10, 24, 156, 350, 472, 597, 698, 1119, 2000)
_CONTEXT_TOKENS_MAX: Final = 128_000


class ChatSettings(GeneratorSettings, frozen=True):
    """rate: threads that begin, a second.  tick: arrivals are rounded down to it, 0 for none."""

    hours: Hours = 1.0
    rate: Rate = 2.085
    tick: Seconds = 3.0


class Chat(Generator):
    """Generates conversations."""

    name = "chat"
    settings: ClassVar[type[GeneratorSettings]] = ChatSettings
    fitted = "fitted to Mooncake's conversation trace"

    def fill(self, sink: Sink, settings: GeneratorSettings, rng: np.random.Generator) -> None:
        """Add all threads that begin within the time."""
        chosen = cast("ChatSettings", settings)
        seconds = chosen.hours * 3600
        prompt = sink.prompt(_PROMPT_TOKENS)
        for start in poisson_times(rng, chosen.rate, seconds):
            history = sink.prompt(0)
            history.set_ids(prompt.ids(), prompt.tokens)
            history.grow(sink, round(_FIRST_TOKENS.draw(rng)))
            session, at, turn = sink.new_session(), float(start), 0
            while at < seconds and history.tokens <= _CONTEXT_TOKENS_MAX:
                when = at // chosen.tick * chosen.tick if chosen.tick else at
                sink.add(when, history, output=_OUTPUT_TOKENS.draw(rng), session=session)
                if rng.random() >= _GOES_ON[min(turn, len(_GOES_ON) - 1)]:
                    break
                at += _GAP_S.draw(rng)
                if rng.random() < _EDITED:
                    history.keep(sink, max(1, round(_EDIT_KEEPS.draw(rng) * history.count)))
                    history.grow(sink, round(_EDIT_TOKENS.draw(rng)))
                else:
                    whole = history.tokens // sink.block_tokens
                    history.keep(sink, whole)
                    history.grow(sink, round(_NEW_TOKENS.draw(rng)))
                turn += 1
