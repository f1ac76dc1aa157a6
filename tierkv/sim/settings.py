"""Settings of readers and generators: words of the command line, made into a frozen struct.

A setting in seconds may carry a unit (`90s`, `15m`, `12h`, `2d`); other units are an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

import msgspec

from tierkv.core.errors import ConfigError

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")

#: Seconds as a setting; a year at most.
Seconds = Annotated[float, msgspec.Meta(ge=0, le=366 * 86400.0)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what a reader or generator may be asked for; every field has a default."""

    def words(self) -> dict[str, str]:
        """All settings, defaults included, as they could have been given."""
        return {name: str(getattr(self, name)) for name in self.__struct_fields__}


SettingsT = TypeVar("SettingsT", bound=Settings)


def settings_of(kind: type[SettingsT], given: Mapping[str, str], what: str) -> SettingsT:
    """The settings that were given, the others at their defaults. Raises ConfigError."""
    known = kind.__struct_fields__
    for name in given:
        if name not in known:
            says = f"known: {', '.join(known)}" if known else "there are none"
            raise ConfigError(f"{what}: unknown setting {name[:60]!r}; {says}")
    try:
        return msgspec.convert({k: _plain(v) for k, v in given.items()}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{what}: {error}") from None


def _plain(word: str) -> str:
    match = _TIME.fullmatch(word)
    return repr(float(match[1]) * _UNITS[match[2]]) if match else word
