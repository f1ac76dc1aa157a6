"""What is known of every engine: its packages, how it is started, what keeps it from working.

A setup is a class in a file of its own. It says facts as class variables and overrides
`start_lines`, and `own_findings` where there is more to look at.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from tierkv.config import Config
from tierkv.core.errors import ConfigError
from tierkv.doctor_hardware import Finding, State
from tierkv.setups import checks
from tierkv.setups.models import ModelFacts


@dataclass(frozen=True, slots=True)
class Start:
    """What an engine is to be started with. `config` is an absolute path."""

    model: str
    config: Path
    engine_host_bytes: int = 0  # of --dram, for a host tier of the engine's own


@dataclass(frozen=True, slots=True)
class Asked:
    """What `tierkv doctor --engine` was asked about."""

    config: Config
    model: ModelFacts | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)  # of the engine's command line

    def in_directory(self, directory: Path) -> Asked:
        """The same with another directory for the cold tier."""
        place = directory.expanduser().absolute()
        cold = self.config.tiers.cold.model_copy(update={"directory": place})
        tiers = self.config.tiers.model_copy(update={"cold": cold})
        return replace(self, config=self.config.model_copy(update={"tiers": tiers}))


class EngineSetup(ABC):
    """One engine. Stateless."""

    name: ClassVar[str]
    #: Distributions, each of which is the engine.
    packages: ClassVar[tuple[str, ...]]
    #: The versions that tests run with: a version is one of them if it starts with this.
    tested: ClassVar[str]
    #: How it is installed.
    install: ClassVar[str]
    #: Python that has to run where the engine is installed; prints a JSON object of text, last.
    loads: ClassVar[str]
    #: What is known to be the matter where that fails: a part of the message, and the cure.
    known_faults: ClassVar[Mapping[str, str]] = {}
    #: The part of --dram that is for tierkv; the rest is for a host tier of the engine's own.
    host_share: ClassVar[float] = 1.0
    #: Whether tierkv's device tier is of use: not where an engine keeps its own cache there.
    has_device_tier: ClassVar[bool] = False
    #: What `block_tokens` of the file means to it.
    block_words: ClassVar[str] = "The engine's own block size is used instead of this."
    #: How much shared memory it wants; 0 where none.
    shm_bytes_min: ClassVar[int] = 0

    @abstractmethod
    def start_lines(self, start: Start) -> list[str]:
        """What to type, ready to be copied; lines that begin with # are for people."""

    def findings(self, asked: Asked) -> Iterator[Finding]:
        """What works and what will not, the engine first and then what the file asks for."""
        installed = checks.package(self.name, self.packages, self.tested, self.install)
        yield installed
        facts: Mapping[str, str] = {}
        if installed.state is not State.PROBLEM:
            finding, facts = checks.adapter(self.loads, self.known_faults)
            yield finding
        yield from self.own_findings(asked, facts)
        if self.shm_bytes_min:
            yield checks.shared_memory(self.shm_bytes_min)
        yield from checks.tiers(asked.config)

    def own_findings(self, asked: Asked, facts: Mapping[str, str]) -> Iterator[Finding]:
        """What only this engine is asked; `facts` are those that `loads` printed."""
        yield from checks.model(asked.config, asked.model, asked.config.block_tokens)


def shell(arguments: Sequence[str]) -> str:
    """A command line that bash splits into `arguments` again."""
    return shlex.join(arguments)


def options_of(text: str) -> dict[str, str]:
    """The options in a command line, by name without dashes; a flag alone is ``""``.

    Raises ConfigError for text that bash would not split.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--arguments: {error}: {text[:80]!r}") from None
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].replace("_", "-").partition("=")
            found[name] = value
        elif name and not found[name]:
            found[name] = word
    return found
