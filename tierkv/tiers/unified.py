"""Warm pages as plain system memory, for devices that read it through the host's page tables.

On Grace-Hopper the arena needs no registration: kernels read it in place over C2C, and copies take
it as it is. What must be prevented is its wandering: the driver counts a device's accesses and
moves pages that are used often into device memory, where they fill HBM unseen by our accounting
and by the engine's. So the arena is told to prefer the host's node, with the device's mappings kept
(`cudaMemAdvise`), and what has strayed all the same can be seen and sent back
(`cudaMemPrefetchAsync`), both with CUDA 13's locations.

Nobody has run this on such a machine; tests hold the calls, their order and their arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from tierkv.tiers import numa
from tierkv.tiers.accelerator import Accelerator, HostLink

logger = logging.getLogger(__name__)

_NUMA_MAPS: Final = Path("/proc/self/numa_maps")


class Home(Protocol):
    """Where an arena belongs, and what keeps it there."""

    def keep(self, address: int, size_bytes: int) -> None:
        """Say that this memory stays on the host and is read from there."""
        ...

    def strayed_bytes(self, address: int, size_bytes: int) -> int:
        """Bytes of this memory that lie in device memory."""
        ...

    def recall(self, address: int, size_bytes: int) -> None:
        """Send back what has strayed."""
        ...


class UnifiedHome:
    """The host side of a coherent device. `runtime` is `cuda.bindings.runtime`."""

    def __init__(self, device: Accelerator, runtime: Any, *, numa_maps: Path = _NUMA_MAPS) -> None:
        self._device = device
        self._runtime = runtime
        self._numa_maps = numa_maps

    def keep(self, address: int, size_bytes: int) -> None:
        """Prefer the host's node, and keep the device's mapping; refusals are logged only."""
        runtime = self._runtime
        advice = runtime.cudaMemoryAdvise
        advise = self._function("cudaMemAdvise")
        with self._current():
            for what, where in (
                (advice.cudaMemAdviseSetPreferredLocation, self._host()),
                (advice.cudaMemAdviseSetAccessedBy, self._on_device()),
            ):
                self._call("cudaMemAdvise", advise(address, size_bytes, what, where))

    def strayed_bytes(self, address: int, size_bytes: int) -> int:
        """By /proc/self/numa_maps; 0 where device memory is no node or the file is not there."""
        if self._device.memory_node is None:
            return 0
        try:
            text = self._numa_maps.read_text(encoding="ascii")
        except OSError:
            return 0
        found = numa.mapping_bytes(text, address, size_bytes)
        return found.get(self._device.memory_node, 0)

    def recall(self, address: int, size_bytes: int) -> None:
        """Prefetch to the host's node, on the default stream."""
        prefetch = self._function("cudaMemPrefetchAsync")
        with self._current():
            result = prefetch(address, size_bytes, self._host(), 0, 0)
            self._call("cudaMemPrefetchAsync", result)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the device the thread's current one: no other shall get a context by this."""
        error, before = self._runtime.cudaGetDevice()
        self._call("cudaSetDevice", self._runtime.cudaSetDevice(self._device.number))
        try:
            yield
        finally:
            if not int(error):
                self._runtime.cudaSetDevice(before)

    def _function(self, name: str) -> Any:
        """The call that takes locations: in the bindings of CUDA 12 it has another name."""
        return getattr(self._runtime, f"{name}_v2", None) or getattr(self._runtime, name)

    def _host(self) -> Any:
        """The host's node where it is known, else the host: CuPy's calls cannot say the first."""
        kinds = self._runtime.cudaMemLocationType
        location = self._runtime.cudaMemLocation()
        node = self._device.host_node
        location.type = kinds.cudaMemLocationTypeHost
        if node is not None:
            location.type = kinds.cudaMemLocationTypeHostNuma
            location.id = node
        return location

    def _on_device(self) -> Any:
        location = self._runtime.cudaMemLocation()
        location.type = self._runtime.cudaMemLocationType.cudaMemLocationTypeDevice
        location.id = self._device.number
        return location

    def _call(self, name: str, result: tuple[Any, ...]) -> None:
        if int(result[0]):
            logger.warning("%s refused device=%d error=%s", name, self._device.number, result[0])


def unified_home(device: Accelerator) -> UnifiedHome | None:
    """The home of an arena that a coherent device reads in place; None for any other device."""
    if device.link is not HostLink.COHERENT:
        return None
    try:
        from cuda.bindings import runtime
    except ImportError:
        logger.warning("coherent device, but cuda.bindings is not installed: host memory is pinned")
        return None
    return UnifiedHome(device, runtime)
