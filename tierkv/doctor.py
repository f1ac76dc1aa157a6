"""What this machine can do for tierkv, and the cure for what it cannot.

Looks only: nothing is started, no setting is changed, torch is not imported. The one thing
written is each file engine's probe file, in the directory that is asked about.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from tierkv.config import ram_bytes
from tierkv.core.errors import ConfigError
from tierkv.core.units import format_bytes
from tierkv.tiers.files import FILE_ENGINES
from tierkv.tiers.files.base import FileEngine

#: File systems whose bytes lie elsewhere, or in memory: a cold tier gains nothing there.
REMOTE_OR_MEMORY: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.sshfs", "nfs", "nfs4", "ramfs", "smb3", "tmpfs"}
)

SYS: Final = Path("/sys")


class State(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    NOTE = "note"  # works, but less well than it could
    PROBLEM = "problem"  # something asked for cannot work


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine; `cure` is empty where nothing need be done."""

    name: str
    state: State
    detail: str
    cure: str = ""

    def as_dict(self) -> dict[str, str]:
        """For `--json`."""
        return {key: str(value) for key, value in asdict(self).items()}


def examine(directory: Path) -> list[Finding]:
    """All findings, the machine first and then `directory`, where a cold tier would live."""
    found = [probe() for probe in _MACHINE]
    return found + list(_directory_findings(directory.expanduser().absolute()))


def _python() -> Finding:
    return Finding("Python", State.OK, f"{platform.python_version()} on {platform.platform()}")


def _torch() -> Finding:
    try:
        found = version("torch")
    except PackageNotFoundError:
        cure = "pip install 'tierkv-offload[hf]' for the transformers engine; the core needs none"
        return Finding("torch", State.NOTE, "not installed", cure)
    return Finding("torch", State.OK, found)


def _cuda() -> Finding:
    """Ask the driver itself: importing torch for it would take seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("CUDA", State.OK, "no driver: the device tier is host memory")
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        detail = f"driver present, no usable device (code {code})"
        return Finding("CUDA", State.NOTE, detail, "see nvidia-smi; check CUDA_VISIBLE_DEVICES")
    return Finding("CUDA", State.OK, f"{count.value} device(s)")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    return Finding("CPU", State.OK, f"{usable} of {os.cpu_count()} cores usable")


def _ram() -> Finding:
    free = psutil.virtual_memory().available
    detail = f"{format_bytes(ram_bytes())}, {format_bytes(free)} available"
    if free < 1 << 30:
        return Finding("RAM", State.NOTE, detail, "lower tiers.host.capacity")
    return Finding("RAM", State.OK, detail)


def _memlock() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", State.OK, "unlimited")
    if os.geteuid() == 0:
        return Finding("memlock", State.OK, f"{format_bytes(soft)}; does not bind root")
    limit = "unlimited" if hard == resource.RLIM_INFINITY else format_bytes(hard)
    cure = "ulimit -l unlimited, or LimitMEMLOCK=infinity; else tiers.host.register_cuda: off"
    return Finding("memlock", State.NOTE, f"{format_bytes(soft)} (hard limit {limit})", cure)


def _hugepages() -> Finding:
    modes = _line(SYS / "kernel/mm/transparent_hugepage/enabled")
    if modes is None:
        return Finding("huge pages", State.NOTE, "not offered by this kernel", "hugepages: off")
    chosen = modes.partition("[")[2].partition("]")[0]
    if chosen == "never":
        cure = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or hugepages: off"
        return Finding("huge pages", State.NOTE, "transparent huge pages: never", cure)
    return Finding("huge pages", State.OK, f"transparent huge pages: {chosen}")


def _numa() -> Finding:
    nodes = sorted((SYS / "devices/system/node").glob("node[0-9]*"))
    if len(nodes) <= 1:
        return Finding("NUMA", State.OK, "one node")
    detail = "; ".join(f"{node.name}: cores {_line(node / 'cpulist') or 'none'}" for node in nodes)
    return Finding("NUMA", State.OK, f"{len(nodes)} nodes: {detail}")


_MACHINE: Final[tuple[Callable[[], Finding], ...]] = (
    _python,
    _torch,
    _cuda,
    _cores,
    _ram,
    _memlock,
    _hugepages,
    _numa,
)


def _directory_findings(directory: Path) -> Iterator[Finding]:
    place = _nearest(directory)
    yield _space(place, directory)
    kind = _file_system(place)
    if kind in REMOTE_OR_MEMORY:
        cure = "choose a directory on a local NVMe file system (tiers.cold.directory)"
        yield Finding("file system", State.NOTE, f"{kind} at {place}", cure)
    else:
        yield Finding("file system", State.OK, f"{kind} at {place}")
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
            yield _engine(directory)


def _space(place: Path, directory: Path) -> Finding:
    usage = shutil.disk_usage(place)
    detail = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} for {directory}"
    if usage.free < 2 << 30:
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


def _engine(directory: Path) -> Finding:
    """The first engine whose probe succeeds, and why those before it were refused."""
    refusals: list[str] = []
    for name in FILE_ENGINES:
        try:
            kind: type[FileEngine] = FILE_ENGINES.load(name)
            reason = kind.probe(directory)
        except (ConfigError, ImportError, OSError) as error:
            reason = str(error)
        if reason is not None:
            refusals.append(f"{name}: {reason}")
        elif refusals:
            cure = "a local ext4 or xfs on NVMe takes O_DIRECT; until then reads use more CPU"
            return Finding("file engine", State.NOTE, f"{name} ({'; '.join(refusals)})", cure)
        else:
            return Finding("file engine", State.OK, name)
    cure = "name another directory (tiers.cold.directory)"
    return Finding("file engine", State.PROBLEM, f"none works: {'; '.join(refusals)}", cure)


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


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
