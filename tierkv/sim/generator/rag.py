"""RAG: questions with passages that were looked up, after RAGPulse's week at a university.

A prompt is a system part of three pieces, of which one changes with each request and one twice a
day, then passages by popularity, the history of the session, and the question; every fourth has
another system part and no passages. Only what precedes the first difference is shared, which is
why most of it is never seen again, however popular its passages are.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, cast

import msgspec
import numpy as np

from tierkv.sim.chaining import History, chained_ids
from tierkv.sim.generator.base import (
    Amount,
    Generator,
    GeneratorSettings,
    Hours,
    Quantiles,
    Rate,
    Sink,
    drawn,
    poisson_times,
    zipf_weights,
)

# Measured on RAGPulse, 7,106 requests in seven days of 3,990 sessions.
_SYSTEM: Final = (512, 512, 437)  # tokens of its pieces: fixed, of the half-day, new each time
_SYSTEM_S: Final = 43_200  # 15 middle pieces in the week, one after the other
_BARE_SYSTEM: Final = (512, 512, 4)  # the other prompt's: fixed, new each time, fixed
_BARE: Final = 0.233  # 1,658 of 7,106
_PASSAGES: Final = 6
_PASSAGE_TOKENS: Final = Quantiles(5, 15, 67, 126, 181, 255, 312, 337, 355, 387, 512)
_PASSAGE_SLOPE: Final = 1.0
_QUESTION_TOKENS: Final = Quantiles(1, 1, 2, 3, 4, 6, 8, 12, 16, 28, 200)
_OUTPUT_TOKENS: Final = Quantiles(10, 36, 66, 83, 131, 234, 385, 563, 670, 891, 2000)
_ASKS_AGAIN: Final = 0.44  # 3,990 sessions of 7,106 requests
_GAP_S: Final = Quantiles(2, 5, 11, 15, 22, 40, 89, 295, 998, 30000, 86400)


class RagSettings(GeneratorSettings, frozen=True):
    """rate: sessions that begin, a second, on average over the day."""

    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 16
    hours: Hours = 168.0
    rate: Rate = 0.0066
    passages: Amount = 3235


class Rag(Generator):
    """Generates questions over documents."""

    name = "rag"
    settings: ClassVar[type[GeneratorSettings]] = RagSettings
    fitted = "fitted to RAGPulse"

    def fill(self, sink: Sink, settings: GeneratorSettings, rng: np.random.Generator) -> None:
        """Add all questions of sessions that begin within the time."""
        chosen = cast("RagSettings", settings)
        seconds = chosen.hours * 3600
        lengths = [max(1, round(_PASSAGE_TOKENS.draw(rng))) for _ in range(chosen.passages)]
        popular = zipf_weights(chosen.passages, _PASSAGE_SLOPE)
        history = History()
        for start in poisson_times(rng, 2 * chosen.rate, seconds):
            if rng.random() * 2 > _of_day(float(start)):
                continue
            session, at, told = sink.new_session(), float(start), 0
            while at < seconds:
                new = int(rng.integers(1 << 62))
                if rng.random() < _BARE:
                    names: tuple[int, ...] = (1, new, 2)
                    parts = list(zip(names, _BARE_SYSTEM, strict=True))
                else:
                    names = (0, 1000 + int((sink.start + at) // _SYSTEM_S), new)
                    parts = list(zip(names, _SYSTEM, strict=True))
                    drawn_ones = dict.fromkeys(drawn(rng, popular) for _ in range(2 * _PASSAGES))
                    found = list(drawn_ones)[:_PASSAGES]
                    parts += [(-1 - number, lengths[number]) for number in found]
                asked = max(1, round(_QUESTION_TOKENS.draw(rng)))
                parts.append((int(rng.integers(1 << 62)), 11 + told + asked))
                output = _OUTPUT_TOKENS.draw(rng)
                tokens = sum(length for _, length in parts)
                history.set_ids(chained_ids(parts, sink.block_tokens), tokens)
                sink.add(at, history, output=output, session=session)
                if rng.random() >= _ASKS_AGAIN:
                    break
                told = min(2100, told + asked + round(output))
                at += _GAP_S.draw(rng)


def _of_day(at: float) -> float:
    """How dense the load is at this time: 1 on average over a day, 2 at most."""
    return 1.0 + 0.9 * float(np.cos(2 * np.pi * (at / 86400 - 0.12)))
