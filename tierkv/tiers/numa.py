"""NUMA facade: which node memory and threads should be on, and how to put them there.

Backends, first that works: the `numa` package (its policy is per thread only, so it answers
questions), ctypes system calls (bind a buffer), none. Buffers are always bound by the system
call `mbind`. A machine with one node, or none that can be read, needs no binding.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

SYSFS_NODES: Final = Path("/sys/devices/system/node")
SYSFS_PCI: Final = Path("/sys/bus/pci/devices")
_MBIND: Final = {"x86_64": 237, "aarch64": 235}
_MPOL_BIND: Final = 2
_IS_ADDRESS: Final = re.compile(r"[0-9a-f]+")
_ON_NODE: Final = re.compile(r"\bN(\d+)=(\d+)")


def nodes(root: Path = SYSFS_NODES) -> dict[int, list[int]]:
    """The memory nodes and their CPUs; {} where the system does not say."""
    found: dict[int, list[int]] = {}
    for entry in sorted(root.glob("node[0-9]*")):
        try:
            cpus = parse_cpus((entry / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        found[int(entry.name[4:])] = cpus
    return found


def parse_cpus(text: str) -> list[int]:
    """CPU numbers of a kernel list such as ``0-3,8``."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def node_of_pci(address: str, root: Path = SYSFS_PCI) -> int | None:
    """The node of a PCI device such as ``0000:17:00.0``; None where it is not known."""
    try:
        node = int((root / address.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def node_bytes(node: int, root: Path = SYSFS_NODES) -> int:
    """All memory of a node; 0 where the system does not say."""
    try:
        text = (root / f"node{node}" / "meminfo").read_text()
    except OSError:
        return 0
    found = re.search(r"MemTotal:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def mapping_bytes(numa_maps: str, address: int, size_bytes: int) -> dict[int, int]:
    """Bytes on each node of the mappings that begin in a range, from /proc/PID/numa_maps.

    One mapping may be several there: where advice changes, the kernel divides it.
    """
    found: Counter[int] = Counter()
    for line in numa_maps.splitlines():
        start, _, rest = line.partition(" ")
        if not _IS_ADDRESS.fullmatch(start):
            continue
        if address <= int(start, 16) < address + size_bytes:
            size = re.search(r"kernelpagesize_kB=(\d+)", rest)
            page = int(size[1]) * 1024 if size else mmap.PAGESIZE
            for node, count in _ON_NODE.findall(rest):
                found[int(node)] += int(count) * page
    return dict(found)


def backend(root: Path = SYSFS_NODES) -> str:
    """The backend in use: ``numa``, ``ctypes`` or ``none``."""
    if len(nodes(root)) > 1:
        if find_spec("numa") is not None:
            return "numa"
        if platform.machine() in _MBIND:
            return "ctypes"
    return "none"


def bind(address: int, size_bytes: int, node: int) -> bool:
    """Bind memory that is not yet touched to a node; False (and a log line) if refused."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    mask = (ctypes.c_ulong * (node // 64 + 1))()
    mask[node // 64] = 1 << (node % 64)
    failed = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(size_bytes),
        ctypes.c_int(_MPOL_BIND),
        mask,
        ctypes.c_ulong(len(mask) * 64 + 1),
        ctypes.c_uint(0),
    )
    if failed:
        logger.warning("numa bind refused node=%d errno=%d", node, ctypes.get_errno())
    return not failed
