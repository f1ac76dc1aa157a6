"""The cold directories that the drills `flips` and `hostile` damage, and what is in them.

Images are made once in a process, by a real `Store` on a simulated disk.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tierkv.assembly import plan_spec
from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.core.keys import KeyChain
from tierkv.store import Store
from tierkv.testing.files import MemoryFiles, _Inode
from tierkv.testing.store import abandon
from tierkv.tiers.segment_format import SEGMENT_HEADER_BYTES, page_header_bytes
from tierkv.tiers.segments import SegmentTier

Bytes: TypeAlias = npt.NDArray[np.uint8]
Image: TypeAlias = dict[str, bytearray]
Place: TypeAlias = tuple[str, int]

_COLD: Final = {"capacity": "64KiB", "directory": "disk", "segment_cold_pages": 1, "threads": 1}
CONFIG: Final = Config.model_validate(
    {
        "block_tokens": 4,
        "pages": {"hot": "1KiB", "warm": "4KiB", "cold": "8KiB"},
        "tiers": {"host": {"capacity": "64KiB"}, "device": {"capacity": 0}, "cold": _COLD},
        "namespaces": {"default": {}, "other": {"salt": "s"}},
    }
)
_GEOMETRY: Final = KVGeometry(layers=2, kv_heads=1, head_dim=16, dtype="float16")
LAYOUT: Final = Layout(_GEOMETRY, targets=CONFIG.pages.targets, model="m", block_tokens=4)
PLAN: Final = LAYOUT.pages
_FINGERPRINT: Final = LAYOUT.fingerprint
_chain: Final = partial(KeyChain, _FINGERPRINT, block_tokens=CONFIG.block_tokens)
_CHAINS: Final = {
    name: _chain(namespace=name, salt=space.salt.encode())
    for name, space in CONFIG.namespaces.items()
}
SPEC: Final = plan_spec(CONFIG, PLAN, _CHAINS)
HEADER: Final = page_header_bytes(PLAN.warm_page_blocks)
SLOT: Final = HEADER + PLAN.warm_page_bytes
PAGES_MAX: Final = CONFIG.tiers.cold.capacity // SLOT
PER_SEGMENT: Final = PLAN.cold_page_warm_pages


class Prompt(NamedTuple):
    """Tokens, their namespace, their keys, and the bytes that belong to each of their blocks."""

    namespace: str
    tokens: list[int]
    keys: list[bytes]
    rows: Bytes


class Site(NamedTuple):
    """A directory's files now and earlier; per stored page its blocks, per key its newest page."""

    files: dict[str, bytes]
    earlier: dict[str, bytes]
    stored: dict[int, int]
    page_of: dict[bytes, int]

    @property
    def segments(self) -> list[str]:
        """Names of the segment files."""
        return sorted(name for name in self.files if name.startswith("segment-"))

    def pages_in(self, name: str) -> frozenset[int]:
        """Stored pages of a file."""
        return frozenset(page for page in self.stored if slot_of(page)[0] == name)


@lru_cache(maxsize=1)
def prompts() -> list[Prompt]:
    """Prompts of a page and more, some with a common beginning, in two namespaces."""
    rng = random.Random("flips")
    starts = [[rng.randrange(100, 1000) for _ in range(32)] for _ in range(3)]
    made = []
    for number, blocks in enumerate((16, 12, 11, 8, 14, 9)):
        tail = [rng.randrange(100, 1000) for _ in range(4 * blocks - 32)]
        namespace = ("default", "default", "other")[number % 3]
        made.append(prompt_of(namespace, starts[number % 3] + tail))
    return made


def prompt_of(namespace: str, tokens: list[int]) -> Prompt:
    """The prompt of these tokens."""
    keys = _CHAINS[namespace].of_tokens(tokens)
    return Prompt(namespace, tokens, [*keys], np.stack([bytes_of(key) for key in keys], axis=1))


@lru_cache(maxsize=256)
def bytes_of(key: bytes) -> Bytes:
    """What belongs to a block: (layers, block_layer_bytes), from its key alone."""
    rng = np.random.default_rng(list(key))
    return rng.integers(0, 256, (PLAN.layers, PLAN.block_layer_bytes), dtype=np.uint8)


@lru_cache(maxsize=1)
def images() -> tuple[Site, ...]:
    """The directory after a clean stop, and after a kill, with what it held before."""
    disk = MemoryFiles(Path("disk"))
    with Store.open(CONFIG, LAYOUT, files_for=lambda _root: disk) as store:
        _put(store, prompts()[:2])
    earlier = _files_of(disk)
    store = Store.open(CONFIG, LAYOUT, files_for=lambda _root: disk)
    _put(store, prompts()[2:])
    killed = _files_of(disk)
    abandon(store)
    disk = disk_of(killed)
    with Store.open(CONFIG, LAYOUT, files_for=lambda _root: disk) as store:
        _put(store, prompts()[::-1])
    return _site(_files_of(disk), earlier), _site(killed, earlier)


def _put(store: Store, some: list[Prompt]) -> None:
    for prompt in some:
        store.put(prompt.tokens, prompt.rows, namespace=prompt.namespace)
        store.flush()


def _site(files: dict[str, bytes], earlier: dict[str, bytes]) -> Site:
    found = tier_on(disk_of(files)).open()
    found.sort(key=lambda one: one.generation)
    page_of = {block.key: one.page for one in found for block in one.label.blocks}
    return Site(files, earlier, {one.page: len(one.label.blocks) for one in found}, page_of)


def disk_of(files: Mapping[str, bytes | bytearray]) -> MemoryFiles:
    """A disk with these files, all durable."""
    disk = MemoryFiles(Path("disk"))
    disk._names = {name: _Inode(bytearray(d), bytearray(d)) for name, d in files.items()}
    disk._durable_names = dict(disk._names)
    return disk


def _files_of(disk: MemoryFiles) -> dict[str, bytes]:
    return {name: bytes(inode.seen) for name, inode in disk._names.items()}


def tier_on(disk: MemoryFiles) -> SegmentTier:
    """The cold tier of `CONFIG` on a disk."""
    return SegmentTier(disk, PLAN, _FINGERPRINT, pages_max=PAGES_MAX, segment_cold_pages=1)


def slot_of(page: int) -> Place:
    """The file of a page, and where in it its header begins."""
    offset = SEGMENT_HEADER_BYTES + page % PER_SEGMENT * SLOT
    return f"segment-{page // PER_SEGMENT:08d}.tkv", offset
