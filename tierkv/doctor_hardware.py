"""What the machine beneath tierkv offers: devices, their links, memory, nodes and kernel.

Looks only: no setting is changed and no device context is made. What a finding rests on (a driver,
a folder of sysfs, a rate) is given to it, so that it can be asked of any machine; the defaults are
this one. `tierkv.doctor` adds what it finds about software and the cold tier's directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import psutil

from tierkv.core.geometry import MIB
from tierkv.core.units import format_bytes
from tierkv.kernels.driver import Driver, DriverError
from tierkv.tiers import numa
from tierkv.tiers.accelerator import Accelerator, Devices, HostLink, accelerators
from tierkv.transfer.link_profile import Direction, read_profile

#: Rates below these are worth a word: bytes per second.
_COPY_RATE_MIN: Final = 2e9
_LINK_RATE_MIN: Final = 5e9

_COPY_BYTES: Final = 64 * MIB
_COPIES: Final = 5

_KERNEL_MM: Final = Path("/sys/kernel/mm")
_PROC: Final = Path("/proc")
_DEV: Final = Path("/dev")

#: io_uring_setup(2): its number, and the size of its struct io_uring_params.
_IO_URING_SETUP: Final = {"x86_64": 425, "aarch64": 425}
_IO_URING_PARAMS_BYTES: Final = 120

_REACH: Final = {
    HostLink.COHERENT: "host memory is read in place",
    HostLink.HMM: "no ATS; host memory is pinned, so that none migrates",
    HostLink.PINNED: "no ATS; host memory is pinned",
}


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


class DeviceDriver(Devices, Protocol):
    """What is asked of a driver here; `Driver` is one."""

    @property
    def version(self) -> int:
        """CUDA version that it serves: 13000 is 13.0."""
        ...


@dataclass(frozen=True, slots=True)
class Survey:
    """What the driver showed. `version` is None where there is no driver."""

    devices: Sequence[Accelerator]
    version: int | None = None
    fault: str = ""  # why a driver that is there shows no device


def hardware(
    profiles: Path | None, *, load: Callable[[], DeviceDriver | None] | None = None
) -> Iterator[Finding]:
    """All findings of this module; `profiles` is where measured link rates are kept."""
    seen = survey(load or load_driver)
    yield cuda(seen)
    yield from (one_device(device) for device in seen.devices)
    yield from host_links(seen.devices)
    yield from (device_link(device, seen.version, profiles) for device in seen.devices)
    yield host_copy(copy_rate())
    yield memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK), is_root=os.geteuid() == 0)
    yield huge_pages()
    yield numa_map(seen.devices)
    yield gds(seen.devices)
    yield io_uring()


# ---- devices and their links


def load_driver() -> Driver | None:
    """The driver; None where there is none. Raises DriverError for one that does not start.

    Importing torch for it would take seconds.
    """
    try:
        return Driver("libcuda.so.1")
    except OSError:
        return None


def survey(load: Callable[[], DeviceDriver | None], *, pci: Path = numa.SYSFS_PCI) -> Survey:
    """The devices that this process may use, or why there are none."""
    try:
        driver = load()
        if driver is None:
            return Survey(())
        found = accelerators(driver, pci=pci)
        return Survey(found, driver.version, "" if found else "it counts 0 devices")
    except (DriverError, AttributeError) as error:  # AttributeError: a call that it lacks
        return Survey((), fault=str(error))


def cuda(seen: Survey) -> Finding:
    """Whether there is a driver, and how many devices it shows."""
    if seen.fault:
        detail = f"driver present, no usable device ({seen.fault})"
        return Finding("CUDA", State.NOTE, detail, "see nvidia-smi; check CUDA_VISIBLE_DEVICES")
    if seen.version is None:
        return Finding("CUDA", State.OK, "no driver: the device tier is host memory")
    serves = f"{seen.version // 1000}.{seen.version % 1000 // 10}"
    return Finding("CUDA", State.OK, f"driver for CUDA {serves}, {len(seen.devices)} device(s)")


def one_device(device: Accelerator) -> Finding:
    """What it is and where it sits."""
    parts = [device.name, format_bytes(device.memory_bytes), f"PCI {device.pci}"]
    near = "unknown" if device.host_node is None else str(device.host_node)
    parts.append(f"nearest NUMA node {near}")
    if device.memory_node is not None:
        parts.append(f"its memory is NUMA node {device.memory_node}")
    return Finding(f"device {device.number}", State.OK, ", ".join(parts))


def host_links(devices: Sequence[Accelerator]) -> Iterator[Finding]:
    """How each device reaches host memory: a property of the hardware, so there is no cure."""
    if not devices:
        yield Finding("ATS", State.OK, "no device")
    for device in devices:
        name, link = f"ATS, device {device.number}", device.link
        yield Finding(name, State.OK, f"{link}: {_REACH[link]}")


def device_link(device: Accelerator, version: int | None, profiles: Path | None) -> Finding:
    """The rates that a store measured with this card and driver, from the file it kept."""
    name = f"link, device {device.number}"
    path = None if profiles is None else profiles / f"{device.card}-{version}.json"
    profile = None if path is None else read_profile(path)
    if profile is None:
        cure = "it is measured when a store first opens the device tier"
        return Finding(name, State.NOTE, "not measured yet", cure)
    detail = f"up {_rates(profile.up)}; down {_rates(profile.down)} ({profile.source})"
    if min(max(way.copy[-1], way.kernel) for way in (profile.up, profile.down)) < _LINK_RATE_MIN:
        cure = (
            "see PCIe generation and width in nvidia-smi -q -d PCIE or lspci -vv, try another "
            f"slot; to measure again remove {path}"
        )
        return Finding(name, State.NOTE, detail, cure)
    return Finding(name, State.OK, detail)


def _rates(way: Direction) -> str:
    least = way.crossover_bytes
    crossover = "at every size" if not least else f"from {format_bytes(least)} on"
    if least > _COPY_BYTES:
        crossover = "at no size"
    engine, kernel = _gb_per_s(way.copy[-1]), _gb_per_s(way.kernel)
    return f"{engine} by copy engine, {kernel} by kernel, the engine is faster {crossover}"


# ---- host memory


def copy_rate(size_bytes: int = _COPY_BYTES, times: int = _COPIES) -> float | None:
    """Bytes per second that one thread copies, median; None where there is no room to try."""
    if psutil.virtual_memory().available < 8 * size_bytes:
        return None
    source, target = (np.full(size_bytes, fill, np.uint8) for fill in (1, 2))
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - begun)
    return size_bytes / max(1e-9, sorted(taken)[times // 2])


def host_copy(rate: float | None) -> Finding:
    """How fast pages move within host memory, which bounds warm hits without a device."""
    if rate is None:
        return Finding("host copy", State.OK, "not measured: too little memory is available")
    detail = f"{_gb_per_s(rate)}, one thread, {format_bytes(_COPY_BYTES)} now"
    if rate < _COPY_RATE_MIN:
        cure = "ask again when the machine is idle; then look at its memory channels and CPU limits"
        return Finding("host copy", State.NOTE, detail, cure)
    return Finding("host copy", State.OK, detail)


def memlock(limits: tuple[int, int], *, is_root: bool) -> Finding:
    """How much memory may be pinned, from RLIMIT_MEMLOCK: (soft, hard)."""
    soft, hard = limits
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", State.OK, "unlimited")
    if is_root:
        return Finding("memlock", State.OK, f"{format_bytes(soft)}; does not bind root")
    limit = "unlimited" if hard == resource.RLIM_INFINITY else format_bytes(hard)
    cure = "ulimit -l unlimited, or LimitMEMLOCK=infinity; else tiers.host.register_cuda: off"
    return Finding("memlock", State.NOTE, f"{format_bytes(soft)} (hard limit {limit})", cure)


def huge_pages(*, root: Path = _KERNEL_MM) -> Finding:
    """Transparent huge pages, which the arena asks for; reserved ones, which it never takes."""
    chosen = _chosen(root / "transparent_hugepage/enabled")
    if chosen is None:
        return Finding("huge pages", State.NOTE, "not offered by this kernel", "hugepages: off")
    detail = f"transparent huge pages: {chosen}"
    defrag = _chosen(root / "transparent_hugepage/defrag")
    if defrag is not None:
        detail += f", defrag: {defrag}"
    reserved = list(_reserved(root / "hugepages"))
    if reserved:
        detail += f"; reserved, not used by tierkv: {', '.join(reserved)}"
    if chosen == "never":
        cure = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or hugepages: off"
        return Finding("huge pages", State.NOTE, detail, cure)
    return Finding("huge pages", State.OK, detail)


def _reserved(folder: Path) -> Iterator[str]:
    """The hugetlb pools, as ``0 of 2 MiB``."""
    sizes = (entry.name[10:-2] for entry in folder.glob("hugepages-*kB"))
    for size in sorted(int(text) for text in sizes if text.isdecimal()):
        count = _line(folder / f"hugepages-{size}kB/nr_hugepages")
        if count is not None:
            yield f"{count} of {format_bytes(size * 1024)}"


def numa_map(
    devices: Sequence[Accelerator], *, nodes: Path = numa.SYSFS_NODES, backend: str | None = None
) -> Finding:
    """Every node with its cores and memory, and what each is to the devices."""
    known = sorted(numa.nodes(nodes))
    if not known:
        return Finding("NUMA", State.OK, "this kernel tells of no nodes")
    detail = "; ".join(_node(node, devices, nodes) for node in known)
    if len(known) == 1:
        return Finding("NUMA", State.OK, f"one node: {detail}")
    backend = backend or numa.backend()
    detail = f"{len(known)} nodes, backend {backend}: {detail}"
    if backend == "none":
        cure = "start under numactl --membind=NODE --cpunodebind=NODE; tiers.host.numa: off"
        return Finding("NUMA", State.NOTE, detail, cure)
    return Finding("NUMA", State.OK, detail)


def _node(node: int, devices: Sequence[Accelerator], nodes: Path) -> str:
    parts = [f"node {node}: cores {_line(nodes / f'node{node}/cpulist') or 'none'}"]
    size = numa.node_bytes(node, nodes)
    if size:
        parts.append(format_bytes(size))
    for device in devices:
        if device.memory_node == node:
            parts.append(f"memory of device {device.number}")
        elif device.host_node == node:
            parts.append(f"near device {device.number}")
    return ", ".join(parts)


# ---- kernel and drivers


def gds(
    devices: Sequence[Accelerator],
    *,
    proc: Path = _PROC,
    dev: Path = _DEV,
    bindings: str = "cuda.bindings.cufile",
) -> Finding:
    """What reading from disk straight into a device (GPUDirect Storage) needs."""
    if not devices:
        return Finding("GDS", State.OK, "no device")
    lacks, cures = [], []
    if not _is_importable(bindings):
        lacks.append(f"no {bindings}")
        cures.append("pip install 'tierkv-offload[gpu]'")
    if not os.path.lexists(proc / "driver/nvidia-fs") and not any(dev.glob("nvidia-fs*")):
        lacks.append("no nvidia-fs driver")
        cures.append("load nvidia-fs, or set up PCI P2PDMA; gdscheck -p tells which works")
    if not lacks:
        detail = f"{bindings} and the nvidia-fs driver are there, for cold.engine: gds"
        return Finding("GDS", State.OK, detail)
    way = "cold pages are read by O_DIRECT into pinned memory and copied, which always works"
    cure = f"only if cold.engine: gds is wanted: {'; '.join(cures)}"
    return Finding("GDS", State.NOTE, f"{', '.join(lacks)}: {way}", cure)


def _is_importable(module: str) -> bool:
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError):  # the last two: libraries beneath it are missing
        return False
    return True


def io_uring(*, setup: Callable[[], int | None] | None = None, proc: Path = _PROC) -> Finding:
    """Whether the kernel lets us have a ring: information, as tierkv does not need one.

    `setup` tries, and gives 0, an errno, or None where it does not know how to.
    """
    unused = "not used: the file engine is O_DIRECT from threads"
    code = (setup or _try_io_uring)()
    if code is None:
        detail = f"not probed on {platform.machine()}"
    elif code == 0:
        detail = "available"
    else:
        reason = errno.errorcode.get(code, str(code))
        if code == errno.EPERM:
            reason += f", {_who_refuses(proc / 'sys/kernel/io_uring_disabled')}"
        detail = f"not available ({reason})"
    return Finding("io_uring", State.OK, f"{detail}; {unused}")


def _who_refuses(switch: Path) -> str:
    value = _line(switch)
    if value in (None, "0"):
        return "a container's seccomp profile"
    return f"sysctl kernel.io_uring_disabled = {value}"


def _try_io_uring() -> int | None:
    """Ask for a ring of one entry and give it back; see `io_uring`."""
    number = _IO_URING_SETUP.get(platform.machine())
    if number is None:
        return None
    params = (ctypes.c_ubyte * _IO_URING_PARAMS_BYTES)()
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(ctypes.c_long(number), ctypes.c_uint(1), params)
    if ring < 0:
        return ctypes.get_errno()
    os.close(ring)
    return 0


def _gb_per_s(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _chosen(path: Path) -> str | None:
    """The word in brackets of a setting such as ``always [madvise] never``."""
    text = _line(path)
    return None if text is None else text.partition("[")[2].partition("]")[0] or text


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
