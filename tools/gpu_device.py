"""What only a device can show, for tools/gpu_check.py; each says why it was skipped elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_parts import CPU, DEVICE, LLAMA, SMALL, Skipped, random_bytes, synchronize

from tierkv.kernels.driver import Driver
from tierkv.tiers.accelerator import HostLink, accelerators
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.files.gds import GdsFiles
from tierkv.tiers.host import HostTier
from tierkv.tiers.unified import unified_home

ROOT = Path(__file__).resolve().parents[1]

#: A process that maps the slab, says what it sees, and writes one page.
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from tierkv.tiers.slab import MappedSlab, SlabHandle
told = json.loads(sys.argv[2])
told["handle"] = bytes.fromhex(told["handle"])
with MappedSlab(SlabHandle(**told)) as slab:
    print(int(slab.pages.long().sum()))
    slab.pages[3].fill_(77)
    torch.cuda.synchronize()
"""


def devices() -> str:
    """What the driver says of the devices, and what the policies make of it."""
    if CPU:
        raise Skipped("no CUDA device")
    found = accelerators()
    assert found, "torch sees CUDA, the driver sees no device"
    return "; ".join(
        f"{one.number}: {one.name}, {one.memory_bytes >> 30} GiB, {one.link}, PCI {one.pci},"
        f" host node {one.host_node}, own node {one.memory_node}"
        for one in found
    )


def shared_slab() -> str:
    """Another process maps the slab by CUDA IPC, reads it, and writes into it."""
    if CPU:
        raise Skipped("CUDA IPC needs a CUDA device")
    if find_spec("cupy") is None:
        raise Skipped("CuPy is not installed")
    tier = DeviceTier(SMALL, frames=64, device="cuda:0")
    tier.open()
    tier.pool.copy_(random_bytes(*tier.pool.shape, seed=4))
    synchronize()
    expected = int(tier.pool.long().sum())
    handle = tier.share()
    told = {name: getattr(handle, name) for name in ("pages", "page_bytes", "card")}
    text = json.dumps(told | {"handle": handle.handle.hex()})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT), text], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == expected, "the child saw other bytes"
    assert bool((tier.pool[3] == 77).all()), "what the child wrote is not here"
    tier.close()
    return f"{tier.frames} blocks, read and written by a child"


def arena() -> str:
    """The pinned arena is usable while it grows, and copies of it are right before and after."""
    driver = None if CPU else Driver.load()
    if driver is None:
        raise Skipped("pinning needs a CUDA device")
    tier = HostTier(LLAMA, pages=600, registrar=driver.registrar(0))
    tier.open()
    pages = torch.from_numpy(tier.pages)
    pages[::50] = torch.arange(256, dtype=torch.uint8).repeat(LLAMA.warm_page_bytes // 256)
    early = tier.pinned_pages
    before = pages[::50].to(DEVICE)
    tier.wait_until_registered()
    assert tier.pinned_pages == tier.page_count, "not all of it could be pinned"
    assert torch.equal(before, pages[::50].to(DEVICE))
    del pages, before
    tier.close()
    return f"{early} of 600 pages were pinned when it opened, all at the end"


def coherent() -> str:
    """Advice and recall of system memory, where the device reads it through host page tables."""
    found = [] if CPU else accelerators()
    if not any(one.link is HostLink.COHERENT for one in found):
        raise Skipped("no coherent device (Grace-Hopper)")
    device = next(one for one in found if one.link is HostLink.COHERENT)
    home = unified_home(device)
    assert home is not None, "cuda.bindings is not installed"
    tier = HostTier(SMALL, pages=64, home=home)
    tier.open()
    strayed = tier.recall_strayed()
    tier.close()
    return f"advised; {strayed} bytes had strayed"


def direct_storage() -> str:
    """The probe of the GPUDirect Storage engine."""
    if CPU:
        raise Skipped("cuFile needs a CUDA device")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        reason = GdsFiles.probe(Path(folder))
    if reason is not None:
        raise Skipped(reason)
    return "a scratch file was written from device memory and read back"


def sanitizer() -> str:
    """compute-sanitizer over the kernels and the ring, at small sizes."""
    tool = None if CPU else shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("no CUDA device" if CPU else "compute-sanitizer is not installed")
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable]
        command += [str(ROOT / "tools" / "gpu_check.py"), "--only", "copies", "--only", "relayouts"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
        except subprocess.TimeoutExpired:
            raise Skipped(f"{kind} took more than 90 s") from None
        assert done.returncode == 0, f"{kind}: {done.stdout[-2000:]}"
    return "memcheck and racecheck find nothing"
