"""Registries: name -> "module:Class", loaded when first asked for.

Each family (policies, codecs, tiers, file engines, engines) has one registry with one line per
kind. Another package adds kinds through entry points of the group `tierkv.<family>`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points

from tierkv.core.errors import ConfigError


class Registry:
    """One family of kinds. Any thread."""

    __slots__ = ("_family", "_targets")

    def __init__(self, family: str, targets: Mapping[str, str]) -> None:
        self._family = family
        self._targets = dict(targets)

    def names(self) -> list[str]:
        """Every known name, ours first, then those of other packages."""
        return list(self)

    def __iter__(self) -> Iterator[str]:
        yield from self._targets
        for point in entry_points(group=f"tierkv.{self._family}"):
            if point.name not in self._targets:
                yield point.name

    def load(self, name: str) -> type:
        """The class of that name, importing its module. Raises ConfigError for an unknown name."""
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            found = getattr(import_module(module), attribute)
        else:
            points = entry_points(group=f"tierkv.{self._family}", name=name)
            if not points:
                raise ConfigError(f"{self._family}: {_unknown(name, self.names())}")
            found = next(iter(points)).load()
        if not isinstance(found, type):
            raise ConfigError(f"{self._family}: {name!r} is not a class but {found!r}")
        return found


def known_name(value: str, names: Iterable[str]) -> str:
    """`value` if it is one of `names`; else a ValueError with the nearest of them."""
    known: list[str] = []
    for name in names:  # ours come first; those of other packages are slow to find
        if name == value:
            return value
        known.append(name)
    raise ValueError(_unknown(value, known))


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    cure = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"unknown name {name[:60]!r}; {cure}"
