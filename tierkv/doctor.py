"""What this machine can do for tierkv, and the cure for what it cannot.

Looks only: nothing is started, no setting is changed, torch is not imported. All that is written
are probe files (16 KiB for each file engine, 64 MiB for the disk's rates) in the directory that is
asked about; each is removed again. Status files that dead stores left behind are removed too. What
is beneath Python is `tierkv.doctor_hardware`'s part.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final
from uuid import uuid4

import psutil

from tierkv.config import TransferConfig, ram_bytes
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import GIB, MIB
from tierkv.core.units import format_bytes
from tierkv.doctor_hardware import DeviceDriver, Finding, State, hardware
from tierkv.tiers.files import FILE_ENGINES, is_for_auto
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.files.direct import DirectFiles
from tierkv.transfer.breaker import State as BreakerState
from tierkv.transfer.status import Status, living_stores

__all__ = ["REMOTE_OR_MEMORY", "Finding", "State", "examine"]

#: File systems whose bytes lie elsewhere, or in memory: a cold tier gains nothing there.
REMOTE_OR_MEMORY: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.sshfs", "nfs", "nfs4", "ramfs", "smb3", "tmpfs"}
)

#: A disk that reads slower than this is worth a word: bytes per second.
_READ_RATE_MIN: Final = 0.3e9

_DISK_BYTES: Final = 64 * MIB
_PIECE_BYTES: Final = 4 * MIB
#: A slow disk is measured by what it does in this time, each way.
_DISK_SECONDS: Final = 0.4


def examine(
    directory: Path,
    *,
    load: Callable[[], DeviceDriver | None] | None = None,
    profiles: Path | None = None,
) -> list[Finding]:
    """All findings, the machine first and then `directory`, where a cold tier would live.

    `load` gives another driver than this machine's, `profiles` another folder of link rates.
    """
    found = [_python(), _torch(), _cores(), _ram()]
    found += hardware(profiles or _kept_profiles(), load=load)
    found += stores()
    try:
        found += _directory_findings(directory.expanduser().absolute())
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory, a loop of links
        cure = "name another directory (tiers.cold.directory)"
        found.append(Finding("directory", State.PROBLEM, f"{directory}: {error}", cure))
    return found


def _kept_profiles() -> Path | None:
    """Where a store keeps link rates unless told otherwise; None where there is no home."""
    try:
        return TransferConfig().link_profiles
    except ValueError:
        return None


def _python() -> Finding:
    return Finding("Python", State.OK, f"{platform.python_version()} on {platform.platform()}")


def _torch() -> Finding:
    try:
        found = version("torch")
    except PackageNotFoundError:
        cure = "pip install 'tierkv-offload[hf]' for the transformers engine; the core needs none"
        return Finding("torch", State.NOTE, "not installed", cure)
    return Finding("torch", State.OK, found)


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    return Finding("CPU", State.OK, f"{usable} of {os.cpu_count()} cores usable")


def _ram() -> Finding:
    free = psutil.virtual_memory().available
    detail = f"{format_bytes(ram_bytes())}, {format_bytes(free)} available"
    if free < GIB:
        return Finding("RAM", State.NOTE, detail, "lower tiers.host.capacity")
    return Finding("RAM", State.OK, detail)


def stores() -> list[Finding]:
    """Every store of this user that is open on this machine, and how its cold tier's disk does."""
    found = living_stores()
    if not found:
        return [Finding("stores", State.OK, "none of this user is open here")]
    return [_store(status) for status in found]


def _store(status: Status) -> Finding:
    """The breaker leaves a disk alone that fails or hangs; what lies there are misses then."""
    state = BreakerState(status.state)
    since, written = (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
        for seconds in (status.since, status.written)
    )
    name = f"store, pid {status.pid}"
    detail = f"{status.directory}, breaker {state.name.lower().replace('_', '-')}"
    if state is BreakerState.CLOSED:
        detail = f"{detail} since {since}, {status.skipped} transfers skipped before"
        return Finding(name, State.OK, detail)
    detail = f"{detail}, not closed since {since}, {status.skipped} transfers skipped by {written}"
    cure = "see the kernel's log (dmesg) and the disk's health; it is tried again by itself"
    return Finding(name, State.NOTE, detail, cure)


def _directory_findings(directory: Path) -> Iterator[Finding]:
    place = _nearest(directory)
    yield _space(place, directory)
    system = _file_system(place)
    if system in REMOTE_OR_MEMORY:
        cure = "choose a directory on a local NVMe file system (tiers.cold.directory)"
        yield Finding("file system", State.NOTE, f"{system} at {place}", cure)
    else:
        yield Finding("file system", State.OK, f"{system} at {place}")
    if not place.is_dir():
        yield Finding("directory", State.PROBLEM, f"{place} is not a directory", "name another")
    elif not os.access(place, os.W_OK | os.X_OK):
        cure = f"give this user write access to {place}, or name another directory"
        yield Finding("directory", State.PROBLEM, f"{place} cannot be written to", cure)
    elif place != directory:
        cure = f"mkdir -m 700 -p {directory}, then ask again: the file engines are probed in it"
        yield Finding("directory", State.NOTE, f"{directory} does not exist yet", cure)
    else:
        mode = _mode(directory)
        yield mode
        if mode.state is not State.PROBLEM:
            yield _direct(directory)
            engine, kind = _engine(directory)
            yield engine
            if kind is not None:
                yield disk(directory, kind)


def _space(place: Path, directory: Path) -> Finding:
    usage = shutil.disk_usage(place)
    detail = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} for {directory}"
    if usage.free < 2 * GIB:
        cure = "a segment file takes 1 GiB: free some space, or lower segment_cold_pages"
        return Finding("free space", State.NOTE, detail, cure)
    return Finding("free space", State.OK, detail)


def _mode(directory: Path) -> Finding:
    status = directory.stat()
    mode = status.st_mode & 0o777
    detail = f"{directory}, mode {mode:04o}"
    if status.st_uid != os.geteuid():
        cure = "run as its owner, or name another directory"
        return Finding("directory", State.PROBLEM, f"{detail}, owned by another user", cure)
    if mode & 0o022:
        cure = f"name a directory of tierkv's own beneath it, for example {directory / 'tierkv'}"
        return Finding("directory", State.PROBLEM, f"{detail}: others may write to it", cure)
    if mode & 0o077:
        cure = f"chmod 700 {directory} if it is tierkv's own: others could read cached prompts"
        return Finding("directory", State.NOTE, detail, cure)
    return Finding("directory", State.OK, detail)


def _direct(directory: Path) -> Finding:
    """Whether bytes can pass the page cache by; the file engine of choice needs it."""
    reason = DirectFiles.probe(directory)
    if reason is None:
        return Finding("O_DIRECT", State.OK, "reads and writes pass the page cache by")
    cure = "a local ext4 or xfs on NVMe takes O_DIRECT (tiers.cold.directory)"
    return Finding("O_DIRECT", State.NOTE, reason, cure)


def _engine(directory: Path) -> tuple[Finding, type[FileEngine] | None]:
    """The engine that `auto` takes, and why those before it were refused."""
    refusals: list[str] = []
    for name in FILE_ENGINES:
        try:
            kind: type[FileEngine] = FILE_ENGINES.load(name)
            if not is_for_auto(kind):
                continue
            reason = kind.probe(directory)
        except (ConfigError, ImportError, OSError, RuntimeError) as error:
            reason = str(error)
        else:
            if reason is None:
                return _chosen(name, refusals, is_cached=_is_cached(kind)), kind
        refusals.append(f"{name}: {reason}")
    cure = "name another directory (tiers.cold.directory)"
    detail = f"none works: {'; '.join(refusals)}"
    return Finding("file engine", State.PROBLEM, detail, cure), None


def _chosen(name: str, refusals: list[str], *, is_cached: bool) -> Finding:
    """An engine that passes the page cache by is good, whatever was refused before it."""
    detail = f"{name} ({'; '.join(refusals)})" if refusals else name
    if refusals and is_cached:
        cure = "a local ext4 or xfs on NVMe takes O_DIRECT; until then reads use more CPU"
        return Finding("file engine", State.NOTE, detail, cure)
    return Finding("file engine", State.OK, detail)


def _is_cached(kind: type[FileEngine]) -> bool:
    """Whether its reads and writes go through the page cache: then nothing need be aligned."""
    return kind.align_bytes == 1


def disk(directory: Path, kind: type[FileEngine], *, size_bytes: int = _DISK_BYTES) -> Finding:
    """The rates of the disk beneath `directory`, measured now through a file engine."""
    if shutil.disk_usage(directory).free < GIB:
        return Finding("disk", State.OK, "not measured: less than 1 GiB is free")
    try:
        wrote, read = disk_rates(directory, kind, size_bytes=size_bytes)
    except (OSError, RuntimeError) as error:
        cure = "see the kernel's log (dmesg) and quotas, or name another directory"
        return Finding("disk", State.NOTE, f"not measured: {error}", cure)
    return disk_finding(wrote, read, is_cached=_is_cached(kind))


def disk_finding(wrote: float, read: float, *, is_cached: bool) -> Finding:
    """What rates in bytes per second mean; `is_cached` if reads came from the page cache."""
    place = " from the page cache" if is_cached else ""
    detail = f"writes {wrote / 1e9:.3g} GB/s, reads {read / 1e9:.3g} GB/s{place}, one thread, now"
    if read < _READ_RATE_MIN:
        cure = "recomputing may be faster than this disk: name a directory on a local NVMe"
        return Finding("disk", State.NOTE, detail, cure)
    return Finding("disk", State.OK, detail)


def disk_rates(
    directory: Path, kind: type[FileEngine], *, size_bytes: int = _DISK_BYTES
) -> tuple[float, float]:
    """Bytes per second written (with the sync) and read, in turn, by way of a probe file.

    The file is removed whatever happens. Raises OSError.
    """
    name = f"doctor-{uuid4().hex}.tmp"
    engine = kind(directory)
    try:
        handle = engine.open(name, create=True)
        engine.preallocate(handle, size_bytes)
        piece = aligned_array(_PIECE_BYTES, max(4096, kind.align_bytes))
        piece[:] = memoryview(os.urandom(_PIECE_BYTES))  # nothing that a disk could compress
        begun = time.perf_counter()
        done = _each_piece(lambda at: engine.write(handle, at, [piece.data]), size_bytes)
        engine.sync(handle)
        wrote = done / max(1e-9, time.perf_counter() - begun)
        begun = time.perf_counter()
        done = _each_piece(lambda at: engine.read(handle, at, [piece.data]), done)
        return wrote, done / max(1e-9, time.perf_counter() - begun)
    finally:
        with suppress(OSError):
            engine.unlink(name)
        engine.shutdown()


def _each_piece(move: Callable[[int], None], size_bytes: int) -> int:
    """Move pieces up to `size_bytes`, at least one, while there is time; the bytes moved."""
    deadline = time.perf_counter() + _DISK_SECONDS
    done = 0
    while not done or (done < size_bytes and time.perf_counter() < deadline):
        move(done)
        done += _PIECE_BYTES
    return done


def _nearest(directory: Path) -> Path:
    """`directory` or its nearest ancestor that exists."""
    return next(p for p in (directory, *directory.parents) if os.path.lexists(p) or p == p.parent)


def _file_system(place: Path) -> str:
    """The type of the file system that holds `place`, by the longest mount point above it."""
    real = place.resolve()
    mounts = [
        (len(Path(part.mountpoint).parts), index, part.fstype)
        for index, part in enumerate(psutil.disk_partitions(all=True))
        if real.is_relative_to(part.mountpoint)
    ]
    return max(mounts)[2] if mounts else "unknown"
