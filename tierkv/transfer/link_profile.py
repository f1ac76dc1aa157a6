"""What the link between host and device gives, by the size of a piece; measured, and kept.

Copy engines are fast for large pieces and very slow for small ones; a kernel that reads or writes
mapped host memory hardly minds, but never reaches the copy engine's best and takes processors from
the engine. Where the two cross depends on card, link and driver (vLLM #42212, #57555), so it is
measured when a device is first used, and kept in a file for each card and driver.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tierkv.core.geometry import KIB, MIB
from tierkv.kernels.driver import Copies
from tierkv.kernels.relayout import Arrangement, BlockShape, Pool
from tierkv.transfer.streams import Queue, Streams

if TYPE_CHECKING:
    from torch import Tensor, device

logger = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int64]

SIZES: Final = tuple(size * KIB for size in (4, 8, 16, 32, 64, 128, 512, 2048))
_FORMAT: Final = 1
_SCRATCH_BYTES: Final = 32 * MIB
_PIECES_MAX: Final = 2048
_TIMES: Final = 3
_ROW_BYTES: Final = 16 * KIB


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction: bytes per second of the copy engine at each of `SIZES`, and of the kernel."""

    copy: tuple[float, ...]
    kernel: float

    def copy_seconds(self, piece_bytes: Numbers, total_bytes: Numbers) -> npt.NDArray[np.float64]:
        """Time to copy `total_bytes` in pieces of `piece_bytes`, elementwise."""
        rate = np.interp(np.log2(piece_bytes), np.log2(SIZES), self.copy)
        rate *= np.minimum(piece_bytes / SIZES[0], 1)  # smaller ones cost as much, a piece
        seconds: npt.NDArray[np.float64] = total_bytes / rate
        return seconds

    @property
    def crossover_bytes(self) -> int:
        """The least of `SIZES` from which on the copy engine is the faster; 0 from the first."""
        slower = [size for size, rate in zip(SIZES, self.copy, strict=True) if rate < self.kernel]
        return 0 if not slower else next((size for size in SIZES if size > slower[-1]), 1 << 62)


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """Both directions; `source` says where the figures are from."""

    up: Direction
    down: Direction
    source: str

    def of(self, queue: Queue) -> Direction:
        """The direction that a copy queue goes."""
        return self.up if queue is Queue.TO_DEVICE else self.down


#: Until a device is measured: an H100 on PCIe 5 as vLLM #42212 measured it; the kernel's rate is
#: what its ratios at 16 KiB come to.
PUBLISHED: Final = LinkProfile(
    up=Direction((3.8e9, 5.3e9, 6.3e9, 40e9, 51e9, 52e9, 53e9, 54e9), 40e9),
    down=Direction((3.8e9, 5.3e9, 6.3e9, 40e9, 51e9, 52e9, 53e9, 54e9), 40e9),
    source="published for an H100",
)


def link_profile(
    measure: Callable[[], LinkProfile], directory: Path | None, card: str
) -> LinkProfile:
    """The card's profile from its file; measured, and kept there, where there is none.

    `card` names it together with its driver. A file that cannot be read or written is no fault: it
    is measured again. No directory: nothing is kept.
    """
    if directory is None:
        return measure()
    path = directory / f"{card}.json"
    kept = read_profile(path)
    if kept is not None:
        return kept
    profile = measure()
    try:
        _write(path, profile)
    except OSError as error:
        logger.warning("link profile not kept path=%s error=%s", path, error)
    return profile


def read_profile(path: Path) -> LinkProfile | None:
    """A kept profile; None where there is none that this version understands."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT or tuple(found["sizes"]) != SIZES:
            return None
        ways = []
        for name in ("up", "down"):
            copies, kernel = found[name]["copy"], found[name]["kernel"]
            if not isinstance(copies, list) or len(copies) != len(SIZES):
                return None
            if not all(
                type(rate) in (int, float) and 0 < rate < 1e15 for rate in (*copies, kernel)
            ):
                return None
            ways.append(Direction(tuple(map(float, copies)), float(kernel)))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return LinkProfile(ways[0], ways[1], f"measured, kept in {path}")


def _write(path: Path, profile: LinkProfile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = json.dumps({"format": _FORMAT, "sizes": SIZES, **asdict(profile)}, indent=2)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
    ) as file:
        scratch = Path(file.name)
        try:
            file.write(text + "\n")
            file.flush()
            scratch.replace(path)
        except OSError:
            scratch.unlink()
            raise


def measure_device(streams: Streams, device: device) -> LinkProfile:
    """`measure_link` with scratch memory of its own."""
    import torch

    host = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return measure_link(
        streams, host, torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
    )


def measure_link(streams: Streams, host: Tensor, device: Tensor) -> LinkProfile:
    """Measure with scratch memory of both sides: flat uint8, 32 MiB or less, host pinned.

    What they hold is lost. Takes about 0.1 s on a PCIe link.
    """
    size = min(_SCRATCH_BYTES, host.numel(), device.numel())
    host, device = host[:size], device[:size]
    ways = []
    for queue, source, target in (
        (Queue.TO_DEVICE, host, device),
        (Queue.TO_HOST, device, host),
    ):
        rates = [_copy_rate(streams, queue, source, target, piece) for piece in SIZES]
        ways.append(Direction(tuple(rates), _kernel_rate(streams, source, target)))
    return LinkProfile(ways[0], ways[1], "measured")


def _copy_rate(streams: Streams, queue: Queue, source: Tensor, target: Tensor, piece: int) -> float:
    count = max(1, min(_PIECES_MAX, source.numel() // piece))
    # Scattered on both sides, as pages are: neighbours would be joined by some drivers.
    draw = np.random.default_rng(0)
    starts = [draw.permutation(count).astype(np.int64) * piece for _ in range(2)]
    sizes = np.full(count, min(piece, source.numel()), np.int64)
    streams.begin()
    copies = Copies(target.data_ptr() + starts[0], source.data_ptr() + starts[1], sizes)
    return _rate(int(sizes.sum()), lambda: streams.copy(queue, copies), streams, queue)


def _kernel_rate(streams: Streams, source: Tensor, target: Tensor) -> float:
    shape = BlockShape(1, 1, 1, _ROW_BYTES)
    at = Arrangement.canonical(shape)
    count = source.numel() // _ROW_BYTES
    assert count, f"scratch memory of less than {_ROW_BYTES} bytes measures nothing"
    draw = np.random.default_rng(1)
    offsets = [draw.permutation(count).astype(np.int64) * _ROW_BYTES for _ in range(2)]
    streams.begin()
    index = streams.upload(Queue.RELAYOUT, *offsets)
    pools = Pool((source,), at), Pool((target,), at)
    rate = _rate(
        count * _ROW_BYTES,
        lambda: streams.move(Queue.RELAYOUT, shape, *pools, index, slice(0, count)),
        streams,
        Queue.RELAYOUT,
    )
    index.until = streams.record(Queue.RELAYOUT)
    return rate


def _rate(size_bytes: int, run: Callable[[], None], streams: Streams, queue: Queue) -> float:
    """Bytes per second, the median of a few runs after one that warms up."""
    taken = []
    for _ in range(_TIMES + 1):
        begun = time.perf_counter()
        run()
        streams.record(queue).synchronize()
        taken.append(time.perf_counter() - begun)
    return size_bytes / max(1e-9, sorted(taken[1:])[_TIMES // 2])
