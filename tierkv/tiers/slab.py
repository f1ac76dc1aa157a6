"""The slab of hot pages: one allocation that other processes can map, divided by the planner.

On CUDA it comes from cudaMalloc itself, through CuPy: memory of torch's allocator, of a
stream-ordered pool or of expandable segments cannot be shared by the legacy IPC handles
(cupy #9306, ucx #7110). torch sees it without a copy (DLPack), and so does whoever takes the
tensor's own `__dlpack__`. Scratch memory of kernels stays with torch's allocator: it is ordered by
torch's streams and shared with the engine, where a pool of our own would be memory kept twice.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tierkv.core.errors import TierFailed

if TYPE_CHECKING:
    from torch import Tensor, device

logger = logging.getLogger(__name__)


def allocate_slab(pages: int, page_bytes: int, on: device) -> Tensor:
    """Uint8 (pages, page_bytes), every byte written. Raises RuntimeError where it does not fit."""
    import torch

    if on.type != "cuda" or find_spec("cupy") is None:
        # Written, not only mapped: no first put may pay for page faults (as in the host tier).
        return torch.empty((pages, page_bytes), dtype=torch.uint8, device=on).zero_()
    import cupy
    from torch.utils.dlpack import from_dlpack

    with cupy.cuda.Device(on.index):
        memory = cupy.cuda.Memory(pages * page_bytes)
        array = cupy.ndarray((pages, page_bytes), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
    slab = from_dlpack(array).zero_()
    torch.cuda.synchronize(on)  # other streams may use it from here on
    return slab


@dataclass(frozen=True, slots=True)
class SlabHandle:
    """What another process needs to map a slab: plain values, to be sent in any form.

    Who holds one can read and write all pages, whatever tenant they belong to.
    """

    handle: bytes
    pages: int
    page_bytes: int
    card: str  # `Driver.uuid` of the device


def export_slab(slab: Tensor) -> SlabHandle:
    """A handle to a CUDA slab. The exporter keeps the slab for as long as somebody maps it.

    Raises TierFailed for memory that cannot be shared.
    """
    from tierkv.kernels.driver import Driver

    driver = Driver.load()
    if not slab.is_cuda or driver is None or find_spec("cupy") is None:
        raise TierFailed(
            f"device tier: memory of {slab.device} cannot be shared with another process; "
            "that needs a CUDA device and CuPy (pip install 'tierkv-offload[gpu]')"
        )
    import cupy

    handle = cupy.cuda.runtime.ipcGetMemHandle(slab.data_ptr())
    pages, page_bytes = slab.shape
    return SlabHandle(bytes(handle), pages, page_bytes, driver.uuid(slab.device.index))


class MappedSlab:
    """Another process's slab in this one: `pages` is it, without a copy, until closed."""

    def __init__(self, handle: SlabHandle) -> None:
        from tierkv.kernels.driver import Driver

        driver = Driver.load()
        if driver is None or find_spec("cupy") is None:
            raise TierFailed("device tier: mapping a slab needs a CUDA device and CuPy")
        cards = {driver.uuid(number): number for number in range(driver.device_count())}
        if handle.card not in cards:
            raise TierFailed(
                f"device tier: the slab lies on card {handle.card}, which this process cannot see; "
                "check CUDA_VISIBLE_DEVICES"
            )
        import cupy
        from torch.utils.dlpack import from_dlpack

        self._device = cards[handle.card]
        size = handle.pages * handle.page_bytes
        with cupy.cuda.Device(self._device), ExitStack() as undo:
            address = cupy.cuda.runtime.ipcOpenMemHandle(handle.handle)
            undo.callback(cupy.cuda.runtime.ipcCloseMemHandle, address)
            memory = cupy.cuda.UnownedMemory(address, size, self, self._device)
            shape = (handle.pages, handle.page_bytes)
            array = cupy.ndarray(shape, cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
            self.pages: Tensor = from_dlpack(array)
            self._unmap = undo.pop_all()

    def close(self) -> None:
        """Unmap it; tensors of it must not be used any more."""
        import cupy

        self.__dict__.pop("pages", None)
        with cupy.cuda.Device(self._device):
            self._unmap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
