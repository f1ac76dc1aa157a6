"""Shared system prompts: many applications, each with a long prompt of its own, short questions.

Made up, not fitted: the case in which a few prefixes are worth everything, and a policy has to keep
the popular ones against a stream of blocks that are used once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, cast

import msgspec
import numpy as np

from tierkv.sim.chaining import History
from tierkv.sim.generator.base import (
    Amount,
    Generator,
    GeneratorSettings,
    Hours,
    Rate,
    Sink,
    drawn,
    poisson_times,
    zipf_weights,
)


class SharedSettings(GeneratorSettings, frozen=True):
    """prompts: by popularity with a slope of Zipf's law; prompt and question tokens on average."""

    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    hours: Hours = 1.0
    rate: Rate = 4.0
    prompts: Amount = 200
    slope: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.9
    prompt_tokens: Amount = 6000
    question_tokens: Amount = 400


class Shared(Generator):
    """Generates single questions behind shared prompts."""

    name = "shared"
    settings: ClassVar[type[GeneratorSettings]] = SharedSettings
    fitted = "not fitted to any trace"

    def fill(self, sink: Sink, settings: GeneratorSettings, rng: np.random.Generator) -> None:
        """Add all questions; tenants are the prompts, by popularity."""
        chosen = cast("SharedSettings", settings)
        popular = zipf_weights(chosen.prompts, chosen.slope)
        prompts: dict[int, History] = {}
        history, tenant = History(), sink.tenant
        for at in poisson_times(rng, chosen.rate, chosen.hours * 3600):
            number = drawn(rng, popular)
            if number not in prompts:
                length = chosen.prompt_tokens * float(rng.gamma(4.0, 0.25))
                prompts[number] = sink.prompt(max(1, round(length)))
            history.set_ids(prompts[number].ids(), prompts[number].tokens)
            history.grow(sink, 1 + round(float(rng.exponential(chosen.question_tokens))))
            sink.tenant = min(tenant + number, 32767)
            output = 1 + float(rng.exponential(150))
            sink.add(float(at), history, output=output, session=sink.new_session())
        sink.tenant = tenant
