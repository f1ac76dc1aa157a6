"""What is looked at for an engine: its package, our adapter in it, and what the file asks for.

What a finding rests on is given to it, so that it can be asked of any machine; the defaults are
this one. Nothing is changed. The adapter is imported in a process of its own, which takes as long
as the engine takes to import.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

import tierkv
from tierkv.config import Config, ram_bytes
from tierkv.config_report import plan_rows
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import GIB, KVGeometry, Layout
from tierkv.core.units import format_bytes
from tierkv.doctor_hardware import DeviceDriver, Finding, State, load_driver, survey
from tierkv.setups.models import ModelFacts
from tierkv.tiers.files.direct import DirectFiles

#: What wheels of another torch leave an engine with, and the cure.
TORCHVISION: Final = {
    "torchvision": "pip uninstall torchvision torchaudio torchcodec: they are for another torch, "
    "and language models need none"
}

_IMPORT_SECONDS: Final = 300
_SHM: Final = Path("/dev/shm")  # noqa: S108 what is asked about is this very place
_LOCKS: Final = Path("/proc/locks")


# ---- the engine


def package(
    name: str,
    packages: Sequence[str],
    tested: str,
    install: str,
    *,
    find: Callable[[str], str] = version,
) -> Finding:
    """Whether the engine is installed beside tierkv, in a version that was tested."""
    for distribution in packages:
        try:
            found = find(distribution)
        except PackageNotFoundError:
            continue
        detail = f"{distribution} {found}"
        if found == tested or re.match(re.escape(tested) + r"[.+]", found):
            return Finding(name, State.OK, f"{detail}, tested")
        cure = f"where it misbehaves: pip install '{distribution}=={tested}.*'"
        detail = f"{detail}; tested is {tested}, and plug-in interfaces change between versions"
        return Finding(name, State.NOTE, detail, cure)
    place = f"not installed where this tierkv is ({sys.prefix})"
    cure = f"{install}; then ask again with the tierkv of that environment"
    return Finding(name, State.PROBLEM, place, cure)


def adapter(
    code: str, known_faults: Mapping[str, str], *, python: str = sys.executable
) -> tuple[Finding, Mapping[str, str]]:
    """Whether our adapter loads in the engine, and the facts that `code` printed."""
    # The tierkv that asks, also where it is only on the path of this process.
    path = os.pathsep.join(filter(None, [str(_package_root()), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [python, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR",
                 "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_IMPORT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        cure = "ask again when the machine is idle"
        return Finding("adapter", State.PROBLEM, f"no import in {_IMPORT_SECONDS} s", cure), {}
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        reason = last.strip()[:300] or f"it ended with {done.returncode}"
        cures = [cure for part, cure in known_faults.items() if part in done.stderr]
        cure = cures[0] if cures else "install the tested version of the engine"
        return Finding("adapter", State.PROBLEM, f"does not load: {reason}", cure), {}
    facts = _facts(done.stdout)
    words = ", ".join(f"{key} {value}" for key, value in facts.items())
    return Finding("adapter", State.OK, f"loads in it ({words})" if words else "loads in it"), facts


def _package_root() -> Path:
    return Path(tierkv.__file__).resolve().parents[1]


def _facts(output: str) -> Mapping[str, str]:
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def shared_memory(least_bytes: int, *, place: Path = _SHM) -> Finding:
    """The memory through which an engine's processes talk."""
    cure = "docker run --shm-size 8g (or --ipc host); else mount -o remount,size=8G /dev/shm"
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return Finding("shared memory", State.PROBLEM, f"{place}: {error.strerror}", cure)
    detail = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free at {place}"
    if usage.free < least_bytes:
        detail += f"; processes of the engine talk through it and want {format_bytes(least_bytes)}"
        return Finding("shared memory", State.NOTE, detail, cure)
    return Finding("shared memory", State.OK, detail)


# ---- the model


def model(config: Config, facts: ModelFacts | None, block_tokens: int) -> Iterator[Finding]:
    """What a block of this model comes to, and what the tiers hold of it."""
    if facts is None:
        return
    if facts.geometry is None:
        cure = "name a local checkpoint, or one that was downloaded, for sizes"
        yield Finding("model", State.OK, f"{facts.shown}: its shape is not known here", cure)
        return
    fitted = config.model_copy(update={"block_tokens": block_tokens})
    try:
        rows = {row.name: row.value for row in plan_rows(fitted, facts.geometry)}
    except ConfigError as error:
        cure = "raise that capacity in the file"
        yield Finding("model", State.PROBLEM, f"{facts.shown}: {error}", cure)
        return
    held = ", ".join(
        f"{tier}: {rows[f'{tier} tier']:,} tokens"
        for tier in ("device", "host", "cold")
        if rows[f"{tier} tier"]
    )
    detail = f"{facts.shown}: {rows['token']:,} bytes a token by {facts.source}; {held}"
    yield Finding("model", State.OK, detail)
    yield block_size(fitted, facts.geometry)


def block_size(config: Config, geometry: KVGeometry) -> Finding:
    """A block, which is never cut, against the wanted page sizes."""
    layout = Layout(geometry, block_tokens=config.block_tokens, targets=config.pages.targets)
    plan, wanted = layout.pages, config.pages.warm
    detail = f"{plan.block_tokens} tokens are {format_bytes(plan.block_bytes)}"
    if plan.block_bytes > wanted:
        detail += f", more than pages.warm, {format_bytes(wanted)}: one block a page"
    if plan.block_bytes > config.pages.cold:
        detail += f"; more than pages.cold, {format_bytes(config.pages.cold)}, too"
        cure = "a smaller block size of the engine, or larger pages.warm and pages.cold"
        return Finding("block", State.NOTE, detail, cure)
    return Finding("block", State.OK, detail)


# ---- what the file asks for


def tiers(
    config: Config, *, load: Callable[[], DeviceDriver | None] = load_driver
) -> Iterator[Finding]:
    """Whether this machine has what each tier of the file wants."""
    host, cold = config.tiers.host, config.tiers.cold
    yield host_room(host.capacity, psutil.virtual_memory().available, ram_bytes())
    if host.capacity:
        pins = host.register_cuda == "auto" and bool(survey(load).devices)
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        yield host_pinning(host.capacity, limit, pins=pins, is_root=os.geteuid() == 0)
    if not cold.capacity:
        cure = "tiers.cold.capacity and tiers.cold.directory, or tierkv init --nvme SIZE"
        yield Finding("cold tier", State.NOTE, "off: nothing outlives the engine", cure)
        return
    try:
        yield cold_room(cold.directory, cold.capacity, cold.segment_cold_pages * config.pages.cold)
        if not cold.directory.exists():
            yield direct_reads(cold.directory)
        yield directory_lock(cold.directory)
    except OSError as error:
        cure = "name another directory (tiers.cold.directory)"
        yield Finding("cold tier", State.PROBLEM, f"{cold.directory}: {error}", cure)


def host_room(capacity: int, available: int, whole: int) -> Finding:
    """The host tier against RAM."""
    detail = f"{format_bytes(capacity)} wanted, {format_bytes(available)} of {format_bytes(whole)}"
    detail += " available"
    if not capacity:
        cure = "tiers.host.capacity: every block passes through host memory"
        return Finding("host tier", State.PROBLEM, "off", cure)
    if capacity > whole:
        cure = "lower tiers.host.capacity: the engine would be killed for memory"
        return Finding("host tier", State.PROBLEM, detail, cure)
    if capacity > available:
        cure = "lower tiers.host.capacity, or stop what uses the memory now"
        return Finding("host tier", State.NOTE, detail, cure)
    return Finding("host tier", State.OK, detail)


def host_pinning(capacity: int, limit: int, *, pins: bool, is_root: bool) -> Finding:
    """RLIMIT_MEMLOCK against the host tier, which is pinned where there is a device."""
    shown = "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit)
    if not pins:
        return Finding("pinning", State.OK, f"nothing is pinned here (memlock {shown})")
    detail = f"the host tier, {format_bytes(capacity)}, is pinned; memlock is {shown}"
    if limit == resource.RLIM_INFINITY or limit >= capacity or is_root:
        return Finding("pinning", State.OK, detail)
    cure = (
        "ulimit -l unlimited, LimitMEMLOCK=infinity, or docker run --ulimit memlock=-1; with "
        "tiers.host.register_cuda: off copies are several times as slow"
    )
    return Finding("pinning", State.NOTE, detail, cure)


def cold_room(directory: Path, capacity: int, segment_bytes: int) -> Finding:
    """The cold tier against its disk; what it already holds counts as room."""
    place = _nearest(directory)
    free = shutil.disk_usage(place).free
    held = sum(path.stat().st_blocks * 512 for path in directory.glob("*/segment-*.tkv"))
    detail = f"{format_bytes(capacity)} wanted at {directory}, {format_bytes(free)} free"
    if held:
        detail += f" beside the {format_bytes(held)} it holds"
    if free + held < min(capacity, segment_bytes):
        detail += f"; not even one segment file of {format_bytes(segment_bytes)} fits"
        cure = "free some space, lower segment_cold_pages, or name another tiers.cold.directory"
        return Finding("cold tier", State.PROBLEM, detail, cure)
    if free + held < capacity:
        detail += "; it grows until the disk is full, then stores no more"
        return Finding("cold tier", State.NOTE, detail, "lower tiers.cold.capacity")
    return Finding("cold tier", State.OK, detail)


def direct_reads(directory: Path) -> Finding:
    """O_DIRECT where the directory will be made."""
    place = _nearest(directory)
    reason = DirectFiles.probe(place) if os.access(place, os.W_OK | os.X_OK) else "not writable"
    if reason is None:
        return Finding("O_DIRECT", State.OK, f"reads and writes pass the page cache by at {place}")
    cure = "a local ext4 or xfs on NVMe takes O_DIRECT (tiers.cold.directory)"
    return Finding("O_DIRECT", State.NOTE, f"{place}: {reason}", cure)


def directory_lock(directory: Path, *, locks: Path = _LOCKS) -> Finding:
    """Who uses the directory now, by the kernel's list of locks; takes none itself."""
    try:  # by inode: the device that the kernel names is not always the one that `stat` does
        held = set(re.findall(r":(\d+) \d+ EOF", locks.read_text(encoding="ascii")))
    except (OSError, UnicodeDecodeError):
        return Finding("lock", State.OK, "this kernel does not tell who holds locks")
    users = [path for path in directory.glob("*/lock") if str(path.stat().st_ino) in held]
    if not users:
        return Finding("lock", State.OK, f"nobody uses {directory}")
    words = ", ".join(f"{path.parent.name} by pid {_holder(path)}" for path in users)
    cure = "stop it before another engine with that model starts here, or give that one another"
    return Finding("lock", State.NOTE, f"in use: {words}", f"{cure} tiers.cold.directory")


def _holder(path: Path) -> str:
    try:
        digits = re.search(r"\d+", path.read_text(encoding="ascii", errors="replace")[:64])
    except OSError:
        return "?"
    return digits[0] if digits else "?"


def _nearest(directory: Path) -> Path:
    return next(p for p in (directory, *directory.parents) if os.path.lexists(p) or p == p.parent)


#: What the processes of a serving engine want of shared memory.
ENGINE_SHM_BYTES: Final = GIB
