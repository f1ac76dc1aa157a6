"""The slab of hot pages: what others see of it without a copy, and who cannot have it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tierkv.core.errors import TierFailed  # noqa: E402
from tierkv.core.geometry import KVGeometry, PagePlan, PageTargets  # noqa: E402
from tierkv.core.tier import Span  # noqa: E402
from tierkv.kernels.driver import Driver  # noqa: E402
from tierkv.tiers import slab as slab_module  # noqa: E402
from tierkv.tiers.device import DeviceTier  # noqa: E402
from tierkv.tiers.slab import MappedSlab, SlabHandle, allocate_slab, export_slab  # noqa: E402

CPU = torch.device("cpu")
PLAN = PagePlan.of(
    KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16"),
    block_tokens=4,
    targets=PageTargets(hot_bytes=256, warm_bytes=16 << 10, cold_bytes=64 << 10),
)


@pytest.fixture
def tier() -> Iterator[DeviceTier]:
    made = DeviceTier(PLAN, frames=5, device="cpu")
    made.open()
    yield made
    made.close()


# ---- memory


@given(pages=st.integers(0, 50), page_bytes=st.sampled_from([1, 16, 48, 256, 4096, 16 << 10]))
def test_a_slab_is_zeroed_bytes_in_rows_of_pages(pages: int, page_bytes: int) -> None:
    slab = allocate_slab(pages, page_bytes, CPU)
    assert (slab.shape, slab.dtype, slab.device) == ((pages, page_bytes), torch.uint8, CPU)
    assert slab.is_contiguous()
    assert not slab.any()


def test_memory_that_is_used_again_is_zeroed_again() -> None:
    """Pages of another tenant may have lain there."""
    for _ in range(4):
        slab = allocate_slab(64, 4096, CPU)
        assert not slab.any()
        slab.fill_(255)
        del slab


def test_two_slabs_share_no_byte() -> None:
    one, two = (allocate_slab(4, 256, CPU) for _ in range(2))
    one.fill_(1)
    assert not two.any()


def test_memory_that_does_not_fit_is_a_runtime_error_and_the_tier_names_the_cure() -> None:
    with pytest.raises(RuntimeError):
        allocate_slab(1 << 40, 1 << 20, CPU)
    tier = DeviceTier(PLAN, frames=1 << 50, device="cpu")
    with pytest.raises(TierFailed, match=r"lower tiers\.device\.capacity"):
        tier.open()


def test_the_tiers_slab_has_all_pages_of_its_frames(tier: DeviceTier) -> None:
    assert tier.pool.shape == (5 * PLAN.hot_pages_per_block, PLAN.hot_page_bytes)
    assert tier.pool.numel() == 5 * PLAN.block_bytes
    assert not tier.pool.any()


# ---- DLPack


def block_of(value: int) -> npt.NDArray[np.uint8]:
    return np.full((PLAN.layers, 1, PLAN.block_layer_bytes), value, np.uint8)


def test_numpy_sees_the_slab_itself_by_dlpack(tier: DeviceTier) -> None:
    seen = np.from_dlpack(tier.pool)
    assert seen.ctypes.data == tier.pool.data_ptr()
    assert (seen.shape, seen.dtype) == (tuple(tier.pool.shape), np.uint8)
    tier.write([Span(0, 3, 0, 1)], block_of(9))
    each = PLAN.hot_pages_per_block
    assert np.all(seen[3 * each : 4 * each] == 9)
    assert not seen[: 3 * each].any()


def test_what_another_library_writes_by_dlpack_is_read_by_the_tier(tier: DeviceTier) -> None:
    seen = torch.from_dlpack(tier.pool)
    assert seen.data_ptr() == tier.pool.data_ptr()
    each = PLAN.hot_pages_per_block
    seen[each : 2 * each] = 5
    out = block_of(0)
    tier.read([Span(0, 1, 0, 1)], out)
    assert np.array_equal(out, block_of(5))


@pytest.mark.parametrize("through", ["numpy", "torch"])
def test_there_and_back_again_is_still_the_same_memory(tier: DeviceTier, through: str) -> None:
    there = np.from_dlpack(tier.pool) if through == "numpy" else torch.from_dlpack(tier.pool)
    back = torch.from_dlpack(there)
    back[2, 1] = 77
    assert back.data_ptr() == tier.pool.data_ptr()
    assert int(tier.pool[2, 1]) == 77


def test_memory_of_a_foreign_array_can_be_what_the_tier_copies_from(tier: DeviceTier) -> None:
    """An engine's blocks arrive by DLPack and go in as they are."""
    foreign = np.random.default_rng(0).integers(0, 256, block_of(0).shape, np.uint8)
    seen = torch.from_dlpack(foreign)
    assert seen.data_ptr() == foreign.ctypes.data
    tier.write([Span(0, 4, 0, 1)], seen)
    out = block_of(0)
    tier.read([Span(0, 4, 0, 1)], torch.from_dlpack(out))
    assert np.array_equal(out, foreign)


def test_one_frame_can_be_handed_on_alone(tier: DeviceTier) -> None:
    each = PLAN.hot_pages_per_block
    frame = np.from_dlpack(tier.pool[each : 2 * each])
    frame[:] = 3
    assert [int(n) for n in tier.pool.reshape(5, -1).unique(dim=1)[:, 0]] == [0, 3, 0, 0, 0]


def test_an_array_that_was_handed_on_outlives_the_tier() -> None:
    tier = DeviceTier(PLAN, frames=2, device="cpu")
    tier.open()
    seen = np.from_dlpack(tier.pool)
    seen[:] = 4
    tier.close()
    assert not hasattr(tier, "pool")
    assert np.all(seen == 4)


# ---- between processes


HANDLE = SlabHandle(bytes(range(64)), pages=6, page_bytes=256, card="c4fe")


def test_a_slab_in_host_memory_is_refused_with_what_it_needs(tier: DeviceTier) -> None:
    with pytest.raises(TierFailed, match="memory of cpu cannot be shared") as caught:
        tier.share()
    assert "needs a CUDA device and CuPy (pip install 'tierkv-offload[gpu]')" in str(caught.value)


def test_host_memory_is_refused_on_a_machine_that_has_devices_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with installed(Card(["c4fe"]), Runtime(), monkeypatch), pytest.raises(TierFailed, match="cpu"):
        export_slab(allocate_slab(2, 256, CPU))


def test_a_slab_cannot_be_mapped_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "load", lambda: None)
    with pytest.raises(TierFailed, match="mapping a slab needs a CUDA device and CuPy"):
        MappedSlab(HANDLE)


def test_a_slab_cannot_be_mapped_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "load", lambda: Card(["c4fe"]))
    monkeypatch.setattr(slab_module, "find_spec", lambda _name: None)
    with pytest.raises(TierFailed, match="mapping a slab needs a CUDA device and CuPy"):
        MappedSlab(HANDLE)


def test_a_handle_is_plain_values() -> None:
    """So that it can be sent in any form; sizes are those of the slab, not of a process."""
    assert SlabHandle(HANDLE.handle, 6, 256, "c4fe") == HANDLE
    assert [type(getattr(HANDLE, name)) for name in HANDLE.__slots__] == [bytes, int, int, str]


@dataclass
class Card:
    """Stands in for NVIDIA's driver: the cards this process sees, by their names."""

    cards: list[str]

    def device_count(self) -> int:
        return len(self.cards)

    def uuid(self, device: int) -> str:
        return self.cards[device]


@dataclass
class Runtime:
    """Stands in for CuPy's runtime: another process's memory is an array here."""

    memory: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(6 * 256, np.uint8))
    current: int = 0
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def ipcOpenMemHandle(self, handle: bytes) -> int:  # noqa: N802
        self.calls.append(("open", handle, self.current))
        return self.memory.ctypes.data

    def ipcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        self.calls.append(("close", address, self.current))

    @contextmanager
    def device(self, number: int) -> Iterator[None]:
        before, self.current = self.current, number
        yield
        self.current = before

    @property
    def module(self) -> ModuleType:
        """What `import cupy` gives: arrays at an address, which numpy can hand on by DLPack."""
        made = ModuleType("cupy")
        made.uint8 = np.uint8
        made.cuda = SimpleNamespace(
            Device=self.device,
            runtime=self,
            UnownedMemory=lambda address, size, _owner, device: (address, size, device),
            MemoryPointer=lambda memory, offset: (memory[0] + offset, *memory[1:]),
        )

        def ndarray(
            shape: tuple[int, int], kind: type, pointer: tuple[int, int, int]
        ) -> npt.NDArray[np.uint8]:
            address, size, device = pointer
            assert (kind, device) == (np.uint8, self.current)
            raw = (ctypes.c_uint8 * size).from_address(address)
            return np.frombuffer(raw, np.uint8).reshape(shape)

        made.ndarray = ndarray
        return made


@contextmanager
def installed(card: Card, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Driver, "load", lambda: card)
    monkeypatch.setattr(slab_module, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "cupy", runtime.module)
    yield


def test_a_slab_of_a_card_that_is_not_visible_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    with (
        installed(Card(["beef", "f00d"]), runtime, monkeypatch),
        pytest.raises(TierFailed, match=r"card c4fe.*check CUDA_VISIBLE_DEVICES"),
    ):
        MappedSlab(HANDLE)
    assert runtime.calls == []


@pytest.mark.parametrize("cards", [["c4fe"], ["beef", "f00d", "c4fe"]], ids=["first", "third"])
def test_a_slab_is_mapped_on_the_card_it_lies_on_whatever_its_number_here(
    monkeypatch: pytest.MonkeyPatch, cards: list[str]
) -> None:
    runtime = Runtime()
    number = cards.index("c4fe")
    with installed(Card(cards), runtime, monkeypatch):
        with MappedSlab(HANDLE) as slab:
            assert tuple(slab.pages.shape) == (6, 256)
            slab.pages[2] = 8  # what one process writes, the other reads
            assert np.all(runtime.memory.reshape(6, 256)[2] == 8)
            runtime.memory[:] = 3
            assert bool((slab.pages == 3).all())
        assert not hasattr(slab, "pages")
    opened = ("open", HANDLE.handle, number)
    assert runtime.calls == [opened, ("close", runtime.memory.ctypes.data, number)]
    assert runtime.current == 0


def test_a_slab_is_unmapped_when_its_reader_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    with (
        installed(Card(["c4fe"]), runtime, monkeypatch),
        pytest.raises(ValueError, match="the reader's own"),
        MappedSlab(HANDLE),
    ):
        raise ValueError("the reader's own")
    assert [call[0] for call in runtime.calls] == ["open", "close"]


def test_closing_twice_unmaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the address may be another mapping's."""
    runtime = Runtime()
    with installed(Card(["c4fe"]), runtime, monkeypatch):
        slab = MappedSlab(HANDLE)
        slab.close()
        slab.close()
    assert [call[0] for call in runtime.calls] == ["open", "close"]


def test_a_slab_that_cannot_be_shown_is_unmapped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    with installed(Card(["c4fe"]), runtime, monkeypatch):
        monkeypatch.setattr(sys.modules["cupy"], "ndarray", SimpleNamespace)  # takes no such thing
        with pytest.raises(TypeError):
            MappedSlab(HANDLE)
    assert [call[0] for call in runtime.calls] == ["open", "close"]
