"""What the driver and sysfs say of a device: its link to host memory, and the nodes around it.

On most machines a device sits behind PCIe and host memory must be pinned for it. A Grace-Hopper
reads host memory through the CPU's own page tables (ATS), over a link that is several times as
fast, and shows its own memory to the system as a NUMA node: one that looks like RAM and is not.

Attributes: CUDA driver API, CUdevice_attribute. On ATS and HMM: CUDA programming guide, "Unified
memory on devices with full CUDA unified memory support".
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from tierkv.kernels.driver import Attribute, Driver
from tierkv.tiers import numa

#: `Attribute.NUMA_CONFIG` of a device whose memory is a NUMA node.
_IS_NUMA_NODE: Final = 1


class HostLink(StrEnum):
    """How a device reaches memory that was allocated by the system."""

    PINNED = "PCIe, pinned memory"
    HMM = "PCIe, pageable memory by migration (HMM)"
    COHERENT = "coherent, host page tables (ATS)"


class Devices(Protocol):
    """What is asked of a driver; `Driver` is one."""

    def device_count(self) -> int:
        """Devices that this process may use."""
        ...

    def attribute(self, attribute: Attribute, device: int) -> int | None:
        """An attribute; None where it is not known."""
        ...

    def name(self, device: int) -> str:
        """The model."""
        ...

    def uuid(self, device: int) -> str:
        """What tells this card from all others."""
        ...

    def memory_bytes(self, device: int) -> int:
        """All of its memory."""
        ...

    def pci_address(self, device: int) -> str:
        """As sysfs writes it."""
        ...


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device. Nodes are None where nobody knows, or where there is none."""

    number: int
    name: str
    card: str
    pci: str
    memory_bytes: int
    link: HostLink
    host_node: int | None  # whose memory is nearest to it
    memory_node: int | None  # its own memory, where the system sees that as a node


def accelerators(driver: Devices | None = None, *, pci: Path = numa.SYSFS_PCI) -> list[Accelerator]:
    """The devices that this process may use; none without a driver."""
    found = driver or Driver.load()
    return [] if found is None else [_describe(found, n, pci) for n in range(found.device_count())]


def _describe(driver: Devices, number: int, pci: Path) -> Accelerator:
    def ask(attribute: Attribute) -> int:
        value = driver.attribute(attribute, number)
        return -1 if value is None else value

    link = HostLink.PINNED
    if ask(Attribute.USES_HOST_PAGE_TABLES) == 1:
        link = HostLink.COHERENT
    elif ask(Attribute.PAGEABLE_MEMORY_ACCESS) == 1:
        link = HostLink.HMM
    address = driver.pci_address(number)
    near: int | None = ask(Attribute.HOST_NUMA_ID)
    if near is None or near < 0:
        near = numa.node_of_pci(address, pci)
    own = ask(Attribute.NUMA_ID) if ask(Attribute.NUMA_CONFIG) == _IS_NUMA_NODE else -1
    return Accelerator(
        number=number,
        name=driver.name(number),
        card=driver.uuid(number),
        pci=address,
        memory_bytes=driver.memory_bytes(number),
        link=link,
        host_node=near,
        memory_node=own if own >= 0 else None,
    )


def host_nodes(
    devices: Iterable[Accelerator], *, nodes: Path = numa.SYSFS_NODES
) -> dict[int, list[int]]:
    """The nodes of host memory and their cores: all but device memory, and but empty ones.

    A Grace-Hopper shows more nodes than it has memory for: they are for parts of a divided device.
    """
    taken = set(_device_nodes(devices, nodes))
    return {
        node: cpus
        for node, cpus in numa.nodes(nodes).items()
        if node not in taken and (cpus or numa.node_bytes(node, nodes))
    }


def device_node_bytes(
    devices: Iterable[Accelerator] | None = None, *, nodes: Path = numa.SYSFS_NODES
) -> int:
    """Device memory that the system counts as RAM; a share of RAM must leave it out.

    Only ARM machines have such devices (Grace), so nowhere else is the driver asked.
    """
    if devices is None:
        if platform.machine() != "aarch64":
            return 0
        devices = accelerators()
    return sum(numa.node_bytes(node, nodes) for node in _device_nodes(devices, nodes))


def _device_nodes(devices: Iterable[Accelerator], nodes: Path) -> list[int]:
    """Nodes that are device memory; also of devices that this process was not shown.

    CUDA_VISIBLE_DEVICES hides devices and not their memory. Where one device's memory is a node
    without cores, so is the memory of all of them.
    """
    own = [device.memory_node for device in devices if device.memory_node is not None]
    found = numa.nodes(nodes)
    if any(found.get(node) == [] for node in own):
        own += [node for node, cpus in found.items() if not cpus and node not in own]
    return own


def home_node(device: Accelerator | None, *, nodes: Path = numa.SYSFS_NODES) -> int | None:
    """The node that host memory for a device should be on; None where it makes no difference.

    Never a node that is device memory: nearest by distance, and still the wrong one. Where there is
    such a node, even a single host node is worth naming, or the system may take the other.
    """
    if device is None or device.host_node not in host_nodes([device], nodes=nodes):
        return None
    with_memory = [n for n, cpus in numa.nodes(nodes).items() if cpus or numa.node_bytes(n, nodes)]
    return device.host_node if len(with_memory) > 1 else None
