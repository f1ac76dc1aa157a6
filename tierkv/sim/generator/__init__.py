"""Generators: traces of a given kind, made from a seed; one file and one line here for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tierkv.core.errors import ConfigError
from tierkv.core.registry import Registry
from tierkv.sim.generator.base import Generator, made
from tierkv.sim.settings import settings_of
from tierkv.sim.trace import Trace

GENERATORS: Final = Registry(
    "generators",
    {
        "chat": "tierkv.sim.generator.chat:Chat",
        "agents": "tierkv.sim.generator.agents:Agents",
        "rag": "tierkv.sim.generator.rag:Rag",
        "shared": "tierkv.sim.generator.shared:Shared",
        "shift": "tierkv.sim.generator.shift:Shift",
        "mix": "tierkv.sim.generator.mix:Mix",
    },
)


def generate(name: str, settings: Mapping[str, str]) -> Trace:
    """The trace that a generator makes of these settings, as words; the same each time.

    Raises ConfigError for an unknown name or setting, or if no request comes of it.
    """
    kind = GENERATORS.load(name)
    if not issubclass(kind, Generator):
        raise ConfigError(f"generators: {name!r} is no generator")
    return made(kind(), settings_of(kind.settings, settings, f"builtin:{name}"))
