"""What `tierkv doctor` finds on machines that the tests do not run on: fixture trees, rates, and
drivers that are tables here or small libraries that are compiled."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tierkv.core.geometry import GIB, MIB
from tierkv.doctor import Finding, State, disk, disk_finding, disk_rates, examine
from tierkv.doctor_hardware import (
    copy_rate,
    cuda,
    device_link,
    gds,
    hardware,
    host_copy,
    host_links,
    huge_pages,
    io_uring,
    memlock,
    numa_map,
    one_device,
    survey,
)
from tierkv.kernels.driver import Attribute, DriverError
from tierkv.tiers.accelerator import Accelerator
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.files.direct import DirectFiles
from tierkv.tiers.files.portable import PortableFiles
from tierkv.transfer.link_profile import SIZES, Direction, LinkProfile, link_profile

GRACE_HOPPER = {
    Attribute.PAGEABLE_MEMORY_ACCESS: 1,
    Attribute.USES_HOST_PAGE_TABLES: 1,
    Attribute.HOST_NUMA_ID: 0,
    Attribute.NUMA_CONFIG: 1,
    Attribute.NUMA_ID: 1,
}


@dataclass
class Table:
    """A driver that shows a device for each table of attributes."""

    devices: Sequence[Mapping[Attribute, int]] = field(default_factory=lambda: [{}])
    version: int = 13020

    def device_count(self) -> int:
        return len(self.devices)

    def attribute(self, attribute: Attribute, device: int) -> int | None:
        return self.devices[device].get(attribute)

    def name(self, device: int) -> str:
        return f"Card {device}"

    def uuid(self, device: int) -> str:
        return f"card{device}"

    def memory_bytes(self, device: int) -> int:
        return 80 * GIB

    def pci_address(self, device: int) -> str:
        return f"0000:{device:02x}:00.0"


def devices_of(*tables: Mapping[Attribute, int], pci: Path = Path("nowhere")) -> list[Accelerator]:
    return list(survey(lambda: Table(tables), pci=pci).devices)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def no_driver() -> None:
    return None


def broken_driver() -> Table:
    raise DriverError("cuInit", 999, "CUDA_ERROR_UNKNOWN")


def old_driver() -> Table:
    raise AttributeError("undefined symbol: cuDeviceGetUuid_v2")


# ---- devices


def test_a_machine_without_a_driver_is_ok_and_has_no_device_findings() -> None:
    found = {finding.name: finding for finding in hardware(None, load=no_driver)}
    assert found["CUDA"].detail == "no driver: the device tier is host memory"
    assert found["ATS"].detail == found["GDS"].detail == "no device"
    assert State.PROBLEM not in {finding.state for finding in found.values()}
    assert not [name for name in found if "device" in name]


@pytest.mark.parametrize(
    ("load", "fault"),
    [
        (broken_driver, "cuInit: CUDA_ERROR_UNKNOWN (999)"),
        (old_driver, "undefined symbol: cuDeviceGetUuid_v2"),
        (lambda: Table([]), "it counts 0 devices"),
    ],
    ids=["broken", "old", "empty"],
)
def test_a_driver_without_a_usable_device_says_why(load: object, fault: str) -> None:
    finding = cuda(survey(load))
    assert finding.state is State.NOTE
    assert finding.detail == f"driver present, no usable device ({fault})"
    assert "nvidia-smi" in finding.cure


def test_the_driver_tells_its_cuda_version_and_counts_its_devices() -> None:
    finding = cuda(survey(lambda: Table([{}, {}])))
    assert (finding.state, finding.detail) == (State.OK, "driver for CUDA 13.2, 2 device(s)")


def test_a_device_is_named_with_memory_address_and_node(tmp_path: Path) -> None:
    write(tmp_path / "0000:01:00.0/numa_node", "1")
    first, second = (one_device(one) for one in devices_of({}, {}, pci=tmp_path))
    assert first.name == "device 0"
    assert first.detail == "Card 0, 80 GiB, PCI 0000:00:00.0, nearest NUMA node unknown"
    assert second.detail == "Card 1, 80 GiB, PCI 0000:01:00.0, nearest NUMA node 1"


def test_a_grace_hopper_shows_its_own_node_and_reads_host_memory_in_place() -> None:
    (device,) = devices_of(GRACE_HOPPER)
    assert one_device(device).detail.endswith("nearest NUMA node 0, its memory is NUMA node 1")
    (finding,) = host_links([device])
    assert finding.name == "ATS, device 0"
    assert finding.detail == "coherent, host page tables (ATS): host memory is read in place"


@pytest.mark.parametrize(
    ("attributes", "word"),
    [({}, "pinned memory: no ATS"), ({Attribute.PAGEABLE_MEMORY_ACCESS: 1}, "(HMM): no ATS")],
    ids=["pinned", "hmm"],
)
def test_a_device_behind_pcie_has_no_ats(attributes: dict[Attribute, int], word: str) -> None:
    (finding,) = host_links(devices_of(attributes))
    assert finding.state is State.OK
    assert word in finding.detail


# ---- links


def keep_profile(folder: Path, card: str, rate: float, kernel: float) -> None:
    way = Direction((1e9, 2e9, 3e9, *[rate] * (len(SIZES) - 3)), kernel)
    link_profile(lambda: LinkProfile(way, way, "measured"), folder, card)


def test_a_link_is_told_with_the_rates_that_were_kept(tmp_path: Path) -> None:
    keep_profile(tmp_path, "card0-13020", 54e9, 40e9)
    (device,) = devices_of({})
    finding = device_link(device, 13020, tmp_path)
    way = "54 GB/s by copy engine, 40 GB/s by kernel, the engine is faster from 32 KiB on"
    kept = f"(measured, kept in {tmp_path / 'card0-13020.json'})"
    assert finding == Finding("link, device 0", State.OK, f"up {way}; down {way} {kept}")


@pytest.mark.parametrize(
    ("kernel", "words"), [(0.5e9, "faster at every size"), (60e9, "faster at no size")]
)
def test_a_link_without_a_crossover_says_so(tmp_path: Path, kernel: float, words: str) -> None:
    keep_profile(tmp_path, "card0-13020", 54e9, kernel)
    assert words in device_link(*devices_of({}), 13020, tmp_path).detail


def test_a_slow_link_comes_with_its_cure(tmp_path: Path) -> None:
    keep_profile(tmp_path, "card0-13020", 3.2e9, 3e9)
    finding = device_link(*devices_of({}), 13020, tmp_path)
    assert finding.state is State.NOTE
    assert "PCIe generation and width" in finding.cure
    assert str(tmp_path / "card0-13020.json") in finding.cure


def test_a_link_is_not_measured_yet_without_a_file_of_this_card_and_driver(tmp_path: Path) -> None:
    keep_profile(tmp_path, "card0-12080", 54e9, 40e9)
    keep_profile(tmp_path, "card1-13020", 54e9, 40e9)
    write(tmp_path / "card2-13020.json", '{"format": 1, "sizes": []}')
    devices = devices_of({}, {}, {})
    found = [device_link(device, 13020, tmp_path) for device in devices]
    assert [finding.state for finding in found] == [State.NOTE, State.OK, State.NOTE]
    assert found[0].detail == found[2].detail == "not measured yet"
    assert "first opens the device tier" in found[0].cure
    assert device_link(devices[1], 13020, None).detail == "not measured yet"


def test_all_devices_are_in_the_report_and_the_directory_comes_last(tmp_path: Path) -> None:
    keep_profile(tmp_path, "card1-13020", 54e9, 40e9)
    found = examine(tmp_path / "no", load=lambda: Table([{}, GRACE_HOPPER]), profiles=tmp_path)
    states = {finding.name: finding.state for finding in found}
    assert states["device 0"] is states["device 1"] is State.OK
    assert states["link, device 0"] is State.NOTE
    assert states["link, device 1"] is State.OK
    assert found[-1].name == "directory"


# ---- host memory


@pytest.mark.parametrize(("rate", "state"), [(1.9e9, State.NOTE), (2.1e9, State.OK)])
def test_a_slow_copy_in_host_memory_is_a_note(rate: float, state: State) -> None:
    finding = host_copy(rate)
    assert finding.state is state
    assert f"{rate / 1e9:.1f} GB/s" in finding.detail
    assert bool(finding.cure) == (state is State.NOTE)


def test_the_copy_rate_is_measured_where_there_is_room() -> None:
    rate = copy_rate(MIB, times=3)
    assert rate is not None
    assert rate > 1e6
    assert copy_rate(1 << 60) is None
    assert "not measured" in host_copy(None).detail


@pytest.mark.parametrize(
    ("limits", "is_root", "state", "detail"),
    [
        ((8 * MIB, 8 * MIB), False, State.NOTE, "8 MiB (hard limit 8 MiB)"),
        ((8 * MIB, resource.RLIM_INFINITY), False, State.NOTE, "8 MiB (hard limit unlimited)"),
        ((8 * MIB, 8 * MIB), True, State.OK, "8 MiB; does not bind root"),
        ((resource.RLIM_INFINITY,) * 2, False, State.OK, "unlimited"),
    ],
)
def test_a_limit_of_locked_memory_comes_with_its_cure(
    limits: tuple[int, int], is_root: bool, state: State, detail: str
) -> None:
    finding = memlock(limits, is_root=is_root)
    assert (finding.state, finding.detail) == (state, detail)
    assert ("LimitMEMLOCK=infinity" in finding.cure) == (state is State.NOTE)


@pytest.mark.parametrize(
    ("mode", "chosen", "state"),
    [
        ("always [madvise] never", "madvise", State.OK),
        ("[always] madvise never", "always", State.OK),
        ("always madvise [never]", "never", State.NOTE),
    ],
)
def test_huge_pages_are_read_from_the_kernel(
    tmp_path: Path, mode: str, chosen: str, state: State
) -> None:
    write(tmp_path / "transparent_hugepage/enabled", mode)
    finding = huge_pages(root=tmp_path)
    assert (finding.state, finding.detail) == (state, f"transparent huge pages: {chosen}")


def test_defrag_and_reserved_huge_pages_are_told(tmp_path: Path) -> None:
    write(tmp_path / "transparent_hugepage/enabled", "always [madvise] never")
    write(tmp_path / "transparent_hugepage/defrag", "always defer [defer+madvise] madvise never")
    write(tmp_path / "hugepages/hugepages-1048576kB/nr_hugepages", "4")
    write(tmp_path / "hugepages/hugepages-2048kB/nr_hugepages", "512")
    (tmp_path / "hugepages/hugepages-64kB").mkdir()
    assert huge_pages(root=tmp_path).detail == (
        "transparent huge pages: madvise, defrag: defer+madvise; "
        "reserved, not used by tierkv: 512 of 2 MiB, 4 of 1 GiB"
    )


def test_a_kernel_without_huge_pages_is_a_note(tmp_path: Path) -> None:
    finding = huge_pages(root=tmp_path)
    assert (finding.state, finding.cure) == (State.NOTE, "hugepages: off")


def make_node(root: Path, node: int, cores: str, gib: int) -> None:
    write(root / f"node{node}/cpulist", cores)
    write(root / f"node{node}/meminfo", f"Node {node} MemTotal:       {gib << 20} kB")


def test_numa_nodes_are_listed_with_cores_memory_and_devices(tmp_path: Path) -> None:
    make_node(tmp_path, 0, "0-71", 480)
    make_node(tmp_path, 1, "", 96)
    make_node(tmp_path, 10, "72-143", 0)
    finding = numa_map(devices_of(GRACE_HOPPER), nodes=tmp_path, backend="ctypes")
    assert finding.state is State.OK
    assert finding.detail == (
        "3 nodes, backend ctypes: node 0: cores 0-71, 480 GiB, near device 0; "
        "node 1: cores none, 96 GiB, memory of device 0; node 10: cores 72-143"
    )


def test_several_nodes_that_nothing_can_bind_are_a_note_with_a_cure(tmp_path: Path) -> None:
    make_node(tmp_path, 0, "0", 1)
    assert numa_map([], nodes=tmp_path, backend="none").state is State.OK
    make_node(tmp_path, 1, "1", 1)
    finding = numa_map([], nodes=tmp_path, backend="none")
    assert finding.state is State.NOTE
    assert "numactl" in finding.cure


def test_a_kernel_that_tells_of_no_nodes_is_ok(tmp_path: Path) -> None:
    assert numa_map([], nodes=tmp_path / "none").state is State.OK


# ---- kernel and drivers


@pytest.mark.parametrize(
    ("bindings", "driver", "lacks"),
    [
        ("json", "proc/driver/nvidia-fs/version", ""),
        ("json", "dev/nvidia-fs0", ""),
        ("json", "proc/other", "no nvidia-fs driver"),
        ("tierkv.nothing.cufile", "dev/nvidia-fs0", "no tierkv.nothing.cufile"),
    ],
)
def test_gds_needs_bindings_and_driver(
    tmp_path: Path, bindings: str, driver: str, lacks: str
) -> None:
    write(tmp_path / driver, "")
    finding = gds(devices_of({}), proc=tmp_path / "proc", dev=tmp_path / "dev", bindings=bindings)
    assert finding.state is (State.NOTE if lacks else State.OK)
    if lacks:
        assert finding.detail.startswith(f"{lacks}: cold pages are read by O_DIRECT")
        assert finding.cure


@pytest.mark.parametrize(
    ("code", "switch", "words"),
    [
        (0, None, "available;"),
        (errno.ENOSYS, None, "not available (ENOSYS);"),
        (errno.EPERM, "2", "not available (EPERM, sysctl kernel.io_uring_disabled = 2);"),
        (errno.EPERM, "0", "not available (EPERM, a container's seccomp profile);"),
        (errno.EPERM, None, "not available (EPERM, a container's seccomp profile);"),
        (None, None, "not probed on "),
    ],
)
def test_io_uring_is_information_with_its_reason(
    tmp_path: Path, code: int | None, switch: str | None, words: str
) -> None:
    if switch is not None:
        write(tmp_path / "sys/kernel/io_uring_disabled", switch)
    finding = io_uring(setup=lambda: code, proc=tmp_path)
    assert finding.state is State.OK
    assert finding.detail.startswith(words)
    assert "not used" in finding.detail


def test_the_ring_that_was_asked_for_is_given_back() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    assert io_uring().state is State.OK
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# ---- the disk


class Unreadable(PortableFiles):
    """A disk that breaks between writing and reading."""

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        raise OSError(errno.EIO, "broken")


class Interrupted(PortableFiles):
    """Somebody presses Ctrl-C while the probe file is being written."""

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [DirectFiles, PortableFiles])
def test_the_disk_is_measured_and_nothing_is_left_or_changed(
    tmp_path: Path, kind: type[DirectFiles | PortableFiles]
) -> None:
    if kind.probe(tmp_path) is not None:
        pytest.skip(f"{kind.name} does not work here")
    target = write(tmp_path / "kept", "as it was")
    (tmp_path / "link").symlink_to(target)
    wrote, read = disk_rates(tmp_path, kind, size_bytes=8 * MIB)
    assert min(wrote, read) > 1e5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "link"]
    assert target.read_text() == "as it was\n"


def test_a_disk_that_fails_is_a_note_and_its_probe_file_is_removed(tmp_path: Path) -> None:
    finding = disk(tmp_path, Unreadable, size_bytes=8 * MIB)
    assert finding.state is State.NOTE
    assert "broken" in finding.detail
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_measurement_removes_its_probe_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        disk(tmp_path, Interrupted, size_bytes=8 * MIB)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("read", "state"), [(0.29e9, State.NOTE), (0.31e9, State.OK)])
def test_a_slow_disk_comes_with_a_cure(read: float, state: State) -> None:
    finding = disk_finding(1e9, read, is_cached=False)
    assert finding.state is state
    assert ("NVMe" in finding.cure) == (state is State.NOTE)
    assert finding.detail == f"writes 1 GB/s, reads {read / 1e9:.2f} GB/s, one thread, now"
    assert "page cache" in disk_finding(1e9, read, is_cached=True).detail


def test_a_directory_that_is_a_dangling_link_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    finding = examine(tmp_path / "link", load=no_driver)[-1]
    assert (finding.name, finding.state) == ("directory", State.PROBLEM)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert examine(tmp_path / "loop", load=no_driver)[-1].state is State.PROBLEM


# ---- the whole command, with real libraries

LIBRARY = """
#include <stdint.h>
#include <string.h>
int cuInit(unsigned flags) { return STARTS; }
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Paper", size); return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, 0xab, 16); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = (size_t)1 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 0; return what > 100; }
"""


def run_doctor(environment: Mapping[str, str], directory: str) -> dict[str, dict[str, str]]:
    code = (
        "import sys; sys.modules['torch'] = None; "
        f"sys.argv = ['tierkv', 'doctor', '--json', '--directory', {directory!r}]; "
        "from tierkv.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


@pytest.mark.parametrize("starts", [True, False])
def test_a_real_library_is_asked_through_the_driver(tmp_path: Path, starts: bool) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = write(tmp_path / "cuda.c", LIBRARY.replace("STARTS", "0" if starts else "100"))
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "HOME": str(tmp_path)}
    found = run_doctor(environment, str(tmp_path))
    if starts:
        assert found["CUDA"]["detail"] == "driver for CUDA 13.0, 1 device(s)"
        assert found["device 0"]["detail"].startswith("Paper, 1 GiB, PCI 0000:00:00.0")
        assert found["link, device 0"]["detail"] == "not measured yet"
    else:
        assert "cuInit: CUDA_ERROR_NO_DEVICE (100)" in found["CUDA"]["detail"]
        assert found["CUDA"]["state"] == "note"


def test_a_user_without_a_home_gets_findings_not_a_traceback(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become a user that does not exist")
    # A first look imports everything: that user may not read where Python is installed.
    code = (
        "import os; from pathlib import Path; from tierkv.doctor import examine; "
        "examine(Path('nowhere')); os.setuid(54321); print(examine(Path('~/x'))[-1].state)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("problem", "")
