"""Options: the configuration that an engine's users write within the engine's own.

An engine has one place for what a plug-in wants, a flat mapping. It names a YAML file, or gives a
few capacities. What is unknown is an error that says what is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from tierkv.config import Config, load_config
from tierkv.core.errors import ConfigError

#: What every engine's options may hold.
OPTIONS: Final = ("config", "host", "cold", "directory")


def config_of(
    options: Mapping[str, Any], *, place: str, block_tokens: int, more: Iterable[str] = ()
) -> Config:
    """The configuration in `options`: a file's, or a few capacities.

    `place` is what the engine calls its options, for messages; `more` are names that the engine's
    adapter reads itself. `block_tokens` is the engine's. Raises ConfigError.
    """
    known = (*OPTIONS, *more)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"{place}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if "config" in options:
        config = load_config(options["config"])
    else:
        tiers: dict[str, Any] = {
            "device": {"capacity": 0, "device": "cpu"},
            "host": {"capacity": options.get("host", "4GiB")},
        }
        if "directory" in options:
            cold = {"capacity": options.get("cold", "64GiB"), "directory": options["directory"]}
            tiers["cold"] = cold
        try:
            config = Config.model_validate({"tiers": tiers})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{place}: {name}: {first['msg']}") from None
    return config.model_copy(update={"block_tokens": block_tokens})


def part_of(config: Config, share: float, *, least_bytes: int, has_log: bool) -> Config:
    """A configuration with a share of the capacities, but not less than `least_bytes` of each.

    A tier that is off stays off. The event log is of one store: see that one part has it.
    """
    tiers = config.tiers
    host, cold = (
        tier.model_copy(
            update={"capacity": tier.capacity and max(least_bytes, int(tier.capacity * share))}
        )
        for tier in (tiers.host, tiers.cold)
    )
    parts = tiers.model_copy(update={"host": host, "cold": cold})
    event_log = config.event_log if has_log else None
    return config.model_copy(update={"tiers": parts, "event_log": event_log})
