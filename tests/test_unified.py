"""An arena that a coherent device reads in place: what CUDA is told of it, and what strays from it.

The runtime here records its calls. It has the shape of `cuda.bindings.runtime` (CUDA 13), and takes
no other arguments; where the bindings are installed, the same calls are made through them too.
"""

# ruff: noqa: N802, N815 -- the names are NVIDIA's

from __future__ import annotations

import logging
import mmap
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tierkv.core.geometry import GIB, KVGeometry, PagePlan, PageTargets
from tierkv.core.tier import Span
from tierkv.kernels.driver import Driver
from tierkv.tiers import host as host_module
from tierkv.tiers.accelerator import Accelerator, HostLink
from tierkv.tiers.host import HostTier
from tierkv.tiers.unified import UnifiedHome, unified_home

PLAN = PagePlan.of(
    KVGeometry(layers=3, kv_heads=1, head_dim=16, dtype="float32"),
    block_tokens=2,
    targets=PageTargets(hot_bytes=128, warm_bytes=4096, cold_bytes=8192),
)


def device_of(
    link: HostLink = HostLink.COHERENT,
    *,
    number: int = 0,
    host_node: int | None = 0,
    memory_node: int | None = 1,
) -> Accelerator:
    return Accelerator(
        number, "GH200 480GB", "c4fe", "0009:01:00.0", 96 * GIB, link, host_node, memory_node
    )


class Error(IntEnum):
    """Two of cudaError_t."""

    SUCCESS = 0
    INVALID_DEVICE = 101


@dataclass
class Location:
    """cudaMemLocation."""

    type: int = 0
    id: int = 0


Advice = IntEnum(
    "Advice", {"cudaMemAdviseSetPreferredLocation": 3, "cudaMemAdviseSetAccessedBy": 5}
)
LocationType = IntEnum(
    "LocationType",
    {
        "cudaMemLocationTypeDevice": 1,
        "cudaMemLocationTypeHost": 2,
        "cudaMemLocationTypeHostNuma": 3,
    },
)


class Runtime:
    """Stands in for `cuda.bindings.runtime`: records each call, answers with `error`."""

    cudaMemoryAdvise = Advice
    cudaMemLocationType = LocationType
    cudaMemLocation = Location

    def __init__(self, error: Error = Error.SUCCESS) -> None:
        self.error = error
        self.calls: list[tuple[object, ...]] = []
        self.current = 5
        self.devices: set[int] = set()

    def cudaGetDevice(self) -> tuple[Error, int]:
        return (Error.SUCCESS, self.current)

    def cudaSetDevice(self, number: int) -> tuple[Error]:
        self.current = number
        return (Error.SUCCESS,)

    def cudaMemAdvise(
        self, address: int, size: int, advice: Advice, location: Location
    ) -> tuple[Error]:
        assert isinstance(advice, Advice)
        return self._asked("advise", address, size, advice.name, location)

    def cudaMemPrefetchAsync(
        self, address: int, size: int, location: Location, flags: int, stream: int
    ) -> tuple[Error]:
        assert flags == 0
        return self._asked("prefetch", address, size, stream, location)

    def _asked(self, *call: object) -> tuple[Error]:
        *plain, where = call
        self.devices.add(self.current)
        assert isinstance(where, Location)
        kind = LocationType(where.type).name.removeprefix("cudaMemLocationType")
        self.calls.append((*plain, kind, where.id))
        return (self.error,)


# ---- which devices have a home


@pytest.mark.parametrize("link", [HostLink.PINNED, HostLink.HMM])
def test_a_device_behind_pcie_has_no_home_of_this_kind(
    link: HostLink, caplog: pytest.LogCaptureFixture
) -> None:
    assert unified_home(device_of(link, memory_node=None)) is None
    assert not caplog.records


def test_a_coherent_device_has_one_through_the_bindings() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    assert isinstance(unified_home(device_of()), UnifiedHome)


def test_without_the_bindings_a_coherent_device_gets_pinned_memory_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert unified_home(device_of()) is None
    assert "cuda.bindings is not installed: host memory is pinned" in caplog.text


def test_bindings_of_cuda_12_do_not_keep_a_store_from_opening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another package may have brought them; there only `cudaMemAdvise_v2` takes locations."""

    class Twelve(Runtime):
        def cudaMemAdvise(
            self, address: int, size: int, advice: object, device: int
        ) -> tuple[Error]:
            if not isinstance(device, int):
                raise TypeError("an integer is required")
            return (Error.SUCCESS,)

        def cudaMemAdvise_v2(
            self, address: int, size: int, advice: Advice, location: Location
        ) -> tuple[Error]:
            return super().cudaMemAdvise(address, size, advice, location)

    bindings = ModuleType("cuda.bindings")
    bindings.runtime = Twelve()
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    home = unified_home(device_of())
    if home is not None:
        home.keep(4096, 4096)


# ---- what CUDA is told


def test_calls_are_made_on_the_device_itself_and_the_current_one_comes_back() -> None:
    runtime = Runtime()
    home = UnifiedHome(device_of(number=2), runtime)
    home.keep(4096, 4096)
    home.recall(4096, 4096)

    assert (runtime.devices, runtime.current) == ({2}, 5)


def test_an_arena_is_told_to_stay_on_its_node_and_then_to_be_mapped_by_its_device() -> None:
    runtime = Runtime()
    UnifiedHome(device_of(number=2, host_node=1, memory_node=18), runtime).keep(0x7000, 0x3000)
    assert runtime.calls == [
        ("advise", 0x7000, 0x3000, "cudaMemAdviseSetPreferredLocation", "HostNuma", 1),
        ("advise", 0x7000, 0x3000, "cudaMemAdviseSetAccessedBy", "Device", 2),
    ]


def test_what_strayed_is_sent_to_the_node_on_the_default_stream() -> None:
    runtime = Runtime()
    UnifiedHome(device_of(host_node=1), runtime).recall(0x7000, 0x3000)
    assert runtime.calls == [("prefetch", 0x7000, 0x3000, 0, "HostNuma", 1)]


def test_without_a_known_node_it_is_the_host_as_a_whole() -> None:
    runtime = Runtime()
    home = UnifiedHome(device_of(number=3, host_node=None), runtime)
    home.keep(0x7000, 0x3000)
    home.recall(0x7000, 0x3000)
    assert [call[-2:] for call in runtime.calls] == [("Host", 0), ("Device", 3), ("Host", 0)]


def test_a_refusal_is_logged_and_the_next_call_is_made_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = Runtime(Error.INVALID_DEVICE)
    home = UnifiedHome(device_of(number=1), runtime)
    home.keep(0x7000, 0x3000)
    home.recall(0x7000, 0x3000)
    assert len(runtime.calls) == 3
    found = [
        (record.levelname, record.getMessage().split(" error=")[0]) for record in caplog.records
    ]
    advise = ("WARNING", "cudaMemAdvise refused device=1")
    assert found == [advise, advise, ("WARNING", "cudaMemPrefetchAsync refused device=1")]
    assert all("101" in record.getMessage() for record in caplog.records)


def test_what_is_granted_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    home = UnifiedHome(device_of(), Runtime())
    home.keep(0x7000, 0x3000)
    home.recall(0x7000, 0x3000)
    assert not caplog.records


# ---- what has strayed


def maps(folder: Path, text: str) -> Path:
    path = folder / "numa_maps"
    path.write_text(text, encoding="ascii")
    return path


def test_bytes_on_the_devices_node_have_strayed(tmp_path: Path) -> None:
    text = "7000 bind:0 anon=9 dirty=9 N0=5 N1=3 N10=1 kernelpagesize_kB=64\n"
    for node, pages in ((1, 3), (10, 1), (0, 5), (2, 0)):
        device = device_of(memory_node=node)
        home = UnifiedHome(device, Runtime(), numa_maps=maps(tmp_path, text))
        assert home.strayed_bytes(0x7000, 0x1000) == pages << 16
        assert home.strayed_bytes(0x8000, 0x1000) == 0


def test_nothing_is_known_to_stray_where_the_system_does_not_say(tmp_path: Path) -> None:
    gone = UnifiedHome(device_of(), Runtime(), numa_maps=tmp_path / "none")
    assert gone.strayed_bytes(0x7000, 0x1000) == 0
    text = "7000 bind:0 anon=9 dirty=9 N0=5 N1=4 kernelpagesize_kB=4\n"
    no_node = device_of(memory_node=None)
    assert (
        UnifiedHome(no_node, Runtime(), numa_maps=maps(tmp_path, text)).strayed_bytes(
            0x7000, 0x1000
        )
        == 0
    )


def test_looking_for_strays_asks_cuda_nothing(tmp_path: Path) -> None:
    runtime = Runtime()
    UnifiedHome(device_of(), runtime, numa_maps=maps(tmp_path, "")).strayed_bytes(0x7000, 0x1000)
    assert runtime.calls == []


# ---- the arena


class Refuser:
    """A registrar that must not be asked."""

    def host_register(self, address: int, size_bytes: int) -> None:
        raise AssertionError("coherent memory was registered")

    def host_unregister(self, address: int) -> None:
        raise AssertionError("what was never registered was unregistered")


@contextmanager
def arena(home: UnifiedHome | None, pages: int = 10) -> Iterator[HostTier]:
    tier = HostTier(PLAN, pages=pages, registrar=Refuser(), home=home, hugepages="off")
    tier.open()
    yield tier
    tier.close()


def test_an_arena_with_a_home_is_registered_nowhere_and_pinned_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pinned for whoever asks: a kernel may read it and a copy may be queued, at once."""
    monkeypatch.setattr(host_module, "_REGION_BYTES", 3 * PLAN.warm_page_bytes)
    runtime = Runtime()
    with arena(UnifiedHome(device_of(), runtime)) as tier:
        assert tier.regions(np.arange(10)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
        assert tier.pinned_pages == 10
        tier.wait_until_registered()
        assert [call[1:3] for call in runtime.calls] == [
            (tier.pages.ctypes.data, tier.pages.nbytes)
        ] * 2
    assert tier.regions(np.arange(10)).tolist() == [-1] * 10


def test_an_arena_with_a_home_holds_what_is_written() -> None:
    with arena(UnifiedHome(device_of(), Runtime(Error.INVALID_DEVICE))) as tier:
        data = np.random.default_rng(0).integers(0, 256, (3, 1, PLAN.block_layer_bytes), np.uint8)
        tier.write([Span(0, 4, 1, 1)], data)
        out = np.zeros_like(data)
        tier.read([Span(0, 4, 1, 1)], out)
        assert np.array_equal(out, data)


def test_strays_of_an_arena_are_logged_and_recalled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime()
    path = maps(tmp_path, "")
    with arena(UnifiedHome(device_of(), runtime, numa_maps=path)) as tier:
        start = tier.pages.ctypes.data
        path.write_text(f"{start:x} bind:0 anon=10 dirty=10 N0=7 N1=3 kernelpagesize_kB=4\n")
        runtime.calls.clear()
        assert tier.recall_strayed() == 3 * 4096
    assert runtime.calls == [("prefetch", start, 10 * PLAN.warm_page_bytes, 0, "HostNuma", 0)]
    assert "host arena strayed into device memory bytes=12288" in caplog.text


def test_strays_are_looked_for_while_the_arena_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_LOOK_S", 0.005)
    path = maps(tmp_path, "")
    with arena(UnifiedHome(device_of(), Runtime(), numa_maps=path)) as tier:
        start = tier.pages.ctypes.data
        path.write_text(f"{start:x} bind:0 N1=3 kernelpagesize_kB=4\n")
        ends = time.monotonic() + 10
        while tier.recalled_bytes < 2 * 3 * 4096:
            assert time.monotonic() < ends
            time.sleep(0.002)


def test_an_arena_that_is_where_it_belongs_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime()
    path = maps(tmp_path, "")
    with arena(UnifiedHome(device_of(), runtime, numa_maps=path)) as tier:
        start = tier.pages.ctypes.data
        path.write_text(f"{start:x} bind:0 anon=10 dirty=10 N0=10 kernelpagesize_kB=4\n")
        runtime.calls.clear()
        assert tier.recall_strayed() == 0
    assert runtime.calls == []
    assert not caplog.records


def test_an_arena_without_a_home_has_nothing_to_recall() -> None:
    tier = HostTier(PLAN, pages=2, hugepages="off")
    tier.open()
    assert tier.recall_strayed() == 0
    tier.close()


# ---- the arena, by what this kernel says of it: as if its node were a device's


def needs_numa_maps() -> None:
    try:
        Path("/proc/self/numa_maps").read_text()
    except OSError:
        pytest.skip("this kernel has no numa_maps")


#: More than any machine that tests run on has.
NODES = 16
LARGE = PagePlan.of(KVGeometry(layers=2, kv_heads=2, head_dim=64), block_tokens=32)


def test_every_byte_of_an_arena_is_counted_by_this_kernel() -> None:
    """Touched when it opens, so there are no pages that nobody has seen."""
    needs_numa_maps()
    homes = [UnifiedHome(device_of(memory_node=node), Runtime()) for node in range(NODES)]
    tier = HostTier(LARGE, pages=4, home=homes[0])
    tier.open()
    # Or the kernel may join it to a neighbour; see below.
    tier._map.madvise(mmap.MADV_DONTFORK)
    found = sum(home.strayed_bytes(tier.pages.ctypes.data, tier.pages.nbytes) for home in homes)
    size = tier.pages.nbytes
    tier.close()
    assert found == size


def test_an_arena_that_got_huge_pages_for_a_part_is_counted_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`hugepages: auto` ends its advice where it is slow: from there on it is another mapping."""
    needs_numa_maps()
    monkeypatch.setattr(host_module, "_SLOW_CHUNK_S", 0.0)
    monkeypatch.setattr(host_module, "_CHUNK_BYTES", LARGE.warm_page_bytes)
    homes = [UnifiedHome(device_of(memory_node=node), Runtime()) for node in range(NODES)]
    tier = HostTier(LARGE, pages=6, home=homes[0], hugepages="auto", threads=1)
    tier.open()
    found = sum(home.strayed_bytes(tier.pages.ctypes.data, tier.pages.nbytes) for home in homes)
    size = tier.pages.nbytes
    tier.close()
    assert found == size


def test_arenas_that_lie_side_by_side_are_counted_each_for_itself() -> None:
    """Two stores in a process: mappings are laid below one another, with the same advice."""
    needs_numa_maps()
    homes = [UnifiedHome(device_of(memory_node=node), Runtime()) for node in range(NODES)]
    tiers = [HostTier(LARGE, pages=4, home=homes[0], hugepages="off") for _ in range(6)]
    for tier in tiers:
        tier.open()
    found = [
        sum(home.strayed_bytes(tier.pages.ctypes.data, tier.pages.nbytes) for home in homes)
        for tier in tiers
    ]
    size = tiers[0].pages.nbytes
    for tier in tiers:
        tier.close()
    assert found == [size] * 6


# ---- NVIDIA's own bindings


def test_the_runtime_here_has_the_shape_of_the_real_one() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    for kind in ("cudaMemoryAdvise", "cudaMemLocationType"):
        for member in getattr(Runtime, kind):
            assert int(getattr(getattr(real, kind), member.name)) == member
    location = real.cudaMemLocation()
    assert (int(location.id), location.type) == (0, 0)


def test_calls_are_accepted_up_to_the_driver(caplog: pytest.LogCaptureFixture) -> None:
    """Types and counts of arguments are checked first; only then is the driver missing."""
    real = pytest.importorskip("cuda.bindings.runtime")
    if Driver.load() is not None:
        pytest.skip("there is a driver, and these addresses would reach it")
    caplog.set_level(logging.WARNING)
    memory = np.zeros(1 << 16, np.uint8)
    for node in (0, None):
        home = UnifiedHome(device_of(host_node=node), real)
        home.keep(memory.ctypes.data, memory.nbytes)
        home.recall(memory.ctypes.data, memory.nbytes)
    assert len(caplog.records) == 10
    lacking = real.cudaError_t.cudaErrorInsufficientDriver
    assert all(str(lacking) in record.getMessage() for record in caplog.records)


def test_an_arena_opens_with_the_real_bindings_whatever_they_answer() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    if Driver.load() is not None:
        pytest.skip("there is a driver, and it has no such device")
    with arena(unified_home(device_of())) as tier:
        assert tier.pinned_pages == 10
        assert tier.recall_strayed() == 0
