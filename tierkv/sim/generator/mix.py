"""A mix: chat, agents, RAG and shared prompts side by side, each a tenant of its own."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, cast

import msgspec
import numpy as np

from tierkv.sim.generator.agents import Agents, AgentSettings
from tierkv.sim.generator.base import Generator, GeneratorSettings, Hours, Sink
from tierkv.sim.generator.chat import Chat, ChatSettings
from tierkv.sim.generator.rag import Rag, RagSettings
from tierkv.sim.generator.shared import Shared, SharedSettings

#: Tenants: the first of each part; `shared` counts on from its own.
TENANTS: Final = {"chat": 0, "agents": 1, "rag": 2, "shared": 3}


class MixSettings(GeneratorSettings, frozen=True):
    """Each part's share of the load, as a factor; 0 leaves it out."""

    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    hours: Hours = 1.0
    chat: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.25
    agents: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 1.0
    rag: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 1.0
    shared: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.25


class Mix(Generator):
    """Generates the parts one after the other, over the same time."""

    name = "mix"
    settings: ClassVar[type[GeneratorSettings]] = MixSettings
    fitted = "parts of builtin:chat, builtin:agents, builtin:rag and builtin:shared"

    def fill(self, sink: Sink, settings: GeneratorSettings, rng: np.random.Generator) -> None:
        """Add all parts that have a share."""
        chosen = cast("MixSettings", settings)
        fill_parts(
            sink,
            rng,
            hours=chosen.hours,
            chat=chosen.chat,
            agents=chosen.agents,
            rag=chosen.rag,
            shared=chosen.shared,
        )


def fill_parts(
    sink: Sink,
    rng: np.random.Generator,
    *,
    hours: float,
    chat: float = 0.0,
    agents: float = 0.0,
    rag: float = 0.0,
    shared: float = 0.0,
) -> None:
    """Add load of each kind, from the sink's start on; factors are of about 40 sessions an hour
    of agents, 2 threads a second of chat, 0.5 questions a second of RAG and 4 of shared prompts.
    """
    parts: list[tuple[str, Generator, GeneratorSettings, float]] = [
        ("chat", Chat(), ChatSettings(hours=hours, rate=2.085 * chat or 1.0, tick=0.0), chat),
        (
            "agents",
            Agents(),
            AgentSettings(hours=hours, sessions=max(1, round(40 * hours * agents))),
            agents,
        ),
        ("rag", Rag(), RagSettings(hours=hours, rate=0.28 * rag or 1.0), rag),
        ("shared", Shared(), SharedSettings(hours=hours, rate=4.0 * shared or 1.0), shared),
    ]
    for name, generator, settings, share in parts:
        if share > 0:
            sink.tenant = TENANTS[name]
            generator.fill(sink, settings, rng)
    sink.tenant = 0
