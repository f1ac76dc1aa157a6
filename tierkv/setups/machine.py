"""How much of this machine a configuration takes: what was asked for, or a share of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from tierkv.config import ram_bytes
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import GIB, MIB
from tierkv.core.units import format_bytes, parse_percent, parse_size

#: Of what is free now, where nothing is said.
_DEFAULT_SHARE: Final = 0.5
#: A smaller cold tier is not worth its directory: one segment file takes 1 GiB.
_NVME_BYTES_MIN: Final = 2 * GIB


@dataclass(frozen=True, slots=True)
class Room:
    """What this machine has, in bytes; the disk is the one that holds `directory`."""

    ram: int
    ram_available: int
    disk: int
    disk_free: int
    directory: Path


@dataclass(frozen=True, slots=True)
class Share:
    """A size for a tier: its bytes, and why so many."""

    size: int
    why: str

    @property
    def text(self) -> str:
        """As a configuration says it: exactly these bytes."""
        for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
            if self.size and self.size % unit == 0:
                return f"{self.size // unit}{name}"
        return str(self.size)


def room_for(directory: Path) -> Room:
    """This machine. Raises ConfigError where `directory` cannot be had."""
    place = next(p for p in (directory, *directory.parents) if os.path.lexists(p) or p == p.parent)
    if not place.is_dir():
        raise ConfigError(f"--directory: {place} is not a directory; name another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--directory: {place} cannot be written to; give this user write access to it, or "
            "name another"
        )
    ram = ram_bytes()
    available = min(ram, psutil.virtual_memory().available)
    usage = shutil.disk_usage(place)
    return Room(ram, available, usage.total, usage.free, directory)


def dram_share(asked: str | None, room: Room) -> tuple[Share, list[str]]:
    """Host memory, and warnings. Raises ConfigError for more than there is."""
    if asked is None:
        size = _rounded(room.ram_available * _DEFAULT_SHARE)
        return Share(size, f"half of the {format_bytes(room.ram_available)} available now"), []
    size = _parse("--dram", asked, room.ram)
    if not size:
        raise ConfigError("--dram: every block passes through host memory; write at least 64MiB")
    if size > room.ram:
        raise ConfigError(
            f"--dram: {asked.strip()} is more than the {format_bytes(room.ram)} of this machine; "
            f"{_rounded(room.ram_available * _DEFAULT_SHARE) // MIB}MiB would fit"
        )
    if size > room.ram_available:
        warning = (
            f"--dram: {asked.strip()} is more than the {format_bytes(room.ram_available)} that are "
            "available now; free some before the engine starts, or ask for less"
        )
        return Share(size, "as asked for"), [warning]
    return Share(size, "as asked for"), []


def nvme_share(asked: str | None, room: Room) -> tuple[Share, list[str]]:
    """Disk, and warnings; a size of 0 turns the tier off. Raises ConfigError for too much."""
    free = f"{format_bytes(room.disk_free)} free at {room.directory}"
    if asked is None:
        size = _rounded(room.disk_free * _DEFAULT_SHARE)
        if size >= _NVME_BYTES_MIN:
            return Share(size, f"half of the {format_bytes(room.disk_free)} free now"), []
        return Share(0, "too little is free"), [
            f"--nvme: {free}: no cold tier; free some space, or name another --directory"
        ]
    size = _parse("--nvme", asked, room.disk)
    if size > room.disk:
        raise ConfigError(
            f"--nvme: {asked.strip()} is more than the disk's {format_bytes(room.disk)} "
            f"({room.directory}); ask for less, or name a --directory on a larger disk"
        )
    if size > room.disk_free:
        warning = (
            f"--nvme: {asked.strip()} is more than the {free}; the tier grows until the disk is "
            "full, then stores no more: free some space, or ask for less"
        )
        return Share(size, "as asked for"), [warning]
    return Share(size, "as asked for" if size else "off, as asked for"), []


def hbm_share(asked: str | None) -> Share:
    """Device memory; it cannot be known here how much a device has left."""
    if asked is None:
        return Share(0, "off: the model needs the device's memory; --hbm turns it on")
    return Share(_parse("--hbm", asked, 0), "as asked for")


def _parse(option: str, text: str, whole_bytes: int) -> int:
    try:
        share = parse_percent(text)
        if share is not None and not whole_bytes:
            raise ValueError(f"a percentage ({text}) has no meaning here; write a size")
        if share is not None:
            return int(share * whole_bytes) // MIB * MIB
        return 0 if text.strip() == "0" else parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _rounded(size: float) -> int:
    """Down to whole GiB, where there are some, else to whole MiB."""
    unit = GIB if size >= 2 * GIB else MIB
    return int(size) // unit * unit
