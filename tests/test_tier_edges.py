"""What tiers do at their edges: a machine without a means, a file that is not ours, a bad key."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from tierkv.core import registry as registry_module
from tierkv.core.errors import ConfigError, TierFailed
from tierkv.core.geometry import KIB, MIB, KVGeometry, PagePlan, PageTargets
from tierkv.core.tier import Span
from tierkv.testing.file_engines import page_bytes
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles, from_then_on
from tierkv.testing.tiers import FINGERPRINT, PAGE_BYTES, PLAN, page_label
from tierkv.tiers import host as host_module
from tierkv.tiers import numa
from tierkv.tiers.files import beneath
from tierkv.tiers.files.base import aligned_array
from tierkv.tiers.files.portable import PortableFiles
from tierkv.tiers.host import HostTier
from tierkv.tiers.seals import SEALS, load_seal
from tierkv.tiers.seals.hmac_sha256 import HmacSeal
from tierkv.tiers.seals.key_file import make_key, read_key
from tierkv.tiers.seals.without_key import WithoutKey
from tierkv.tiers.segments import SegmentTier

#: Blocks of 96 KiB, sixteen in a page.
WIDE = PagePlan.of(
    KVGeometry(layers=3, kv_heads=4, head_dim=128, dtype="bfloat16"),
    block_tokens=16,
    targets=PageTargets(hot_bytes=16 * KIB, warm_bytes=3 * MIB // 2, cold_bytes=3 * MIB),
)


# ---- memory


def sysfs_with(folder: Path, nodes: int) -> Path:
    for number in range(nodes):
        (folder / f"node{number}").mkdir(parents=True)
        (folder / f"node{number}" / "cpulist").write_text(f"{number}\n")
    return folder


@pytest.mark.parametrize(
    ("nodes", "machine", "has_module", "expected"),
    [
        (1, "x86_64", True, "none"),
        (2, "x86_64", True, "numa"),
        (2, "aarch64", False, "ctypes"),
        (2, "riscv64", False, "none"),
    ],
)
def test_memory_is_bound_where_there_is_more_than_one_node_and_a_way(
    nodes: int,
    machine: str,
    has_module: bool,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if has_module:
        (tmp_path / "numa.py").touch()
        monkeypatch.syspath_prepend(tmp_path)

    assert numa.backend(sysfs_with(tmp_path / "sysfs", nodes)) == expected


def test_nothing_is_bound_on_a_machine_whose_call_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not numa.bind(0, 4096, 0)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("blocks", [96, 4])
def test_large_and_small_copies_move_the_same_bytes(blocks: int, shift: int) -> None:
    """Large ones bypass the caches, unless a row begins inside a line."""
    tier = HostTier(WIDE, pages=8, hugepages="off", threads=1)
    tier.open()
    row, size = WIDE.block_layer_bytes, WIDE.warm_page_blocks
    data = np.random.default_rng(blocks).integers(0, 256, (3, blocks, row), np.uint8)
    spans = [Span(n, 7 - n // size, 0, min(size, blocks - n)) for n in range(0, blocks, size)]
    tier.write(spans, data)
    space = aligned_array(3 * (blocks + 2) * row + 64, 64)[shift:]
    out = space[: 3 * (blocks + 2) * row].reshape(3, blocks + 2, row)
    out[:] = 7
    tier.read([span._replace(index=span.index + 1) for span in spans], out)

    assert np.array_equal(out[:, 1:-1], data)
    assert (out[:, [0, -1]] == 7).all(), "neighbours are left alone"
    first = tier.blocks[7, :, 0]
    assert np.array_equal(first, data[:, 0])
    tier.close()


def test_zeroed_places_and_the_padding_hold_nothing_and_their_neighbours_stay() -> None:
    plan = replace(WIDE, warm_page_bytes=WIDE.warm_page_bytes + 8192)
    tier = HostTier(plan, pages=3, hugepages="off", threads=1)
    tier.open()
    tier.pages[:] = 7
    tier.zero(1, (0, 2))

    assert not tier.blocks[1][:, [0, 2]].any()
    assert not tier.pages[1, plan.warm_payload_bytes :].any()
    assert (tier.blocks[1][:, 1] == 7).all()
    assert (tier.blocks[1][:, 3:] == 7).all()
    assert (tier.pages[[0, 2]] == 7).all()
    tier.close()


def test_an_arena_is_touched_page_by_page_where_the_kernel_cannot_populate_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def refused(_address: int, size_bytes: int, advice: int) -> bool:
        asked.append(size_bytes)
        return False

    monkeypatch.setattr(host_module, "_advise", refused)
    tier = HostTier(WIDE, pages=3, hugepages="advise", threads=2)
    tier.open()

    assert sum(asked) >= 2 * tier.pages.nbytes, "both advices were asked for, all of it"
    assert not tier.pages.any()
    tier.close()


def test_a_device_tier_without_torch_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from tests.test_tier_edges import WIDE\n"
        "from tierkv.tiers.device import DeviceTier\n"
        "DeviceTier(WIDE, frames=1).open()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "TierFailed: device tier: needs torch; install" in done.stderr


def test_blocks_of_a_device_are_gathered_to_places_that_are_not_neighbours() -> None:
    torch = pytest.importorskip("torch")
    from tierkv.tiers.device import DeviceTier

    tier = DeviceTier(WIDE, frames=6)
    tier.open()
    assert tier.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    data = np.random.default_rng(1).integers(0, 256, (3, 5, WIDE.block_layer_bytes), np.uint8)
    spans = [Span(0, 4, 0, 1), Span(2, 1, 0, 2), Span(4, 3, 0, 1)]
    tier.write(spans, data)
    for view in (lambda out: out, lambda out: out[:, :, ::-1]):
        out = np.full_like(data, 7)
        tier.read(spans, view(out))
        assert np.array_equal(view(out)[:, [0, 2, 3, 4]], data[:, [0, 2, 3, 4]])
        assert (out[:, 1] == 7).all()
    tier.close()


# ---- files


@pytest.fixture
def _asked_again() -> Iterator[None]:
    """What the system offers is looked for anew, now and afterwards."""
    beneath._openat2.cache_clear()
    yield
    beneath._openat2.cache_clear()


@pytest.mark.usefixtures("_asked_again")
def test_files_are_opened_without_openat2_on_a_machine_that_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert beneath._openat2() is None
    (tmp_path / "link").symlink_to("a")
    root = os.open(tmp_path, os.O_RDONLY)
    made = beneath.open_beneath("a", os.O_RDWR | os.O_CREAT, root)

    assert os.fstat(made).st_mode & 0o777 == 0o600
    with pytest.raises(OSError) as caught:
        beneath.open_beneath("link", os.O_RDWR, root)
    assert caught.value.errno == errno.ELOOP
    os.close(made)
    os.close(root)


def test_links_that_lead_in_a_ring_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as caught:
        beneath.open_directory(str(tmp_path / "a"), lambda _status: None)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(tmp_path / "a"))


def test_another_file_under_a_files_name_is_not_written(tmp_path: Path) -> None:
    """The portable engine opens a file again for more threads: it must be the same one."""
    files = PortableFiles(tmp_path)
    handle = files.open("a", create=True)
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "a").write_bytes(b"another's")
    with pytest.raises(OSError, match="another file took this name") as caught:
        files.write(handle, 0, [page_bytes(1).data])

    assert caught.value.errno == errno.ESTALE
    assert (tmp_path / "a").read_bytes() == b"another's"
    files.shutdown()


# ---- keys


def test_a_protection_without_a_key_file_is_refused() -> None:
    assert load_seal("none", None) is None
    with pytest.raises(ConfigError, match="hmac needs a key_file"):
        load_seal("hmac", None)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_master_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, got {size}"):
        HmacSeal(bytes(size))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    assert len(read_key(tmp_path / "key")) == 32
    os.chown(tmp_path / "key", 12345, -1)
    with pytest.raises(ConfigError, match="belongs to uid 12345, not to us"):
        read_key(tmp_path / "key")


def test_without_its_key_nothing_is_written_or_revealed() -> None:
    seal = WithoutKey("hmac")
    with pytest.raises(AssertionError, match="nothing is written"):
        seal.close(b"", b"", b"", bytearray())
    with pytest.raises(AssertionError, match="nothing is revealed"):
        seal.open(b"", b"", b"", b"", b"")


# ---- the cold directory


def opened(files: FaultyFiles) -> SegmentTier:
    tier = SegmentTier(files, PLAN, FINGERPRINT, pages_max=20, segment_cold_pages=2)
    tier.open()
    return tier


def fill(tier: SegmentTier, pages: list[int]) -> None:
    tier.write_pages(pages, [page_bytes(p) for p in pages], [page_label(p) for p in pages])


def test_a_manifest_that_changed_while_the_tier_was_open_is_a_finding() -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")))
    tier = opened(files)
    assert tier.check() == []
    handle = files.open("manifest")
    text = aligned_array(4096, 4096)
    files.read(handle, 0, [text.data])
    files.write(handle, 0, [page_bytes(1)[:4096].data])
    (finding,) = tier.check()
    assert finding.startswith("manifest: ")
    files.write(handle, 0, [text.data])
    assert tier.check() == []
    files.unlink("manifest")
    (finding,) = tier.check()
    assert finding.startswith("manifest: ")


@pytest.mark.parametrize("deep", [False, True])
def test_a_page_that_another_write_took_or_that_cannot_be_read_is_a_finding(deep: bool) -> None:
    disk = MemoryFiles(Path("disk"))
    files = FaultyFiles(disk)
    tier = opened(files)
    fill(tier, [0, 1])
    handle = disk.open("segment-00000000.tkv")
    old = aligned_array(1 << 20, 4096)[: disk.size(handle)]
    disk.read(handle, 0, [old.data])
    fill(tier, [0])
    assert tier.check(deep=deep) == []
    disk.write(handle, 0, [old.data])

    (finding,) = tier.check(deep=deep)
    assert "page 0" in finding
    files.schedule = from_then_on(files.calls, Fault.EIO)
    injected = [line for line in tier.check(deep=deep) if "injected into" in line]
    assert [line.split(":")[0] for line in injected[:2]] == ["manifest", "segment 0"]
    assert len(injected) == 4, "and one for each page"


def test_a_tier_that_did_not_open_can_be_opened_when_the_disk_is_well() -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")), from_then_on(0, Fault.EIO))
    tier = SegmentTier(files, PLAN, FINGERPRINT, pages_max=20, segment_cold_pages=2)
    with pytest.raises(TierFailed):
        tier.open()
    with pytest.raises(TierFailed, match="not open"):
        tier.check()
    files.schedule = None
    tier.open()
    fill(tier, [3])
    out = aligned_array(PAGE_BYTES, 4096)
    assert tier.read_pages([3], [out]) == [True]
    assert bytes(out) == bytes(page_bytes(3))
    tier.close()


@pytest.mark.parametrize(
    "text", [b"pid 1e9", b"pid 12345678901", b"\xff\xfe", b"", b"pid 77\nmore"]
)
def test_a_directory_in_use_names_its_user_only_where_that_is_a_pid(text: bytes) -> None:
    disk = MemoryFiles(Path("disk"))
    first = opened(FaultyFiles(disk))
    handle = disk.open("lock")
    space = aligned_array(4096, 4096)
    space[:] = 0
    space[: len(text)] = np.frombuffer(text, np.uint8)
    disk.write(handle, 0, [space.data])
    wanted = "pid 77" if text.startswith(b"pid 77") else "another process"
    with pytest.raises(TierFailed, match=f"in use by {wanted};"):
        opened(FaultyFiles(disk))
    first.close()


@pytest.mark.parametrize("protection", ["none", "hmac"])
@pytest.mark.parametrize("size_bytes", [0, 100, 4095, 4096])
def test_a_segment_cut_in_or_behind_its_header_can_be_used_again(
    size_bytes: int, protection: str, tmp_path: Path
) -> None:
    seal = None if protection == "none" else HmacSeal(bytes(range(32)))
    found: list[list[int]] = []
    for life in range(3):
        files = PortableFiles(tmp_path)
        tier = SegmentTier(files, PLAN, FINGERPRINT, pages_max=20, segment_cold_pages=2, seal=seal)
        found.append([page.page for page in tier.open()])
        if life < 2:
            fill(tier, [1, 2])
        out = aligned_array(PAGE_BYTES, 4096)
        assert tier.read_pages([2], [out]) == [True]
        assert bytes(out) == bytes(page_bytes(2))
        tier.close()
        files.shutdown()
        if life == 0:
            os.truncate(tmp_path / "segment-00000000.tkv", size_bytes)
    assert found == [[], [], [1, 2]]


def test_what_a_tier_counts_it_counts_every_time() -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")))
    tier = opened(files)
    fill(tier, [0, 1, 8])
    outs = [aligned_array(PAGE_BYTES, 4096) for _ in range(2)]
    for number in (1, 2):
        assert tier.read_pages([0, 8], outs) == [True, True]
        tier.sync()
        assert (tier.usage().pages_read, tier.usage().syncs) == (2 * number, number)
    assert (tier.usage().pages_written, tier.usage().stored, tier.io_errors) == (3, 3, 0)
    files.schedule = from_then_on(files.calls, Fault.EIO)
    assert tier.read_pages([0, 8], outs) == [False, False]
    files.schedule = None
    assert tier.io_errors == tier.usage().io_errors == 2
    assert (tier.usage().pages_read, tier.usage().stored, tier.usage().quarantined) == (4, 1, 2)
    fill(tier, [9])
    files.schedule = from_then_on(files.calls, Fault.EIO)
    with pytest.raises(TierFailed):
        tier.sync()
    files.schedule = None
    assert tier.usage().stored == 1 - (1 in tier.distrusted)
    assert [line for line in tier.check() if "segment" in line] == []


@pytest.mark.parametrize("is_clean", [True, False])
def test_a_page_that_does_not_verify_at_a_start_is_torn_only_after_a_crash(is_clean: bool) -> None:
    disk = MemoryFiles(Path("disk"))
    tier = opened(FaultyFiles(disk))
    fill(tier, [0, 1])
    tier.sync()
    if is_clean:
        tier.close()
    disk.shutdown()
    handle = disk.open("segment-00000000.tkv")
    space = aligned_array(4096, 4096)
    at = 4096 + 4096  # behind the headers of the segment and of page 0: its payload begins
    disk.read(handle, at, [space.data])
    space[100] ^= 1
    disk.write(handle, at, [space.data])
    again = SegmentTier(disk, PLAN, FINGERPRINT, pages_max=20, segment_cold_pages=2)
    found = sorted(page.page for page in again.open())

    assert found == ([0, 1] if is_clean else [1])
    assert again.usage().pages_torn == (0 if is_clean else 1)
    assert len(again.check()) == (0 if is_clean else 1)
    again.close()


def test_another_package_adds_a_seal_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("other", "tierkv.tiers.seals.hmac_sha256:HmacSeal", "tierkv.seals")

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [point] if group == point.group and name in (None, point.name) else []

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    assert SEALS.load("other") is HmacSeal
