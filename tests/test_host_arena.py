"""The arena of warm pages as it grows: pinned in the background, and on the right NUMA node."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv import assembly
from tierkv.config import Config
from tierkv.core.errors import TierFailed
from tierkv.core.geometry import GIB, MIB, KVGeometry, PagePlan, PageTargets
from tierkv.core.tier import Span
from tierkv.kernels.driver import Driver
from tierkv.tiers import host as host_module
from tierkv.tiers import numa
from tierkv.tiers.accelerator import Accelerator, HostLink, home_node
from tierkv.tiers.host import HostTier

GEOMETRY = KVGeometry(layers=3, kv_heads=1, head_dim=16, dtype="float32")
PLAN = PagePlan.of(
    GEOMETRY,
    block_tokens=2,
    targets=PageTargets(hot_bytes=128, warm_bytes=4096, cold_bytes=8192),
)
PAGE = PLAN.warm_page_bytes
#: As the module has it; most tests make it smaller.
REGION_BYTES = host_module._REGION_BYTES
#: Nothing here takes that long, unless it never comes.
SECONDS = 10.0


class Pinner:
    """Stands in for the CUDA driver: knows what is pinned, and pins when it is let.

    Call it to let it pin that many regions more; `let` None means as many as it is asked for.
    `refuses` gets how many were asked for before, and a size. With `threads` it goes on when that
    many of them have come.
    """

    def __init__(
        self,
        let: int | None = None,
        *,
        refuses: Callable[[int, int], bool] = lambda _number, _size: False,
        threads: int = 1,
    ) -> None:
        self.asked: list[tuple[int, int]] = []
        self.pinned: dict[int, int] = {}
        self.unpinned: list[int] = []
        self.names: set[str] = set()
        self._refuses = refuses
        self._gate = None if let is None else threading.Semaphore(let)
        self._meeting = threading.Barrier(threads) if threads > 1 else None
        self._turn = threading.Lock()

    def __call__(self, count: int) -> None:
        assert self._gate is not None
        self._gate.release(count)

    def host_register(self, address: int, size_bytes: int) -> None:
        with self._turn:
            number = len(self.asked)
            self.asked.append((address, size_bytes))
            self.names.add(threading.current_thread().name)
        if self._meeting is not None:
            self._meeting.wait(SECONDS)
        if self._gate is not None:
            assert self._gate.acquire(timeout=SECONDS), "nobody let it go on"
        if self._refuses(number, size_bytes):
            raise RuntimeError("cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY (2)")
        with self._turn:
            assert address not in self.pinned, "a region is pinned once"
            self.pinned[address] = size_bytes

    def host_unregister(self, address: int) -> None:
        with self._turn:
            assert address in self.pinned, "what is not pinned is not unpinned"
            del self.pinned[address]
            self.unpinned.append(address)


@pytest.fixture(autouse=True)
def small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pages each; ten pages are four regions, the last of one page."""
    monkeypatch.setattr(host_module, "_REGION_BYTES", 3 * PAGE)


@contextmanager
def arena(registrar: Pinner | None, *, pages: int = 10, threads: int = 1) -> Iterator[HostTier]:
    tier = HostTier(
        PLAN, pages=pages, registrar=registrar, register_threads=threads, hugepages="off"
    )
    tier.open()
    yield tier
    tier.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread; never for long."""
    tick = threading.Event()
    for _ in range(int(SECONDS * 1000)):
        if condition():
            return
        tick.wait(0.001)
    raise AssertionError("it does not come")


def regions_of(tier: HostTier) -> list[int]:
    found = tier.regions(np.arange(tier.page_count))
    assert found.dtype == np.int64
    return [int(region) for region in found]


def registering() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("tierkv-register")]


# ---- while it grows


def test_an_arena_is_usable_before_any_of_it_is_pinned() -> None:
    pinner = Pinner(0)
    with arena(pinner) as tier:
        until(lambda: len(pinner.asked) == 1)
        assert regions_of(tier) == [-1] * 10
        assert tier.pinned_pages == 0
        data = np.random.default_rng(0).integers(0, 256, (3, 2, PLAN.block_layer_bytes), np.uint8)
        tier.write([Span(0, 0, 1, 1), Span(1, 9, 0, 1)], data)
        out = np.zeros_like(data)
        tier.read([Span(0, 0, 1, 1), Span(1, 9, 0, 1)], out)
        assert np.array_equal(out, data)

        pinner(4)
        tier.wait_until_registered()
        assert regions_of(tier) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
        assert tier.pinned_pages == 10
        tier.read([Span(0, 0, 1, 1), Span(1, 9, 0, 1)], out)
        assert np.array_equal(out, data)


def test_the_thread_that_opens_an_arena_pins_nothing_itself() -> None:
    pinner = Pinner()
    with arena(pinner) as tier:
        tier.wait_until_registered()
        assert threading.current_thread().name not in pinner.names
        assert all(name.startswith("tierkv-register") for name in pinner.names)


def test_regions_are_pinned_one_after_another_and_stay_pinned() -> None:
    pinner = Pinner(0)
    whole = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    with arena(pinner) as tier:
        for pages in (3, 6, 9, 10):
            pinner(1)
            until(lambda pages=pages: tier.pinned_pages >= pages)
            assert regions_of(tier) == whole[:pages] + [-1] * (10 - pages)
        tier.wait_until_registered()
        assert len(pinner.asked) == 4


def test_regions_are_told_for_any_pages_in_any_order() -> None:
    pinner = Pinner(2)
    with arena(pinner) as tier:
        until(lambda: tier.pinned_pages == 6)
        assert tier.regions(np.array([9, 5, 0, 5, 6])).tolist() == [-1, 1, 0, 1, -1]
        assert tier.regions(np.zeros(0, np.int64)).tolist() == []
        pinner(2)


def test_without_a_registrar_nothing_is_ever_pinned() -> None:
    with arena(None) as tier:
        tier.wait_until_registered()
        assert regions_of(tier) == [-1] * 10
        assert tier.pinned_pages == 0


# ---- refusals


def test_the_first_refusal_ends_it_and_the_rest_stays_pageable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pinner = Pinner(refuses=lambda number, _: number == 2)
    with arena(pinner) as tier:
        tier.wait_until_registered()
        assert regions_of(tier) == [0, 0, 0, 1, 1, 1, -1, -1, -1, -1]
        assert tier.pinned_pages == 6
        assert len(pinner.asked) == 3, "after a refusal nobody is asked again"
        start = tier.pages.ctypes.data
        data = np.full((3, 1, PLAN.block_layer_bytes), 9, np.uint8)
        tier.write([Span(0, 9, 0, 1)], data)
        assert np.all(tier.blocks[9, :, 0] == 9)
    assert "pinning ended early region=2" in caplog.text
    assert "CUDA_ERROR_OUT_OF_MEMORY" in caplog.text
    assert pinner.unpinned == [start, start + 3 * PAGE]
    assert pinner.pinned == {}


def test_a_driver_that_refuses_at_once_leaves_plain_memory() -> None:
    pinner = Pinner(refuses=lambda number, _: number == 0)
    with arena(pinner) as tier:
        tier.wait_until_registered()
        assert regions_of(tier) == [-1] * 10
    assert (len(pinner.asked), pinner.unpinned) == (1, [])


def test_a_region_that_cannot_be_given_back_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pinner = Pinner()
    undo = pinner.host_unregister

    def unregister(address: int) -> None:
        undo(address)
        if len(pinner.unpinned) == 2:
            raise RuntimeError("cuMemHostUnregister: CUDA_ERROR_DEINITIALIZED (4)")

    monkeypatch.setattr(pinner, "host_unregister", unregister)
    with arena(pinner) as tier:
        tier.wait_until_registered()
    assert len(pinner.unpinned) == 4
    assert caplog.text.count("unregister failed") == 1


# ---- the end


def test_closing_meanwhile_waits_for_the_region_under_way_and_undoes_what_was_done() -> None:
    pinner = Pinner(1)
    tier = HostTier(PLAN, pages=10, registrar=pinner, hugepages="off")
    tier.open()
    start = tier.pages.ctypes.data
    until(lambda: len(pinner.asked) == 2)
    closing = threading.Thread(target=tier.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "memory was given back while the driver was at it"
    assert pinner.unpinned == []

    pinner(1)
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert pinner.asked == [(start, 3 * PAGE), (start + 3 * PAGE, 3 * PAGE)]
    assert pinner.unpinned == [start, start + 3 * PAGE]
    assert registering() == []


def test_a_closed_arena_is_pinned_nowhere_and_closing_again_is_nothing() -> None:
    pinner = Pinner()
    with arena(pinner) as tier:
        tier.wait_until_registered()
    assert regions_of(tier) == [-1] * 10
    assert tier.pinned_pages == 0
    tier.close()
    assert len(pinner.unpinned) == 4


def test_memory_is_unpinned_before_it_is_unmapped_even_where_a_reader_holds_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pinner = Pinner()
    with arena(pinner) as tier:
        tier.wait_until_registered()
        view = tier.blocks[2]
    assert pinner.pinned == {}
    assert "views of it are alive" in caplog.text
    assert not view.any()


def test_an_arena_that_cannot_be_mapped_names_the_cure_and_pins_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_module, "_REGION_BYTES", REGION_BYTES)
    pinner = Pinner()
    tier = HostTier(PLAN, pages=1 << 38, registrar=pinner, hugepages="off")
    with pytest.raises(TierFailed, match=r"lower tiers\.host\.capacity"):
        tier.open()
    tier.close()
    assert (pinner.asked, registering()) == ([], [])


# ---- several threads


def test_several_threads_pin_every_region_exactly_once() -> None:
    """They meet inside the driver, four at a time: so they are at work together."""
    pinner = Pinner(threads=4)
    with arena(pinner, pages=36, threads=4) as tier:
        tier.wait_until_registered()
        assert tier.pinned_pages == 36
        start = tier.pages.ctypes.data
        assert sorted(pinner.asked) == [(start + n * 3 * PAGE, 3 * PAGE) for n in range(12)]
        assert len(pinner.names) == 4
    assert sorted(pinner.unpinned) == sorted(address for address, _ in pinner.asked)
    assert registering() == []


@given(
    pages=st.integers(1, 40),
    threads=st.integers(1, 5),
    refused=st.frozensets(st.integers(0, 14), max_size=3),
    early=st.booleans(),
)
def test_what_was_pinned_is_unpinned_and_nothing_else(
    pages: int, threads: int, refused: frozenset[int], early: bool
) -> None:
    pinner = Pinner(refuses=lambda number, _: number in refused)
    with arena(pinner, pages=pages, threads=threads) as tier:
        if not early:
            tier.wait_until_registered()
            start = tier.pages.ctypes.data
            found = {start + 3 * PAGE * region for region in regions_of(tier) if region >= 0}
            assert found == pinner.pinned.keys()
            if not refused:
                assert sum(pinner.pinned.values()) == tier.pages.nbytes
    assert pinner.pinned == {}
    assert len(set(pinner.asked)) == len(pinner.asked)


def test_pinned_pages_are_counted_where_the_short_region_is_pinned_and_another_is_not() -> None:
    """Two threads, and the third of four regions is refused: 3 + 3 + 1 pages are pinned."""
    pinner = Pinner(threads=2, refuses=lambda number, size: number >= 2 and size == 3 * PAGE)
    with arena(pinner, threads=2) as tier:
        tier.wait_until_registered()
        assert tier.pinned_pages == sum(region >= 0 for region in regions_of(tier))


# ---- regions


@given(page=st.integers(1, 24), pages=st.integers(1, 60), region=st.integers(1, 40))
def test_regions_are_whole_pages_side_by_side_from_end_to_end(
    page: int, pages: int, region: int
) -> None:
    """Sizes in steps of 4 KiB: pages larger than a region are regions of their own."""
    step = 4096
    plan = PagePlan.of(
        GEOMETRY, block_tokens=2,
        targets=PageTargets(hot_bytes=128, warm_bytes=page * step, cold_bytes=1 << 20),
    )  # fmt: skip
    assert plan.warm_page_bytes <= page * step
    pinner = Pinner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_module, "_REGION_BYTES", region * step)
        tier = HostTier(plan, pages=pages, registrar=pinner, hugepages="off", threads=1)
    tier.open()
    tier.wait_until_registered()
    start, size = tier.pages.ctypes.data, tier.pages.nbytes
    for address, count in pinner.asked:
        assert address == start
        assert count % plan.warm_page_bytes == 0
        assert count <= max(region * step, plan.warm_page_bytes)
        start += count
    assert start == tier.pages.ctypes.data + size
    starts = [address for address, _ in pinner.asked]
    for number, found in enumerate(regions_of(tier)):
        address = tier.pages[number].ctypes.data
        assert starts[found] <= address < starts[found] + pinner.asked[found][1]
    tier.close()


@given(
    warm=st.integers(4096, 512 * MIB),
    layers=st.integers(1, 80),
    heads=st.integers(1, 32),
    pages=st.integers(1, 1 << 22),
)
def test_no_region_of_a_real_arena_is_larger_than_one_gib(
    warm: int, layers: int, heads: int, pages: int
) -> None:
    """A huge registration can fail (vllm #51080). Not opened: some of these are terabytes."""
    geometry = KVGeometry(layers=layers, kv_heads=heads, head_dim=128)
    plan = PagePlan.of(geometry, targets=PageTargets(warm_bytes=warm))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_module, "_REGION_BYTES", REGION_BYTES)
        tier = HostTier(plan, pages=pages)
    tier._base = 0
    count = len(tier._is_pinned)
    for number in {0, 1 % count, count // 2, count - 1}:
        address, size = tier._region(number)
        assert 0 < size <= GIB
        assert address % plan.warm_page_bytes == size % plan.warm_page_bytes == 0
    address, size = tier._region(count - 1)
    assert address + size == pages * plan.warm_page_bytes


# ---- the node that it is on


@dataclass
class Kernel:
    """Stands in for libc in the `numa` module: records `mbind`, and is ctypes for the rest."""

    refuses: bool = False
    calls: list[list[int | list[int]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(ctypes, name)

    def CDLL(self, name: None, *, use_errno: bool) -> Kernel:  # noqa: N802
        assert use_errno, "or a refusal has no reason"
        return self

    def syscall(self, *arguments: object) -> int:
        """Number, address, size, mode, mask, bits and flags."""
        self.calls.append([getattr(one, "value", None) or list_of(one) for one in arguments])
        return -1 if self.refuses else 0

    @property
    def nodes(self) -> list[int]:
        """The node of every mapping that was bound."""
        return [node_of(mask) for _, _, _, _, mask, *_ in self.calls]


def list_of(value: object) -> int | list[int]:
    """A mask's words; 0 for a number that is 0."""
    return list(value) if isinstance(value, ctypes.Array) else 0


def node_of(mask: list[int]) -> int:
    bits = sum(word << 64 * n for n, word in enumerate(mask))
    assert bits.bit_count() == 1, "a mapping is bound to one node"
    return bits.bit_length() - 1


@given(node=st.integers(0, 1023), machine=st.sampled_from([("x86_64", 237), ("aarch64", 235)]))
def test_a_mapping_is_bound_to_exactly_one_node(node: int, machine: tuple[str, int]) -> None:
    kernel = Kernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numa, "ctypes", kernel)
        patch.setattr(platform, "machine", lambda: machine[0])
        assert numa.bind(1 << 30, 1 << 20, node)
    ((number, address, size, mode, mask, bits, flags),) = kernel.calls
    assert (number, address, size, flags) == (machine[1], 1 << 30, 1 << 20, 0)
    assert mode == 2  # MPOL_BIND
    assert node_of(mask) == node
    assert node < bits - 1 <= 64 * len(mask)  # the kernel takes one bit less than it is told


def test_a_refused_binding_is_logged_and_the_arena_opens_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numa, "ctypes", Kernel(refuses=True))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    tier = HostTier(PLAN, pages=2, node=3, hugepages="off")
    tier.open()
    assert "numa bind refused node=3" in caplog.text
    assert not tier.pages.any()
    tier.close()


def test_a_processor_whose_call_is_not_known_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(numa, "ctypes", kernel)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not numa.bind(4096, 4096, 0)
    assert kernel.calls == []


@dataclass
class Box:
    """Stands in for NVIDIA's driver on a machine with devices; knows for which of them it pins."""

    nodes: Path
    devices: list[Accelerator]
    pinners: dict[int, Pinner] = field(default_factory=dict)

    def registrar(self, device: int) -> Pinner:
        return self.pinners.setdefault(device, Pinner())

    @property
    def pinned(self) -> dict[int, int]:
        """Bytes by device."""
        found = {device: sum(one.pinned.values()) for device, one in self.pinners.items()}
        return {device: size for device, size in found.items() if size}


def box_of(root: Path, link: HostLink, *own: int | None) -> Box:
    """Two sockets, devices behind each in equal parts, with these nodes for their own memory."""
    for node, cpus in [(0, "0-55"), (1, "56-111"), *((one, "") for one in own if one is not None)]:
        (root / f"node{node}").mkdir()
        (root / f"node{node}" / "cpulist").write_text(f"{cpus}\n")
    devices = [
        Accelerator(n, "H100", f"{n}", f"0000:{n:02x}:00.0", 80 * GIB, link, node, memory)
        for n, memory in enumerate(own)
        for node in [2 * n // len(own)]
    ]
    return Box(root, devices)


@pytest.fixture
def dgx(tmp_path: Path) -> Box:
    """Eight devices on PCIe; test_accelerator.py has how they are found."""
    return box_of(tmp_path, HostLink.PINNED, *[None] * 8)


@pytest.fixture
def blackwell(tmp_path: Path) -> Box:
    return box_of(tmp_path, HostLink.COHERENT, 2, 10, 18, 26)


@contextmanager
def assembled(
    box: Box, device: str, monkeypatch: pytest.MonkeyPatch, **host: object
) -> Iterator[tuple[HostTier, Kernel]]:
    """The arena that a store would have on this machine, and what the kernel was asked for it."""
    kernel = Kernel()
    monkeypatch.setattr(numa, "ctypes", kernel)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(assembly, "accelerators", lambda: box.devices)
    monkeypatch.setattr(assembly, "home_node", partial(home_node, nodes=box.nodes))
    monkeypatch.setattr(Driver, "load", lambda: box)
    settings = {"capacity": "512KiB", "hugepages": "off", **host}
    config = Config.model_validate({"tiers": {"host": settings, "device": {"device": device}}})
    tier = assembly._host(config, PLAN, 10)
    tier.open()
    tier.wait_until_registered()
    yield tier, kernel
    tier.close()


@pytest.mark.parametrize(
    ("device", "node"), [("cuda:0", 0), ("cuda:3", 0), ("cuda:4", 1), ("cuda:7", 1), ("auto", 0)]
)
def test_an_arena_lies_on_the_node_of_its_device_and_is_pinned_for_it(
    dgx: Box, monkeypatch: pytest.MonkeyPatch, device: str, node: int
) -> None:
    with assembled(dgx, device, monkeypatch) as (tier, kernel):
        assert kernel.nodes == [node]
        assert kernel.calls[0][1:3] == [tier.pages.ctypes.data, tier.pages.nbytes]
        assert dgx.pinned == {int(device.partition(":")[2] or 0): tier.pages.nbytes}
    assert dgx.pinned == {}


@pytest.mark.parametrize(("setting", "nodes"), [("off", []), (0, [0]), (1, [1])])
def test_a_node_that_is_configured_goes_before_the_devices(
    dgx: Box, monkeypatch: pytest.MonkeyPatch, setting: object, nodes: list[int]
) -> None:
    with assembled(dgx, "cuda:5", monkeypatch, numa=setting) as (_, kernel):
        assert kernel.nodes == nodes


def test_where_pinning_is_switched_off_the_node_is_still_the_devices(
    dgx: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with assembled(dgx, "cuda:6", monkeypatch, register_cuda="off") as (tier, kernel):
        assert (dgx.pinned, tier.pinned_pages, kernel.nodes) == ({}, 0, [1])


def test_a_device_that_is_not_there_leaves_plain_memory(
    dgx: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with assembled(dgx, "cuda:8", monkeypatch) as (tier, kernel):
        assert (dgx.pinned, tier.pinned_pages, kernel.nodes) == ({}, 0, [])


def test_as_many_threads_pin_as_are_configured(dgx: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    dgx.pinners[2] = Pinner(threads=2)
    with assembled(dgx, "cuda:2", monkeypatch, register_threads=2) as (tier, _):
        assert tier.pinned_pages == 10
        assert len(dgx.pinners[2].names) == 2


@pytest.mark.parametrize(("device", "node"), [("cuda:1", 0), ("cuda:2", 1)])
def test_an_arena_of_a_coherent_device_lies_on_its_socket_and_is_not_registered(
    blackwell: Box, monkeypatch: pytest.MonkeyPatch, device: str, node: int
) -> None:
    pytest.importorskip("cuda.bindings.runtime")
    with assembled(blackwell, device, monkeypatch) as (tier, kernel):
        assert (blackwell.pinned, tier.pinned_pages, kernel.nodes) == ({}, 10, [node])


def test_a_coherent_device_may_be_told_to_use_pinned_memory(
    blackwell: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with assembled(blackwell, "cuda:2", monkeypatch, unified="off") as (tier, kernel):
        assert (blackwell.pinned, kernel.nodes) == ({2: tier.pages.nbytes}, [1])


def test_a_device_that_is_only_called_cuda_is_the_one_that_torch_has_chosen(
    dgx: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank says `torch.cuda.set_device(rank)` and leaves the configuration as it is."""
    torch = pytest.importorskip("torch")
    for name, value in (("is_available", True), ("is_initialized", True), ("current_device", 6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with assembled(dgx, "cuda", monkeypatch) as (tier, kernel):
        assert (dgx.pinned, kernel.nodes) == ({6: tier.pages.nbytes}, [1])
