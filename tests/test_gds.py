"""GPUDirect Storage as a file engine, with a stand-in for NVIDIA's library."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from tierkv.core.errors import TierFailed
from tierkv.testing.file_engines import FileEngineTests, page_bytes
from tierkv.tiers.files import FILE_ENGINES, choose_engine, gds, is_for_auto
from tierkv.tiers.files.base import FileEngine, address_of, aligned_array
from tierkv.tiers.files.direct import DirectFiles
from tierkv.tiers.files.gds import GdsFiles, library
from tierkv.tiers.files.portable import PortableFiles

PAGE = 4096


class OpError(IntEnum):
    """Some of cuFile's codes."""

    IO_NOT_SUPPORTED = 5008
    HANDLE_ALREADY_REGISTERED = 5014
    DRIVER_ALREADY_OPEN = 5026


class CuFileError(Exception):
    def __init__(self, status: OpError) -> None:
        super().__init__(f"{status.name} ({status.value})")
        self.status = status


REFUSED = CuFileError(OpError.IO_NOT_SUPPORTED)


class Descr:
    """CUfileDescr_t, found by its address as in the library."""

    made: ClassVar[dict[int, Descr]] = {}

    def __init__(self) -> None:
        self.type, self.fs_ops, self.handle = 0, -1, SimpleNamespace(fd=-1)
        self.ptr = id(self)
        self.made[self.ptr] = self


class CuFile:
    """`cuda.bindings.cufile` over preadv and pwritev; device memory is host memory.

    `step` is the most that one call moves. `answer`, once set, is what calls return or raise.
    """

    OpError, Descr, cuFileError = OpError, Descr, CuFileError  # noqa: N815
    FileHandleType = SimpleNamespace(OPAQUE_FD=1)

    def __init__(self) -> None:
        self.step = 1 << 30
        self.answer: Callable[[], int] | None = None
        self.registered: dict[int, int] = {}
        self.registrations = 0
        self.is_open = False
        self.calls: list[tuple[int, int, int]] = []

    def driver_open(self) -> None:
        if self.is_open:
            raise CuFileError(OpError.DRIVER_ALREADY_OPEN)
        self.is_open = True

    def handle_register(self, address: int) -> int:
        assert self.is_open
        description = Descr.made[address]
        assert (description.type, description.fs_ops) == (1, 0)
        fd = description.handle.fd
        os.fstat(fd)
        if fd in self.registered.values():
            raise CuFileError(OpError.HANDLE_ALREADY_REGISTERED)
        self.registrations += 1
        self.registered[self.registrations] = fd
        return self.registrations

    def handle_deregister(self, file: int) -> None:
        os.fstat(self.registered.pop(file))  # the descriptor is still open

    def read(self, file: int, base: int, size: int, offset: int, base_offset: int) -> int:
        self.calls.append((size, offset, base_offset))
        if self.answer is not None:
            return self.answer()
        bounce = aligned_array(-(-min(size, self.step) // PAGE) * PAGE, PAGE)
        moved = min(self.step, os.preadv(self.registered[file], [bounce.data], offset))
        ctypes.memmove(base + base_offset, address_of(bounce), moved)
        return moved

    def write(self, file: int, base: int, size: int, offset: int, base_offset: int) -> int:
        self.calls.append((size, offset, base_offset))
        if self.answer is not None:
            return self.answer()
        moved = min(size, self.step)
        bounce = aligned_array(moved - moved % PAGE, PAGE)
        ctypes.memmove(address_of(bounce), base + base_offset, len(bounce))
        os.pwritev(self.registered[file], [bounce.data], offset)
        return moved


class Runtime:
    """`cuda.bindings.runtime` over host memory; allocations are aligned as badly as CUDA's may."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)  # noqa: N815

    def __init__(self) -> None:
        self.status = 0
        self.held: dict[int, npt.NDArray[np.uint8]] = {}

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        if address:
            del self.held[address]
        return (self.status,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        memory = aligned_array(size + 256, PAGE)[256:]
        self.held[address_of(memory)] = memory
        return (0, address_of(memory))

    def cudaMemcpy(self, to: int, source: int, size: int, kind: int) -> tuple[int]:  # noqa: N802
        assert kind == self.cudaMemcpyKind.cudaMemcpyDefault
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaDeviceSynchronize(self) -> tuple[int]:  # noqa: N802
        return (0,)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The two modules that the engine finds instead of NVIDIA's."""
    found = SimpleNamespace(cufile=CuFile(), runtime=Runtime())
    monkeypatch.setattr(gds, "library", lambda name: getattr(found, name))
    monkeypatch.setattr(Descr, "made", {})
    return found


@pytest.fixture
def files(tmp_path: Path) -> Iterator[GdsFiles]:
    engine = gds_or_skip(tmp_path / "root")
    yield engine
    engine.shutdown()


def gds_or_skip(root: Path) -> GdsFiles:
    reason = DirectFiles.probe(root)
    if reason is not None:
        pytest.skip(reason)
    return GdsFiles(root)


class TestGdsFiles(FileEngineTests):
    def make(self, root: Path) -> FileEngine:
        return gds_or_skip(root)


@pytest.mark.parametrize("step", [PAGE, 3 * PAGE, 2 * PAGE + 512, 1 << 30])
@pytest.mark.parametrize("offset", [0, 5 * PAGE])
def test_device_memory_goes_to_the_file_and_back_in_any_steps(
    files: GdsFiles, cuda: SimpleNamespace, step: int, offset: int
) -> None:
    cuda.cufile.step = step
    handle = files.open("a", create=True)
    data, found = page_bytes(1, size=7 * PAGE), aligned_array(9 * PAGE, PAGE)
    files.write_device(handle, offset, address_of(data), len(data))
    files.read_device(handle, offset, address_of(found[PAGE:]), len(data))
    assert bytes(found) == bytes(PAGE) + bytes(data) + bytes(PAGE)
    assert files.size(handle) == offset + len(data)


def test_device_and_host_see_the_same_file(files: GdsFiles) -> None:
    handle = files.open("a", create=True)
    first, second, found = page_bytes(1), page_bytes(2), page_bytes(3)
    files.write(handle, 0, [first.data])
    files.read_device(handle, 0, address_of(found), len(found))
    assert bytes(found) == bytes(first)
    files.write_device(handle, 0, address_of(second), len(second))
    files.read(handle, 0, [found.data])
    assert bytes(found) == bytes(second)


@pytest.mark.parametrize("size", [0, PAGE, 5 * PAGE])
def test_reading_device_memory_past_the_end_is_an_error(files: GdsFiles, size: int) -> None:
    handle = files.open("a", create=True)
    files.write(handle, 0, [page_bytes(3, size=size).data])
    found = aligned_array(6 * PAGE, PAGE)
    with pytest.raises(OSError, match="end of file") as caught:
        files.read_device(handle, 0, address_of(found), len(found))
    assert caught.value.errno == errno.EIO


def _raising(error: Exception) -> Callable[..., int]:
    def answer(*_arguments: object) -> int:
        raise error

    return answer


@pytest.mark.parametrize("verb", ["read_device", "write_device"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: 0, "no progress"),
        (lambda: 100, "cuFile answers 100 for 8192 bytes"),
        (lambda: -5011, "cuFile answers -5011"),
        (lambda: 3 * PAGE, "cuFile answers 12288 for 8192 bytes"),
        (lambda: 2 * PAGE + 1, "cuFile answers 8193"),
        (_raising(REFUSED), "IO_NOT_SUPPORTED"),
        # What cuda.bindings really raises where a transfer sets errno.
        (_raising(ValueError("5 is not a valid OpError")), "5 is not a valid OpError"),
        (_raising(RuntimeError("no libcufile\n")), "no libcufile"),
    ],
    ids=["zero", "short", "negative", "long", "odd", "refused", "errno", "library"],
)
def test_what_cufile_does_not_move_is_an_error_with_the_files_name(
    files: GdsFiles,
    cuda: SimpleNamespace,
    tmp_path: Path,
    verb: str,
    answer: Callable[[], int],
    message: str,
) -> None:
    handle = files.open("a", create=True)
    files.write(handle, 0, [page_bytes(1).data])
    cuda.cufile.answer = answer
    with pytest.raises(OSError, match=message) as caught:
        getattr(files, verb)(handle, PAGE, address_of(page_bytes(2)), 2 * PAGE)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(tmp_path / "root" / "a")


def test_an_error_after_a_short_transfer_is_not_taken_for_the_end(
    files: GdsFiles, cuda: SimpleNamespace
) -> None:
    handle = files.open("a", create=True)
    answers = iter([PAGE, 0])
    cuda.cufile.answer = lambda: next(answers)
    with pytest.raises(OSError, match="at offset 20480: cuFile answers 0 for 8192 bytes"):
        files.write_device(handle, 4 * PAGE, address_of(page_bytes(1)), 3 * PAGE)
    assert cuda.cufile.calls == [(3 * PAGE, 4 * PAGE, 0), (2 * PAGE, 5 * PAGE, PAGE)]


@pytest.mark.parametrize("verb", ["read_device", "write_device"])
@pytest.mark.parametrize("what", ["offset", "address", "size_bytes"])
@pytest.mark.parametrize("by", [512, 1, -PAGE - 512, -100 * PAGE * PAGE])
def test_what_is_not_aligned_is_refused_with_its_name(
    files: GdsFiles, cuda: SimpleNamespace, verb: str, what: str, by: int
) -> None:
    handle = files.open("a", create=True)
    numbers = {"offset": PAGE, "address": 1000 * PAGE, "size_bytes": PAGE}
    numbers[what] += by
    with pytest.raises(ValueError, match=f"{what} must be a multiple of 4096.*got {numbers[what]}"):
        getattr(files, verb)(handle, **numbers)
    assert cuda.cufile.calls == []
    assert not cuda.cufile.registered


def test_a_handle_is_registered_once_and_only_for_device_memory(
    files: GdsFiles, cuda: SimpleNamespace
) -> None:
    handle, other = files.open("a", create=True), files.open("b", create=True)
    data = page_bytes(1, size=64 * PAGE)
    files.write(other, 0, [data.data])
    assert not cuda.cufile.is_open

    def write_page(index: int) -> None:
        files.write_device(handle, index * PAGE, address_of(data[index * PAGE :]), PAGE)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write_page, range(64)))
    assert cuda.cufile.registrations == 1
    found = aligned_array(len(data), PAGE)
    files.read(handle, 0, [found.data])
    assert bytes(found) == bytes(data)


def test_handles_are_deregistered_before_they_close(files: GdsFiles, cuda: SimpleNamespace) -> None:
    handles = [files.open(name, create=True) for name in "abc"]
    data = page_bytes(1)
    for handle in handles:
        files.write_device(handle, 0, address_of(data), len(data))
    assert len(cuda.cufile.registered) == 3
    files.close(handles[1])
    assert len(cuda.cufile.registered) == 2
    with pytest.raises(OSError, match=r"Errno 9\] handle is not open"):
        files.read_device(handles[1], 0, address_of(data), len(data))
    files.shutdown()
    assert not cuda.cufile.registered
    files.shutdown()
    with pytest.raises(OSError, match="not open"):
        files.read_device(handles[0], 0, address_of(data), len(data))


def test_a_file_that_cufile_will_not_let_go_is_closed_all_the_same(
    files: GdsFiles, cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = [files.open(name, create=True) for name in "abc"]
    data = page_bytes(1)
    for handle in handles:
        files.write_device(handle, 0, address_of(data), len(data))
    fds = set(cuda.cufile.registered.values())
    monkeypatch.setattr(cuda.cufile, "handle_deregister", _raising(REFUSED))
    with pytest.raises(OSError, match=r"cannot deregister.*IO_NOT_SUPPORTED.*root/a'"):
        files.close(handles[0])
    with pytest.raises(OSError, match="cannot deregister"):
        files.shutdown()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_without_the_package_device_memory_is_refused_with_the_cure(
    files: GdsFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gds, "library", library)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    handle = files.open("a", create=True)
    with pytest.raises(OSError, match="pip install 'tierkv-offload") as caught:
        files.read_device(handle, 0, 0, PAGE)
    assert caught.value.errno == errno.ENOTSUP
    reason = GdsFiles.probe(tmp_path / "root")
    assert reason.startswith("cuda.bindings is not installed: pip install 'tierkv-offload[gpu]'")
    assert files.names() == ["a"]


def _claims_all(_file: int, _base: int, size: int, _offset: int, _base_offset: int) -> int:
    return size


@pytest.mark.parametrize(
    ("part", "name", "what", "reason"),
    [
        ("cufile", "step", PAGE, None),
        ("cufile", "is_open", True, None),
        ("runtime", "status", 100, "no CUDA device that works: 100"),
        ("cufile", "driver_open", _raising(REFUSED), "driver does not open: IO_NOT_SUPPORTED"),
        ("cufile", "driver_open", _raising(RuntimeError("no\nlib")), "no lib (cure: pip install"),
        ("cufile", "handle_register", _raising(REFUSED), "cuFile cannot register the file"),
        ("cufile", "handle_deregister", _raising(REFUSED), "cuFile cannot deregister the file"),
        ("cufile", "write", _raising(ValueError("5 is")), "cuFile cannot write 65536 bytes"),
        ("cufile", "read", _raising(TypeError("odd")), "fails its probe: TypeError('odd')"),
        ("runtime", "cudaMalloc", lambda _size: (2, None), "cudaMalloc: 2"),
        ("cufile", "read", _claims_all, "read back other bytes"),
        ("cufile", "write", _claims_all, "wrote other bytes"),
        ("cufile", "step", 100, "no progress at offset 0"),
    ],
)
def test_a_probe_says_what_is_wrong_and_leaves_nothing_behind(
    cuda: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    part: str,
    name: str,
    what: object,
    reason: str | None,
) -> None:
    gds_or_skip(tmp_path / "root").shutdown()
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(getattr(cuda, part), name, what)
    found = GdsFiles.probe(tmp_path / "root")
    assert found is None if reason is None else reason in found
    assert list((tmp_path / "root").iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    assert not cuda.runtime.held
    assert capfd.readouterr() == ("", "")


def test_a_probe_asks_for_direct_files_first(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(GdsFiles, "open_flags", 0)
    assert GdsFiles.probe(tmp_path / "root") == "this platform has no O_DIRECT"
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.undo()
    assert "file" in GdsFiles.probe(tmp_path / "file")
    assert not cuda.cufile.is_open


def test_the_scratch_file_is_private(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    modes = []

    def refuse(_address: int) -> int:
        modes.extend(path.stat().st_mode & 0o777 for path in (tmp_path / "root").iterdir())
        raise REFUSED

    gds_or_skip(tmp_path / "root").shutdown()
    monkeypatch.setattr(cuda.cufile, "handle_register", refuse)
    assert GdsFiles.probe(tmp_path / "root") is not None
    assert modes == [0o600]


def test_auto_never_takes_it_though_it_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gds_or_skip(tmp_path / "root").shutdown()
    assert GdsFiles.probe(tmp_path / "root") is None
    with monkeypatch.context() as patch:
        for kind in (DirectFiles, PortableFiles):
            patch.setattr(kind, "probe", classmethod(lambda _cls, _root: "not today"))
        with pytest.raises(TierFailed, match=r"\(direct: not today; portable: not today\)"):
            choose_engine(tmp_path / "root")
    chosen = choose_engine(tmp_path / "root", "gds")
    assert chosen.name == "gds"
    chosen.shutdown()
    kinds = map(FILE_ENGINES.load, FILE_ENGINES)
    assert [kind for kind in kinds if not is_for_auto(kind)] == [GdsFiles]


@pytest.mark.gpu
def test_a_gpus_memory_goes_to_the_file_and_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)  # where cuFile may leave its log
    reason = GdsFiles.probe(tmp_path / "root")
    if reason is not None:
        pytest.skip(reason)
    files = GdsFiles(tmp_path / "root")
    handle = files.open("a", create=True)
    size = 64 << 20
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    found = torch.zeros_like(data)
    torch.cuda.synchronize()
    files.write_device(handle, PAGE, data.data_ptr(), size)
    files.sync(handle)
    files.read_device(handle, PAGE, found.data_ptr(), size)
    assert torch.equal(found, data)
    with pytest.raises(OSError, match="root/a"):
        files.read_device(handle, 2 * PAGE, found.data_ptr(), size)
    files.shutdown()
