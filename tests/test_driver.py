"""The driver's calls as cuda.h declares them, and the streams and the ring that make them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tierkv.core.geometry import KVGeometry, PagePlan, PageTargets  # noqa: E402
from tierkv.core.transfer import Urgency  # noqa: E402
from tierkv.kernels import relayout  # noqa: E402
from tierkv.kernels.driver import Copies, Driver, DriverError, SourceOrder  # noqa: E402
from tierkv.kernels.relayout import BlockShape, PagePool, kernel_source  # noqa: E402
from tierkv.tiers.accelerator import HostLink, accelerators  # noqa: E402
from tierkv.tiers.host import HostTier  # noqa: E402
from tierkv.transfer.lane import Job, PolledLane, Started  # noqa: E402
from tierkv.transfer.link_profile import (  # noqa: E402
    SIZES,
    Direction,
    LinkProfile,
    measure_link,
)
from tierkv.transfer.spread import PlainSpread  # noqa: E402
from tierkv.transfer.staging import Staging  # noqa: E402
from tierkv.transfer.streams import CudaStreams, Queue  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[13, 12, 0])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver of CUDA 13, of 12.8, and an older one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("cuda.h or g++ is not installed")
    dryrun = ["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"]
    found = subprocess.run(dryrun, capture_output=True, text=True, check=True).stderr
    (include,) = {part.strip('"') for part in found.split() if part.startswith('"-I')}
    folder = tmp_path_factory.mktemp("driver")
    (folder / "move.inc").write_text(kernel_source())
    path = folder / "libcuda.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(path)]
    command += [include, f"-I{folder}", f"-DBATCH={request.param}"]
    command += [str(Path(__file__).with_name("fake_cuda.cpp"))]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def driver(library: Path) -> Iterator[Driver]:
    asked(library, "reset")
    ctypes.CDLL(str(library)).fail_from(0)
    made = Driver(str(library))
    made.use(0)
    yield made
    ctypes.CDLL(str(library)).fail_from(0)


def asked(library: Path, call: str) -> int:
    """How often the driver was asked for something."""
    return int(ctypes.CDLL(str(library)).asked(call.encode()))


def test_a_device_is_described_by_its_attributes(driver: Driver, tmp_path: Path) -> None:
    assert driver.version == 13000
    first, second = accelerators(driver, pci=tmp_path)

    assert (first.number, first.name, first.card) == (0, "Fake GH200", "10" * 16)
    assert (first.pci, second.pci) == ("0000:17:00.0", "0000:18:00.0")
    assert first.memory_bytes == 96 << 30
    assert first.link is HostLink.COHERENT
    assert (second.host_node, second.memory_node) == (1, 9)


def test_copies_arrive_in_one_call_where_there_is_one(driver: Driver, library: Path) -> None:
    source = np.arange(1000, dtype=np.uint8)
    target = np.zeros_like(source)
    starts, sizes = np.array([0, 500, 7]), np.array([7, 300, 100])
    before = asked(library, "cuMemcpyBatchAsync"), asked(library, "cuMemcpyAsync")
    stream = driver.stream()
    copies = Copies(target.ctypes.data + starts, source.ctypes.data + starts, sizes)
    driver.copy(copies, stream, SourceOrder.ANY)

    expected = np.zeros_like(source)
    for start, size in zip(starts, sizes, strict=True):
        expected[start : start + size] = source[start : start + size]
    assert np.array_equal(target, expected)
    batches = asked(library, "cuMemcpyBatchAsync") - before[0]
    singles = asked(library, "cuMemcpyAsync") - before[1]
    assert (batches, singles) in ((1, 0), (0, 3))
    if batches:
        order = ctypes.CDLL(str(library)).order_of(ctypes.c_void_p(stream))
        assert order == SourceOrder.ANY
    driver.copy(Copies(*(np.zeros(0, np.int64),) * 3), stream)
    assert asked(library, "cuMemcpyBatchAsync") - before[0] == batches


def test_a_refused_call_says_which_and_why(driver: Driver, library: Path) -> None:
    ctypes.CDLL(str(library)).fail_from(1)
    with pytest.raises(DriverError, match=r"cuMemHostRegister_v2: CUDA_ERROR_UNKNOWN \(999\)"):
        driver.host_register(4096, 4096)
    event_error = pytest.raises(DriverError, match="cuEventQuery: CUDA_ERROR_UNKNOWN")
    with event_error:
        driver.is_done(0)


def test_a_missing_driver_is_none() -> None:
    with pytest.raises(OSError, match="libnothing"):
        Driver("libnothing.so")


PLAN = PagePlan.of(
    KVGeometry(layers=3, kv_heads=1, head_dim=16, dtype="float32"),
    block_tokens=2,
    targets=PageTargets(hot_bytes=128, warm_bytes=4096, cold_bytes=8192),
)


@pytest.mark.parametrize("kernel_rate", [1.0, 1e12], ids=["copies", "kernels"])
def test_the_ring_moves_blocks_through_the_driver(
    driver: Driver, library: Path, kernel_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down and up again: `CudaStreams` makes every call, the driver carries it out."""
    monkeypatch.setattr(relayout, "find_spec", lambda _name: True)
    kernel = ctypes.CDLL(str(library)).kernel
    kernel.restype = ctypes.c_void_p
    streams = CudaStreams(driver, CPU, kernel=kernel)
    frames, pages = 40, 8
    host = torch.zeros(pages, PLAN.warm_page_bytes, dtype=torch.uint8)
    slab = torch.randint(0, 256, (frames * PLAN.block_bytes,), dtype=torch.uint8)
    row = BlockShape(1, 1, 1, PLAN.block_layer_bytes)
    pool = PagePool(slab, row, layers=3, page_blocks=1, page_bytes=PLAN.block_bytes)
    way = Direction((1e9,) * len(SIZES), kernel_rate)
    staging = Staging(
        streams, host, PlainSpread(streams, PLAN, pool), profile=LinkProfile(way, way, "made up"),
        slots=2, slot_bytes=2 * PLAN.warm_page_bytes,
        regions=lambda numbers: np.where(numbers < 6, numbers // 2, -1),
    )  # fmt: skip
    places = np.arange(frames, dtype=np.int64)
    order = np.random.default_rng(1).permutation(frames)
    before = slab.clone()
    event = staging.save(places, order)
    event.synchronize()
    blocks = host[:, : PLAN.warm_payload_bytes].view(pages, *PLAN.warm_page_shape)
    down = blocks.permute(0, 2, 1, 3).reshape(frames, -1)
    assert torch.equal(down, before.view(frames, -1)[torch.from_numpy(order)])

    slab.zero_()
    events = [staging.load(places[:30], order[:30], after=[event])]
    events += staging.load_layers(places[30:], order[30:])
    for one in events:
        while not one.query():
            pass
    assert torch.equal(slab, before)
    launched = asked(library, "cuLaunchKernel")
    assert launched > 4
    assert asked(library, "cuStreamWaitEvent") > launched // 2
    made = asked(library, "cuEventCreate")
    for _ in range(20):
        staging.load(places, order).synchronize()
    # Events and index memory are used again.
    assert asked(library, "cuEventCreate") <= made + 4
    assert asked(library, "cuMemHostAlloc") <= 4


def test_a_link_is_measured_through_the_driver(
    driver: Driver, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relayout, "find_spec", lambda _name: True)
    kernel = ctypes.CDLL(str(library)).kernel
    kernel.restype = ctypes.c_void_p
    streams = CudaStreams(driver, CPU, kernel=kernel)
    memory = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(2)]
    found = measure_link(streams, *memory)

    for way in (found.up, found.down):
        assert all(0 < rate < 1e13 for rate in (*way.copy, way.kernel))
    assert asked(library, "cuLaunchKernel") >= 8


def test_the_arena_is_pinned_in_the_background_and_given_back(
    driver: Driver, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierkv.tiers.host._REGION_BYTES", 3 * PLAN.warm_page_bytes)
    tier = HostTier(PLAN, pages=10, registrar=driver.registrar(1), hugepages="off")
    before = int(ctypes.CDLL(str(library)).registered())
    tier.open()
    tier.wait_until_registered()

    assert tier.regions(np.arange(10)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert tier.pinned_pages == 10
    assert int(ctypes.CDLL(str(library)).registered()) - before == 10 * PLAN.warm_page_bytes
    tier.close()
    assert asked(library, "cuMemHostUnregister") == 4


def test_a_device_that_is_lost_ends_what_was_under_way(driver: Driver, library: Path) -> None:
    streams = CudaStreams(driver, CPU, kernel=lambda: 0)
    lane = PolledLane("test", inflight_bytes_max=1 << 20)
    ended: list[bool] = []
    done = threading.Event()

    def start() -> Started:
        streams.begin()
        event = streams.record(Queue.TO_HOST)
        ctypes.CDLL(str(library)).fail_from(1)
        return Started(event, lambda ok: (ended.append(ok), done.set()))

    lane.submit([Job(1, 8, start)], Urgency.DEMAND)
    assert done.wait(10)
    lane.close()
    assert ended == [False]
