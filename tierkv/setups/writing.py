"""What `tierkv init` writes: a configuration with comments, and the lines that start an engine."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from tierkv.config import Config
from tierkv.config_report import plan_rows
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import GIB, MIB
from tierkv.setups.base import EngineSetup, Start
from tierkv.setups.machine import Share, dram_share, hbm_share, nvme_share, room_for
from tierkv.setups.models import ModelFacts

#: The least that is left to tierkv where an engine has a host tier of its own.
_HOST_BYTES_MIN = 256 * MIB


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is asked of `tierkv init`, as it was written; None where nothing was said."""

    dram: str | None = None
    nvme: str | None = None
    hbm: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A configuration's text, what to start an engine with, and what a person should know."""

    text: str
    lines: list[str]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Tiers:
    hbm: Share
    host: Share
    cold: Share
    engine_host_bytes: int


def prepare(
    setup: EngineSetup, model: ModelFacts, sizes: Sizes, *, directory: Path, out: Path
) -> Written:
    """All that `tierkv init` writes and prints; nothing is written yet.

    Raises ConfigError for what this machine has not, with the cure.
    """
    out, directory = out.absolute(), Path(os.path.normpath(directory.expanduser().absolute()))
    if sizes.hbm is not None and not setup.has_device_tier:
        raise ConfigError(
            f"--hbm: {setup.name} keeps a cache of its own in device memory, which tierkv lies "
            "beneath; leave --hbm out"
        )
    room = room_for(directory)
    dram, warnings = dram_share(sizes.dram, room)
    cold, more = nvme_share(sizes.nvme, room)
    tiers = _divided(setup, dram, cold, hbm_share(sizes.hbm))
    held = _tokens(tiers, model, directory)
    warnings = [*warnings, *more]
    if model.is_geometry_only:
        warnings.append(
            f"--model: {model.shown} is a shape that tierkv knows, not a checkpoint; put the "
            "model's id or directory in its place where you start the engine"
        )
    start = Start(model.for_engine, out, tiers.engine_host_bytes)
    place = _relative(directory, out.parent)
    text = _text(setup, model, tiers, held, place)
    return Written(text, setup.start_lines(start), warnings)


def write(path: Path, text: str, *, force: bool) -> None:
    """Write a new file; an old one only by `force`. Raises ConfigError."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"--out: {path} exists and is not overwritten; --force does, --out names another"
        ) from None
    except OSError as error:
        raise ConfigError(f"--out: {path}: {error.strerror}") from None


def _divided(setup: EngineSetup, dram: Share, cold: Share, hbm: Share) -> _Tiers:
    if setup.host_share == 1.0:
        return _Tiers(hbm, dram, cold, 0)
    ours = max(_HOST_BYTES_MIN, int(dram.size * setup.host_share) // MIB * MIB)
    if ours >= dram.size:
        raise ConfigError(
            f"--dram: {dram.text} is too little for {setup.name}'s own host tier and tierkv's; "
            f"ask for at least {4 * _HOST_BYTES_MIN // MIB}MiB"
        )
    why = f"{setup.name}'s own host tier has the other {(dram.size - ours) / GIB:.2f} GiB of --dram"
    return _Tiers(hbm, Share(ours, why), cold, dram.size - ours)


def _tokens(tiers: _Tiers, model: ModelFacts, directory: Path) -> dict[str, int]:
    """Bytes of a token and tokens of each tier, where the model's shape is known."""
    wanted = {
        "tiers": {
            "device": {"capacity": tiers.hbm.size},
            "host": {"capacity": tiers.host.size},
            "cold": {"capacity": tiers.cold.size, "directory": str(directory)},
        }
    }
    try:
        config = Config.model_validate(wanted)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if model.geometry is None:
        return {}
    return {row.name: row.value for row in plan_rows(config, model.geometry)}


def _relative(directory: Path, base: Path) -> str:
    """`directory` as a file in `base` says it: relative where it lies beneath."""
    inside = directory.is_relative_to(base) and directory != base
    return str(directory.relative_to(base) if inside else directory)


def _text(
    setup: EngineSetup, model: ModelFacts, tiers: _Tiers, held: dict[str, int], directory: str
) -> str:
    known = f"One token takes {held['token']:,} bytes, by {model.source}." if held else (
        "Its shape is not known here, so no tokens are said: name a local checkpoint for them."
    )  # fmt: skip

    def room(share: Share, tier: str) -> str:
        tokens = held.get(f"{tier} tier", 0)
        holds = f" = {_rounded_tokens(tokens)} tokens" if tokens else ""
        return f"{share.text}{holds}; {share.why}"

    device = _DEVICE.format(size=tiers.hbm.text, room=room(tiers.hbm, "device"))
    return _TEMPLATE.format(
        engine=setup.name,
        model=model.shown,
        known=known,
        block_words=setup.block_words,
        device=device if setup.has_device_tier else _NO_DEVICE,
        host=tiers.host.text,
        host_room=room(tiers.host, "host"),
        cold=tiers.cold.text,
        cold_room=room(tiers.cold, "cold"),
        directory=_scalar(directory),
    )


def _rounded_tokens(tokens: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if tokens >= unit:
            return f"{tokens / unit:.3g} {name}"
    return f"{tokens:,}"


def _scalar(text: str) -> str:
    """YAML text: plain where that is safe, else in double quotes (JSON is YAML)."""
    return (
        text
        if re.fullmatch(r"[\w/.][\w/.\-]*", text, re.ASCII)
        else json.dumps(text, ensure_ascii=False)
    )


_NO_DEVICE = """\
  # Device memory. Off: the engine keeps its own cache there, and tierkv lies beneath it.
  device:
    capacity: 0
"""

_DEVICE = """\
  # Device memory, bytes. {room}.
  # Raise it where the device has memory to spare beside the model.
  device:
    capacity: {size}
"""

_TEMPLATE = """\
# tierkv for {engine}, model {model}. Written by `tierkv init`; yours to change.
# {known}
# Sizes are bytes with a unit: KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000).
# Keys that are not here have defaults: `tierkv config show --effective FILE` lists all of them,
# configs/reference.yaml explains each. After a change, and before a start:
#   tierkv doctor --engine {engine} --config FILE

# Tokens in a block, the unit of reuse, 1 .. 4096.
# {block_words}
block_tokens: 16

tiers:
{device}
  # Host memory: one arena, taken when the engine starts. What hits come from first.
  host:
    # Bytes, or a percentage of RAM.
    # {host_room}.
    # Lower it where the machine swaps or the engine is killed for memory.
    capacity: {host}
    # Which pages leave first: lru, the least recently used; configs/reference.yaml tells others.
    policy: lru
    # auto or off. auto pins the arena where there is a CUDA device; off where memlock cannot be
    # raised (`tierkv doctor` says so): copies are slower then.
    register_cuda: auto

  # NVMe: what outlives the engine. Verified on every read.
  cold:
    # Made with mode 0700; a relative path starts at this file. Take a local disk. One engine at a
    # time uses it for a model.
    directory: {directory}
    # Bytes, or a percentage of the file system; 0 is off.
    # {cold_room}.
    # Space is taken as it fills. A lower capacity removes whole segment files at the next start.
    capacity: {cold}
    policy: lru
    # flush: durable when flushed and when the engine stops; always: after each write, slower.
    sync: flush
    # none, hmac (others can write to the disk) or aes-256-gcm (others can read it). The last two
    # need key_file, made by `tierkv keygen`. Decide before the directory is filled.
    protection: none

transfer:
  # Bytes under way to and from the disk. Raise it for several drives.
  inflight_max: 256MiB
  # Milliseconds after which a read is given up and the engine recomputes. Lower it where the first
  # token must not wait for a slow disk.
  demand_deadline_ms: 10000

# Tenants. A salt (secret text) keeps others from learning by timing what prompts were sent;
# changing it makes what was stored unreachable.
namespaces:
  default:
    salt: ""
"""
