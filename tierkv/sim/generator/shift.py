"""Shifts of load: phases in which chat, agents and shared prompts take turns, and a surge.

Made up, not fitted: what a policy has learned in one phase is wrong in the next.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, cast

import msgspec
import numpy as np

from tierkv.sim.generator.base import Generator, GeneratorSettings, Hours, Sink
from tierkv.sim.generator.mix import fill_parts

#: Factors of chat, agents and shared prompts, phase by phase; over again after the last.
PHASES: Final = (
    {"chat": 0.5, "agents": 0.1, "shared": 0.1},
    {"chat": 0.05, "agents": 1.0, "shared": 0.1},
    {"chat": 0.05, "agents": 0.2, "shared": 1.0},
    {"chat": 1.5, "agents": 0.5, "shared": 0.5},
)


class ShiftSettings(GeneratorSettings, frozen=True):
    """hours: of all phases together.  phases: how many there are."""

    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    hours: Hours = 2.0
    phases: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 4


class Shift(Generator):
    """Generates one phase after the other."""

    name = "shift"
    settings: ClassVar[type[GeneratorSettings]] = ShiftSettings
    fitted = "phases of builtin:chat, builtin:agents and builtin:shared"

    def fill(self, sink: Sink, settings: GeneratorSettings, rng: np.random.Generator) -> None:
        """Add all phases; what began in one may go on into the next."""
        chosen = cast("ShiftSettings", settings)
        hours = chosen.hours / chosen.phases
        for number in range(chosen.phases):
            sink.start = number * hours * 3600
            fill_parts(sink, rng, hours=hours, **PHASES[number % len(PHASES)])
        sink.start = 0.0
