"""What a format of traces is: it knows its files, and reads them into a `Trace`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final

from tierkv.sim.settings import Settings
from tierkv.sim.source import Problems, digest_of
from tierkv.sim.trace import Trace, TraceFacts

#: How much of a file is looked at to tell its format.
HEAD_BYTES: Final = 1 << 16


class TraceSource:
    """One trace's files while they are read: where they are, and what in them was bad."""

    def __init__(self, path: Path, *, strict: bool = False, digest: str | None = None) -> None:
        self.path = path
        self._digest = digest
        self.problems = Problems(strict=strict)
        self.files: list[str] = [path.name]

    def facts(
        self,
        form: str,
        settings: Mapping[str, str],
        *,
        synthesised: tuple[str, ...] = (),
    ) -> TraceFacts:
        """The facts of a trace that was read from here."""
        return TraceFacts(
            format=form,
            source=tuple(self.files),
            digest=digest_of(self.path) if self._digest is None else self._digest,
            bad_lines=self.problems.count,
            problems=tuple(self.problems.first),
            synthesised=synthesised,
            settings=dict(settings),
        )


class NoSettings(Settings, frozen=True):
    """A format with nothing to choose."""


class TraceFormat(ABC):
    """One format. Holds no state: what is read goes into a `Trace`."""

    name: ClassVar[str]
    #: Counts up when the same file is read into another trace than before: old caches are left.
    version: ClassVar[int] = 1
    settings: ClassVar[type[Settings]] = NoSettings

    @staticmethod
    @abstractmethod
    def matches(path: Path, head: bytes) -> bool:
        """Whether a path looks like this format; `head` is its first bytes, decompressed."""

    @staticmethod
    def whole(path: Path) -> Path:
        """What belongs to the trace of which `path` was named: itself, or the folder it is in."""
        return path

    @abstractmethod
    def read(self, source: TraceSource, settings: Settings) -> Trace:
        """The trace. Raises ConfigError where nothing can be read of it."""
