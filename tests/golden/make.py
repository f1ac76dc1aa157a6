"""Make the golden cold directories of a format: `python -m tests.golden.make FORMAT FOLDER`.

Each is a tar.gz of a cold directory as the tierkv of its time leaves it, and `format_1.json` says
of each its layout, its tenants, the SHA-256 of its files, and the prompts that must be found in it.
The bytes of a prompt follow from its seed through SHAKE-256, which no library may change, so
nothing but the seed is written down. All is fixed, also what is random elsewhere, but for the order
in which threads write.

The committed files are what a format *was*: a new format gets new files beside these, and these are
not made again. Each variant is a life that has its own kind of rest on the disk:

- plain: three prompts, two with one beginning, closed cleanly.
- tenants: two namespaces with salts, and the default one.
- rewritten: pages filled bit by bit, so that their first copies were retired, then erased or
  written over by what came later.
- crashed: power lost during the second flush: marked unclean, its last page without its end.
- partial: five blocks in a page for sixteen.
- float32, float8: other dtypes; the second is a latent cache in two tensor-parallel ranks.

Format 2 is that of protected stores. Their key is `KEY`, for all to see:

- hmac, aes: as tenants.
- aes_crashed: as crashed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from tierkv.config import Config
from tierkv.core.geometry import Form, KVGeometry, Layout
from tierkv.store import Store
from tierkv.testing.files import MemoryFiles
from tierkv.testing.store import abandon
from tierkv.tiers.files.base import Buffer, aligned_array

Bytes = npt.NDArray[np.uint8]

KEY = hashlib.sha256(b"golden").digest()
BLOCK_TOKENS = 4
PAGES = {"hot": "1KiB", "warm": "4KiB", "cold": "8KiB"}
PLAIN = KVGeometry(layers=2, kv_heads=1, head_dim=8, dtype="float16")
FLOAT32 = KVGeometry(layers=1, kv_heads=2, head_dim=4, dtype="float32")
FLOAT8 = KVGeometry(
    layers=4, kv_heads=1, head_dim=24, dtype="float8_e4m3", form=Form.LATENT, tp_rank=1, tp_size=2
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The first `shared` of its blocks are prompt `shared_with`'s; all else is its seed's."""

    seed: int
    blocks: int
    namespace: str = "default"
    shared: int = 0
    shared_with: int = 0

    @property
    def tokens(self) -> list[int]:
        """Token ids of its blocks."""
        return self._joined("tokens", 4 * BLOCK_TOKENS).view("<u4").ravel().tolist()

    def data(self, layers: int, block_layer_bytes: int) -> Bytes:
        """Its bytes, uint8 (layers, blocks, block_layer_bytes)."""
        rows = self._joined("bytes", layers * block_layer_bytes)
        shape = (self.blocks, layers, block_layer_bytes)
        return np.ascontiguousarray(rows.reshape(shape).transpose(1, 0, 2))

    def _joined(self, what: str, block_bytes: int) -> Bytes:
        seeds = [self.shared_with] * self.shared + [self.seed] * (self.blocks - self.shared)
        rows = [
            hashlib.shake_256(f"{what}/{seed}/{block}".encode()).digest(block_bytes)
            for block, seed in enumerate(seeds)
        ]
        return np.frombuffer(b"".join(rows), np.uint8)


@dataclass(slots=True)
class Variant:
    """A directory to make: for whom, and what is done with its store."""

    name: str
    live: Callable[[Life], None]
    geometry: KVGeometry = PLAIN
    salts: dict[str, str] = field(default_factory=dict)
    host: str = "256KiB"
    cold: str = "128KiB"
    protection: str = "none"


def layout_of(geometry: KVGeometry, config: Config) -> Layout:
    """The layout that all golden directories but for the geometry share."""
    return Layout(
        geometry, BLOCK_TOKENS, model="golden", revision="1", targets=config.pages.targets
    )


def config_of(
    directory: Path,
    salts: dict[str, str],
    *,
    host: str,
    cold: str,
    protection: str = "none",
    key_file: Path | None = None,
) -> Config:
    """A store of pages of 4 KiB beneath `directory`; capacities of both tiers."""
    disk = {
        "capacity": cold,
        "directory": str(directory),
        "segment_cold_pages": 1,
        "threads": 1,
        "engine": "portable",
        "protection": protection,
        "key_file": key_file,
    }
    return Config.model_validate(
        {
            "block_tokens": BLOCK_TOKENS,
            "pages": PAGES,
            "tiers": {"host": {"capacity": host, "hugepages": "off"}, "cold": disk},
            "namespaces": {name: {"salt": salt} for name, salt in salts.items()},
        }
    )


class Disk(MemoryFiles):
    """A disk that remembers how it looked when a segment was about to be synced."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_armed = False
        self.at_sync: dict[str, bytes] = {}
        self._last: tuple[str, int, int] | None = None
        self._opened: dict[int, str] = {}

    def arm(self, *, is_armed: bool) -> None:
        """Whether the next sync of pages is to be the last one."""
        self.is_armed, self._last = is_armed, None

    def open(self, name: str, *, create: bool = False) -> int:
        handle = super().open(name, create=create)
        self._opened[handle] = name
        return handle

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        super().write(handle, offset, buffers)
        self._last = (self._opened[handle], offset, sum(len(part) for part in buffers))

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._opened = {h: target if n == source else n for h, n in self._opened.items()}

    def sync(self, handle: int) -> None:
        """When armed, the first sync that follows a write of pages is the one that never ends."""
        if self.is_armed and not self.at_sync and self._last is not None and self._last[1]:
            name, offset, size = self._last
            files = self.files()
            torn = bytearray(files[name])
            torn[offset + size - size // 4 : offset + size] = bytes(size // 4)
            self.at_sync = {**files, name: bytes(torn)}
        super().sync(handle)

    def files(self) -> dict[str, bytes]:
        """Every file but the lock, whose text is a process's number."""
        found = {}
        for name in self.names():
            if name != "lock":
                handle = super().open(name)
                data = aligned_array(self.size(handle), self.align_bytes)
                self.read(handle, 0, [data.data])
                self.close(handle)
                found[name] = data.tobytes()
        return found


class Life:
    """A store on a `Disk`, and the prompts that a flush has covered."""

    def __init__(self, variant: Variant, key_file: Path | None) -> None:
        self.disk = Disk(Path("disk"))
        self.config = config_of(
            Path("disk"),
            variant.salts,
            host=variant.host,
            cold=variant.cold,
            protection=variant.protection,
            key_file=key_file,
        )
        self.layout = layout_of(variant.geometry, self.config)
        self.durable: dict[int, Prompt] = {}
        self.others: dict[int, Prompt] = {}
        self.store = self._opened()

    def put(self, prompt: Prompt, *, crash: bool = False) -> None:
        """Put, flush, and keep book; `crash`: it ends while that flush syncs."""
        plan = self.layout.pages
        data = prompt.data(plan.layers, plan.block_layer_bytes)
        assert self.store.put(prompt.tokens, data, namespace=prompt.namespace) == prompt.blocks
        self.disk.arm(is_armed=crash)
        is_whole = self.store.flush()  # in a tier that is too small one page makes way for another
        assert is_whole or self.layout.pages.warm_pages_in(self.config.tiers.cold.capacity) < 16
        (self.others if crash else self.durable)[prompt.seed] = prompt

    def restart(self, prompt: Prompt) -> None:
        """Close, open, and read a prompt: its page is then in host memory, with holes."""
        self.store.close()
        self.store = self._opened()
        plan = self.layout.pages
        match = self.store.match(prompt.tokens, namespace=prompt.namespace)
        out = np.zeros((plan.layers, prompt.blocks, plan.block_layer_bytes), np.uint8)
        assert self.store.get(match, out) == prompt.blocks

    def end(self) -> dict[str, bytes]:
        """The files that are left; and what of the prompts eviction has left in them."""
        if self.disk.at_sync:
            abandon(self.store)
            return self.disk.at_sync
        self.store.close()
        files = self.disk.files()
        with self._opened() as store:
            for prompt in list(self.durable.values()):
                found = store.match(prompt.tokens, namespace=prompt.namespace).blocks
                del self.durable[prompt.seed]
                (self.durable if found == prompt.blocks else self.others)[prompt.seed] = prompt
        return files

    def _opened(self) -> Store:
        return Store.open(self.config, self.layout, files_for=lambda _root: self.disk)


def plain(life: Life) -> None:
    """Three prompts; the third goes on from the first."""
    life.put(Prompt(1, 16))
    life.put(Prompt(2, 9))
    life.put(Prompt(3, 20, shared=10, shared_with=1))


def tenants(life: Life) -> None:
    """The same tokens for nobody else: each tenant has its own seeds."""
    life.put(Prompt(11, 12, "alice"))
    life.put(Prompt(12, 12, "bob"))
    life.put(Prompt(13, 6))
    life.put(Prompt(14, 18, "alice", shared=12, shared_with=11))


def rewritten(life: Life) -> None:
    """Grow prompts in pages that were read back, then put more than five pages hold."""
    life.put(Prompt(21, 5))
    life.restart(Prompt(21, 5))
    life.put(Prompt(21, 13))
    life.put(Prompt(22, 3))
    life.restart(Prompt(22, 3))
    life.put(Prompt(22, 16))
    for seed in (23, 24, 25):
        life.put(Prompt(seed, 16))
    life.put(Prompt(26, 4))
    life.restart(Prompt(26, 4))
    life.put(Prompt(26, 14))


def crashed(life: Life) -> None:
    """Two prompts durable, a third lost on its way."""
    life.put(Prompt(31, 16))
    life.put(Prompt(32, 7))
    life.put(Prompt(33, 30), crash=True)


def partial(life: Life) -> None:
    """Less than a page."""
    life.put(Prompt(41, 5))


def two(life: Life) -> None:
    """Two prompts."""
    life.put(Prompt(51, 14))
    life.put(Prompt(52, 20, shared=3, shared_with=51))


SALTS = {"alice": "pepper", "bob": "Salz \u00e4"}
VARIANTS = (
    Variant("plain", plain),
    Variant("tenants", tenants, salts=SALTS),
    Variant("rewritten", rewritten, host="16KiB", cold="40KiB"),
    Variant("crashed", crashed),
    Variant("partial", partial),
    Variant("float32", two, FLOAT32),
    Variant("float8", two, FLOAT8),
)
VARIANTS_2 = (
    Variant("hmac", tenants, salts=SALTS, protection="hmac"),
    Variant("aes", tenants, salts=SALTS, protection="aes-256-gcm"),
    Variant("aes_crashed", crashed, protection="aes-256-gcm"),
)
FORMATS = {1: VARIANTS, 2: VARIANTS_2}


def write_key(folder: Path) -> Path:
    """A key file in `folder`."""
    path = folder / "key"
    path.write_text(KEY.hex() + "\n", encoding="ascii")
    path.chmod(0o600)
    return path


def made(variant: Variant) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a variant, and what the format's JSON says of it."""
    numbers = count()

    def token_bytes(size: int) -> bytes:
        number = next(numbers)
        if not number:  # the store's id
            return hashlib.sha256(variant.name.encode()).digest()[:size]
        return hashlib.shake_256(f"{variant.name}/{number}".encode()).digest(size)

    with (
        mock.patch("secrets.token_bytes", token_bytes),
        tempfile.TemporaryDirectory() as folder,
    ):
        is_plain = variant.protection == "none"
        life = Life(variant, None if is_plain else write_key(Path(folder)))
        variant.live(life)
        files = life.end()
    return files, ({} if is_plain else {"protection": variant.protection}) | {
        "geometry": asdict(variant.geometry),
        "salts": variant.salts,
        "host": variant.host,
        "cold": variant.cold,
        "fingerprint": life.layout.fingerprint.hex(),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "durable": [asdict(prompt) for prompt in life.durable.values()],
        "others": [asdict(prompt) for prompt in life.others.values()],
    }


def packed(files: dict[str, bytes]) -> bytes:
    """A tar.gz with nothing in it but names, modes and bytes."""
    raw, out = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))
    with gzip.GzipFile("", "wb", 9, out, mtime=0) as file:
        file.write(raw.getvalue())
    return out.getvalue()


def main(number: int, folder: Path) -> None:
    """Make every variant of a format; refuses to touch files that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {}
    for variant in FORMATS[number]:
        files, said[variant.name] = made(variant)
        with (folder / f"format_{number}_{variant.name}.tar.gz").open("xb") as file:
            file.write(packed(files))
    with (folder / f"format_{number}.json").open("x", encoding="utf-8") as file:
        json.dump(said, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
