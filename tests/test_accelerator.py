"""Devices, nodes and ranks on machines that tests do not run on: attribute tables, sysfs trees.

The trees follow what such machines show. A Grace-Hopper has 9 nodes, of which 7 are kept for
MIG and are empty (bytedance/xpu-perf #129), one with four superchips has 36 (mlperf-common #16).
"""

from __future__ import annotations

import mmap
import platform
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv import config as config_module
from tierkv.config import Config
from tierkv.core.geometry import GIB, KVGeometry, Layout, PageTargets
from tierkv.kernels.driver import Attribute
from tierkv.store import Store
from tierkv.tiers import accelerator, numa
from tierkv.tiers.accelerator import (
    Accelerator,
    HostLink,
    accelerators,
    device_node_bytes,
    home_node,
    host_nodes,
)

Bytes = npt.NDArray[np.uint8]
Attributes = Mapping[Attribute, int]

HMM = {Attribute.PAGEABLE_MEMORY_ACCESS: 1, Attribute.USES_HOST_PAGE_TABLES: 0}
#: As a driver answers that knows of nodes, on a system that has none to tell of.
UNKNOWN = {
    Attribute.HOST_NUMA_ID: -1,
    Attribute.NUMA_ID: -1,
    Attribute.NUMA_CONFIG: 0,
    Attribute.PAGEABLE_MEMORY_ACCESS: 0,
}


def coherent(host: int, own: int) -> Attributes:
    """A device on NVLink-C2C: the host's page tables, and its memory as a node."""
    return {
        Attribute.PAGEABLE_MEMORY_ACCESS: 1,
        Attribute.USES_HOST_PAGE_TABLES: 1,
        Attribute.HOST_NUMA_ID: host,
        Attribute.NUMA_CONFIG: 1,
        Attribute.NUMA_ID: own,
    }


@dataclass
class Table:
    """Stands in for NVIDIA's driver: a device for each table of attributes, at its PCI address."""

    devices: Mapping[str, Attributes]

    def device_count(self) -> int:
        return len(self.devices)

    def attribute(self, attribute: Attribute, device: int) -> int | None:
        return list(self.devices.values())[device].get(attribute)

    def name(self, device: int) -> str:
        return f"Card {device}"

    def uuid(self, device: int) -> str:
        return f"{device:032x}"

    def memory_bytes(self, device: int) -> int:
        return 96 * GIB

    def pci_address(self, device: int) -> str:
        return list(self.devices)[device]


@dataclass
class Machine:
    """A box by its sysfs: `nodes` and `pci` are roots to read, `driver` shows its devices."""

    root: Path
    driver: Table
    nodes: Path = field(init=False)
    pci: Path = field(init=False)

    def __post_init__(self) -> None:
        self.nodes, self.pci = self.root / "node", self.root / "pci"
        self.nodes.mkdir(parents=True)

    def add_node(self, node: int, cpus: str, gib: int) -> None:
        """As the kernel writes it; a node of device memory has an empty list of cores."""
        folder = self.nodes / f"node{node}"
        folder.mkdir()
        (folder / "cpulist").write_text(f"{cpus}\n")
        (folder / "meminfo").write_text(
            f"Node {node} MemTotal:       {gib << 20} kB\n"
            f"Node {node} MemFree:        {gib << 19} kB\n"
        )

    def add_pci(self, address: str, node: int) -> None:
        folder = self.pci / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")

    @property
    def devices(self) -> list[Accelerator]:
        return accelerators(self.driver, pci=self.pci)

    def home_of(self, device: int) -> int | None:
        return home_node(self.devices[device], nodes=self.nodes)


#: Eight H100 at the addresses of a DGX: four behind each socket.
DGX = dict.fromkeys(("1b", "43", "52", "61"), 0) | dict.fromkeys(("9d", "c3", "d1", "df"), 1)


def dgx_h100(root: Path, attributes: Attributes) -> Machine:
    addresses = {f"0000:{bus}:00.0": node for bus, node in DGX.items()}
    box = Machine(root, Table(dict.fromkeys(addresses, attributes)))
    box.add_node(0, "0-55,112-167", 1024)
    box.add_node(1, "56-111,168-223", 1024)
    for address, node in addresses.items():
        box.add_pci(address, node)
    return box


def virtual_h100(root: Path) -> Machine:
    box = Machine(root, Table({"0000:00:07.0": UNKNOWN}))
    box.add_node(0, "0-25", 200)
    box.add_pci("0000:00:07.0", -1)
    return box


def grace_hopper(root: Path, *, empty: int = 0) -> Machine:
    """Memory of the device is node 1; `empty` nodes more are kept for MIG."""
    box = Machine(root, Table({"0009:01:00.0": coherent(0, 1)}))
    box.add_node(0, "0-71", 480)
    box.add_node(1, "", 96)
    for node in range(2, 2 + empty):
        box.add_node(node, "", 0)
    box.add_pci("0009:01:00.0", 0)
    return box


def grace_blackwell(root: Path) -> Machine:
    """Two sockets, two devices behind each; node numbers go by eights, for MIG."""
    own = {"0008:01:00.0": 2, "0009:01:00.0": 10, "0018:01:00.0": 18, "0019:01:00.0": 26}
    tables = {a: coherent(n // 2, node) for n, (a, node) in enumerate(own.items())}
    box = Machine(root, Table(tables))
    box.add_node(0, "0-71", 480)
    box.add_node(1, "72-143", 480)
    for n, (address, node) in enumerate(own.items()):
        box.add_node(node, "", 186)
        box.add_pci(address, n // 2)
    return box


# ---- what a device is


@pytest.mark.parametrize("attributes", [{}, UNKNOWN], ids=["older driver", "newer driver"])
def test_devices_of_two_sockets_learn_their_nodes_from_the_pci_tree(
    tmp_path: Path, attributes: Attributes
) -> None:
    box = dgx_h100(tmp_path, attributes)
    assert [one.host_node for one in box.devices] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {(one.link, one.memory_node) for one in box.devices} == {(HostLink.PINNED, None)}
    assert [box.home_of(device) for device in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert host_nodes(box.devices, nodes=box.nodes).keys() == {0, 1}
    assert device_node_bytes(box.devices, nodes=box.nodes) == 0


def test_the_driver_knows_better_than_the_pci_tree(tmp_path: Path) -> None:
    """A tree that a firmware left at node 0 for all of them."""
    box = dgx_h100(tmp_path, UNKNOWN | {Attribute.HOST_NUMA_ID: 1})
    assert {one.host_node for one in box.devices} == {1}


def test_a_device_in_a_virtual_machine_has_no_node_and_no_home(tmp_path: Path) -> None:
    box = virtual_h100(tmp_path)
    (device,) = box.devices
    assert (device.link, device.host_node, device.memory_node) == (HostLink.PINNED, None, None)
    assert box.home_of(0) is None
    assert host_nodes([device], nodes=box.nodes) == {0: list(range(26))}


def test_a_machine_without_any_sysfs_is_one_where_nobody_knows(tmp_path: Path) -> None:
    devices = accelerators(Table({"0000:17:00.0": {}}), pci=tmp_path / "none")
    assert devices[0].host_node is None
    assert host_nodes(devices, nodes=tmp_path / "none") == {}
    assert home_node(devices[0], nodes=tmp_path / "none") is None


def test_pageable_memory_by_migration_is_not_coherent(tmp_path: Path) -> None:
    box = dgx_h100(tmp_path, HMM)
    assert {(one.link, one.memory_node) for one in box.devices} == {(HostLink.HMM, None)}
    assert box.home_of(7) == 1


def test_a_grace_hopper_is_coherent_and_its_memory_is_a_node(tmp_path: Path) -> None:
    box = grace_hopper(tmp_path)
    (device,) = box.devices
    assert (device.link, device.host_node, device.memory_node) == (HostLink.COHERENT, 0, 1)
    assert (device.pci, device.memory_bytes) == ("0009:01:00.0", 96 * GIB)
    assert host_nodes(box.devices, nodes=box.nodes) == {0: list(range(72))}
    assert device_node_bytes(box.devices, nodes=box.nodes) == 96 * GIB


def test_an_arena_is_at_home_on_grace_where_empty_nodes_are_kept_for_mig(tmp_path: Path) -> None:
    box = grace_hopper(tmp_path, empty=7)
    assert box.home_of(0) == 0
    assert device_node_bytes(box.devices, nodes=box.nodes) == 96 * GIB


def test_nodes_with_neither_cores_nor_memory_are_no_host_nodes(tmp_path: Path) -> None:
    box = grace_hopper(tmp_path, empty=7)
    assert host_nodes(box.devices, nodes=box.nodes).keys() == {0}


def test_two_sockets_with_four_devices_have_two_host_nodes(tmp_path: Path) -> None:
    box = grace_blackwell(tmp_path)
    found = [(one.link, one.host_node, one.memory_node) for one in box.devices]
    wanted = [(0, 2), (0, 10), (1, 18), (1, 26)]
    assert found == [(HostLink.COHERENT, *nodes) for nodes in wanted]
    assert host_nodes(box.devices, nodes=box.nodes).keys() == {0, 1}
    assert device_node_bytes(box.devices, nodes=box.nodes) == 4 * 186 * GIB
    assert [box.home_of(device) for device in range(4)] == [0, 0, 1, 1]


def test_memory_of_devices_hidden_from_this_process_is_not_ram(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES shows a rank one device of four; the system still counts all."""
    box = grace_blackwell(tmp_path)
    assert device_node_bytes(box.devices[:1], nodes=box.nodes) == 4 * 186 * GIB


def test_attributes_that_a_driver_does_not_know_count_as_no(tmp_path: Path) -> None:
    """An older one on a coherent machine: the link is known, the nodes are not."""
    box = grace_hopper(tmp_path)
    old = {
        key: value
        for key, value in box.driver.devices["0009:01:00.0"].items()
        if key not in (Attribute.HOST_NUMA_ID, Attribute.NUMA_CONFIG, Attribute.NUMA_ID)
    }
    (device,) = accelerators(Table({"0009:01:00.0": old}), pci=box.pci)
    assert (device.link, device.host_node, device.memory_node) == (HostLink.COHERENT, 0, None)
    assert device_node_bytes([device], nodes=box.nodes) == 0


def test_a_node_number_without_its_configuration_is_not_believed() -> None:
    """0 is a node, and what a card without one may answer."""
    table = Table({"0000:17:00.0": {Attribute.NUMA_ID: 0, Attribute.NUMA_CONFIG: 0}})
    assert accelerators(table, pci=Path("nowhere"))[0].memory_node is None


def test_every_attribute_has_the_number_of_cuda_h() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    names = {
        "MULTIPROCESSORS": "MULTIPROCESSOR_COUNT",
        "PCI_BUS": "PCI_BUS_ID",
        "PCI_DEVICE": "PCI_DEVICE_ID",
        "COPY_ENGINES": "ASYNC_ENGINE_COUNT",
        "PCI_DOMAIN": "PCI_DOMAIN_ID",
        "USES_HOST_PAGE_TABLES": "PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES",
        "DIRECT_MANAGED_ACCESS_FROM_HOST": "DIRECT_MANAGED_MEM_ACCESS_FROM_HOST",
    }
    for attribute in Attribute:
        name = f"CU_DEVICE_ATTRIBUTE_{names.get(attribute.name, attribute.name)}"
        assert int(getattr(driver.CUdevice_attribute, name)) == attribute


# ---- where host memory for a device belongs


def test_no_device_has_no_home() -> None:
    assert home_node(None) is None


def test_a_home_is_only_told_where_there_is_another_host_node(tmp_path: Path) -> None:
    box = Machine(tmp_path, Table({"0000:17:00.0": {Attribute.HOST_NUMA_ID: 0}}))
    box.add_node(0, "0-31", 512)
    assert box.home_of(0) is None
    box.add_node(1, "32-63", 512)
    assert box.home_of(0) == 0


def test_a_node_that_the_system_does_not_show_is_no_home(tmp_path: Path) -> None:
    """A container that sees some of the nodes."""
    box = Machine(tmp_path, Table({"0000:17:00.0": {Attribute.HOST_NUMA_ID: 5}}))
    box.add_node(0, "0-31", 512)
    box.add_node(1, "32-63", 512)
    assert box.home_of(0) is None


@given(
    shown=st.sets(st.integers(0, 40), max_size=6),
    host=st.integers(-1, 40),
    own=st.integers(-1, 40),
)
def test_a_home_is_a_host_node_near_the_device_and_never_its_own_memory(
    shown: set[int], host: int, own: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        box = Machine(Path(folder) / "box", Table({"0000:17:00.0": coherent(host, own)}))
        for node in shown:
            box.add_node(node, "" if node == own else str(node), 8)
        home = box.home_of(0)
        assert own not in host_nodes(box.devices, nodes=box.nodes)
    others = shown - {host}  # also its own memory: the system might take that
    if host in shown and host != own and others:
        assert home == host
    else:
        assert home is None


# ---- shares of RAM


def test_only_machines_that_can_have_coherent_devices_ask_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked() -> list[Accelerator]:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(accelerator, "accelerators", asked)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert device_node_bytes() == 0
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(AssertionError, match="was asked"):
        device_node_bytes()


def test_a_share_of_ram_leaves_device_memory_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of RAM on a Grace-Hopper is half of Grace's memory; the whole would be 576 GiB."""
    box = grace_hopper(tmp_path)
    known = partial(device_node_bytes, box.devices, nodes=box.nodes)
    monkeypatch.setattr(accelerator, "device_node_bytes", known)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=576 * GIB))
    monkeypatch.setattr(config_module, "Path", lambda *_: tmp_path / "no control group")
    assert config_module.ram_bytes() == 480 * GIB


# ---- what the system says of nodes


def test_memory_of_a_node_is_read_in_the_kernels_own_words(tmp_path: Path) -> None:
    folder = tmp_path / "node1"
    folder.mkdir()
    (folder / "meminfo").write_text(
        "\nNode 1 MemTotal:       99876864 kB\nNode 1 MemFree:        98765432 kB\n"
        "Node 1 HugePages_Total:     0\n"
    )
    assert numa.node_bytes(1, tmp_path) == 99876864 * 1024
    (folder / "meminfo").write_text("Node 1 MemFree:  12 kB\n")
    assert numa.node_bytes(1, tmp_path) == 0
    assert numa.node_bytes(2, tmp_path) == 0


@given(st.lists(st.integers(0, 500), max_size=20, unique=True), st.data())
def test_lists_of_cores_are_read_as_the_kernel_writes_them(
    cores: list[int], data: st.DataObject
) -> None:
    """Neighbours may be joined to a range, or not."""
    cores.sort()
    runs: list[list[int]] = []
    for core in cores:
        if runs and runs[-1][-1] == core - 1 and data.draw(st.booleans()):
            runs[-1].append(core)
        else:
            runs.append([core])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    assert numa.parse_cpus(",".join(parts) + "\n") == cores


def test_nodes_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    for name, text in (("node0", "0-3\n"), ("node2", "\n"), ("node7", "all of them\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(text)
    (tmp_path / "node9").mkdir()
    (tmp_path / "has_memory").write_text("0\n")
    assert numa.nodes(tmp_path) == {0: [0, 1, 2, 3], 2: []}


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("-1\n", None), ("", None), ("x", None)])
def test_the_node_of_a_pci_device_is_known_or_it_is_not(
    tmp_path: Path, text: str, node: int | None
) -> None:
    (tmp_path / "0000:c3:00.0").mkdir()
    (tmp_path / "0000:c3:00.0" / "numa_node").write_text(text)
    assert numa.node_of_pci("0000:C3:00.0", tmp_path) == node
    assert numa.node_of_pci("0000:c4:00.0", tmp_path) is None


NUMA_MAPS = """\
aaaab0a10000 default file=/usr/bin/python3.11 mapped=812 mapmax=3 N0=812 kernelpagesize_kB=4
aaaad4c20000 default heap anon=5120 dirty=5120 active=4096 N0=5000 N1=120 kernelpagesize_kB=4
e00000000000 bind:0 anon=26214400 dirty=26214400 N0=26000000 N1=214400 kernelpagesize_kB=4
f00000000000 bind:0 anon=1600 dirty=1600 N0=1000 N1=600 kernelpagesize_kB=64
f10000000000 default huge anon=300 dirty=300 N1=300 kernelpagesize_kB=2048
f20000000000 prefer:0 anon=3 dirty=3 N0=1 N10=2
f30000000000 default
fffff7f20000 default file=/tmp/N1=7/lib.so anon=2 dirty=2 mapped=9 N0=9 kernelpagesize_kB=4
ffffffe00000 default stack anon=5 dirty=5 N0=5 kernelpagesize_kB=4
"""


@pytest.mark.parametrize(
    ("address", "found"),
    [
        pytest.param(
            0xE00000000000, {0: 26000000 * 4096, 1: 214400 * 4096}, id="transparent huge pages"
        ),
        pytest.param(0xF00000000000, {0: 1000 << 16, 1: 600 << 16}, id="pages of 64 KiB"),
        pytest.param(0xF10000000000, {1: 300 << 21}, id="huge pages"),
        pytest.param(
            0xF20000000000, {0: mmap.PAGESIZE, 10: 2 * mmap.PAGESIZE}, id="an older kernel"
        ),
        pytest.param(0xF30000000000, {}, id="nothing touched yet"),
        pytest.param(0xF40000000000, {}, id="not mapped"),
        pytest.param(0xAAAAD4C20000, {0: 5000 * 4096, 1: 120 * 4096}, id="the heap"),
    ],
)
def test_bytes_of_a_mapping_are_told_by_node(address: int, found: dict[int, int]) -> None:
    assert numa.mapping_bytes(NUMA_MAPS, address, 1) == found


@pytest.mark.parametrize("line", ["what is this", "zz default N0=1", "[vdso]"])
def test_a_line_that_nobody_understands_does_not_hide_the_others(line: str) -> None:
    text = f"{line}\n\n default\n{NUMA_MAPS}"
    assert numa.mapping_bytes(text, 0xF10000000000, 1) == {1: 300 << 21}


def test_bytes_of_a_real_mapping_are_all_of_it() -> None:
    try:
        Path("/proc/self/numa_maps").read_text()
    except OSError:
        pytest.skip("this kernel has no numa_maps")
    size = 4 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_DONTFORK)  # or it may be joined to a neighbour
        view = np.frombuffer(memory, np.uint8)
        address = view.ctypes.data
        del view
        memory[:] = bytes(size)
        text = Path("/proc/self/numa_maps").read_text()
        assert sum(numa.mapping_bytes(text, address, size).values()) == size


# ---- ranks of one model

TARGETS = PageTargets(hot_bytes=1 << 10, warm_bytes=32 << 10, cold_bytes=128 << 10)


def rank_layout(rank: int) -> Layout:
    geometry = KVGeometry(
        layers=3, kv_heads=4, head_dim=16, dtype="float16", tp_rank=rank, tp_size=2
    )
    return Layout(geometry, model="m", targets=TARGETS)


def rank_config(directory: Path) -> Config:
    cold = {"capacity": "4MiB", "directory": str(directory), "segment_cold_pages": 2}
    host = {"capacity": "512KiB", "hugepages": "off"}
    pages = {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"}
    tiers = {"host": host, "cold": {**cold, "threads": 2}}
    return Config.model_validate({"pages": pages, "tiers": tiers})


def bytes_of_rank(store: Store, rank: int) -> Bytes:
    shape = (store.plan.layers, 20, store.plan.block_layer_bytes)
    return np.random.default_rng(rank).integers(0, 256, shape, dtype=np.uint8)


@given(size=st.sampled_from([2, 4, 8]), data=st.data())
def test_layouts_that_differ_only_in_their_rank_differ_in_their_fingerprint(
    size: int, data: st.DataObject
) -> None:
    one, two = data.draw(st.permutations(range(size)))[:2]
    layouts = [
        Layout(KVGeometry(layers=2, kv_heads=8, head_dim=16, tp_rank=rank, tp_size=size))
        for rank in (one, two)
    ]
    assert layouts[0].pages == layouts[1].pages
    assert layouts[0].fingerprint != layouts[1].fingerprint


def test_ranks_share_a_directory_and_nothing_in_it(tmp_path: Path) -> None:
    """Both open at once, put the same tokens, and after a restart each has its own bytes."""
    config = rank_config(tmp_path)
    tokens = list(range(20 * 16))
    with ExitStack() as both:
        stores = [both.enter_context(Store.open(config, rank_layout(rank))) for rank in (0, 1)]
        assert stores[0].put(tokens, bytes_of_rank(stores[0], 0)) == 20
        assert stores[1].match(tokens).blocks == 0
        assert stores[1].put(tokens, bytes_of_rank(stores[1], 1)) == 20
        assert all(store.flush() for store in stores)

    folders = [tmp_path / rank_layout(rank).fingerprint.hex()[:16] for rank in (0, 1)]
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    assert all(any(folder.iterdir()) for folder in folders)
    for rank in (0, 1):
        with Store.open(config, rank_layout(rank)) as store:
            match = store.match(tokens)
            assert match.tokens_by_tier["cold"] == 320
            wanted = bytes_of_rank(store, rank)
            out = np.zeros_like(wanted)
            assert store.get(match, out) == 20
            assert np.array_equal(out, wanted)


def test_a_rank_whose_files_are_deleted_leaves_the_other_its_own(tmp_path: Path) -> None:
    config, tokens = rank_config(tmp_path), list(range(20 * 16))
    for rank in (0, 1):
        with Store.open(config, rank_layout(rank)) as store:
            store.put(tokens, bytes_of_rank(store, rank))
            assert store.flush()
    gone = tmp_path / rank_layout(0).fingerprint.hex()[:16]
    for path in gone.iterdir():
        path.unlink()
    found = []
    for rank in (0, 1):
        with Store.open(config, rank_layout(rank)) as store:
            found.append(store.match(tokens).blocks)
    assert found == [0, 20]
