"""What is put under one layout or tenant is never found under another.

A case draws two users of one cold directory, A and B, that differ in some of `FIELDS`: first in
none, then in each field alone, then in each pair of fields, then at random (often in none, often in
names that are joined alike: "ab" + "c" and "a" + "bc"). A puts a prompt and stops. B asks for the
same prompt, by its own keys and with a match made by hand, and finds nothing unless it equals A;
then B puts bytes of its own and gets those. A, opened again, gets exactly its own. B's store on
A's very files refuses, and changes none of them. Last, keys and fingerprints of many users, those
two among them, are all different.

Where B does not configure A's tenant, A's pages are free to it, so A may find less after B's put,
but nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tierkv.config import Config, NamespaceConfig
from tierkv.core.errors import GeometryMismatch, TierFailed
from tierkv.core.geometry import DTYPE_BYTES, Form, KVGeometry, Layout, PageTargets
from tierkv.core.keys import BlockKey, KeyChain
from tierkv.reading import Match
from tierkv.store import Store
from tierkv.testing.drills.base import (
    BROKEN,
    LOST,
    WRONG_BYTES,
    Tally,
    Wrong,
    case_random,
    run_cases,
)
from tierkv.testing.files import MemoryFiles
from tierkv.tiers.files.base import FileEngine
from tierkv.tiers.files.portable import PortableFiles

Bytes = npt.NDArray[np.uint8]

NAME: Final = "layouts"
_PAGES: Final = {"hot": "1KiB", "warm": "16KiB", "cold": "32KiB"}
_TARGETS: Final = PageTargets(1 << 10, 16 << 10, 32 << 10)


@dataclass(frozen=True, slots=True)
class User:
    """Everything that says whose bytes these are, flat; the fields are those of `FIELDS`."""

    dtype: str = "bfloat16"
    block_tokens: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    value_dim: int | None = None
    layers: int = 2
    tp_rank: int = 0
    tp_size: int = 2
    form: Form = Form.KV
    model: str = "m"
    revision: str = "1"
    codec: str = "raw"
    engine_layout: str = "canonical"
    namespace: str = "tenant"
    salt: str = ""

    def layout(self) -> Layout:
        """The layout of its store. Raises GeometryMismatch for fields that do not fit together."""
        geometry = KVGeometry(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            form=self.form,
            value_dim=self.value_dim,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
        )
        names = (self.model, self.revision, self.codec, self.engine_layout)
        return Layout(geometry, self.block_tokens, *names, targets=_TARGETS)

    def keys(self, tokens: list[int]) -> list[BlockKey]:
        """Its keys, as a store would make them."""
        fingerprint = self.layout().fingerprint
        chain = KeyChain(
            fingerprint,
            namespace=self.namespace,
            salt=self.salt.encode(),
            block_tokens=self.block_tokens,
        )
        return chain.of_tokens(tokens)

    def bytes_of(self, tokens: list[int], seed: int) -> Bytes:
        """Bytes for the whole blocks of a prompt."""
        plan = self.layout().pages
        shape = (plan.layers, plan.blocks_in(len(tokens)), plan.block_layer_bytes)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


_TEXTS: Final = ("", "a", "b", "ab", "a/b", "A", "a\n", "1", "raw", "model=a", "\u00e4", "a\u0308")
#: The values that are drawn for each field. Many give pages of one size: sizes alone tell nothing.
_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "dtype": tuple(DTYPE_BYTES),
    "block_tokens": (4, 8, 16),
    "kv_heads": (1, 1, 2, 4, 8),
    "head_dim": (8, 16, 32),
    "value_dim": (None, None, 4, 24),
    "layers": (1, 2, 3, 4),
    "tp_rank": (0, 1, 2, 3),
    "tp_size": (1, 2, 4),
    "form": (Form.KV, Form.LATENT),
    "model": _TEXTS,
    "revision": _TEXTS,
    "codec": (*_TEXTS, "int8"),
    "engine_layout": (*_TEXTS, "canonical"),
    "namespace": ("tenant", "tenant-b", "tenant.b", "Tenant", "t"),
    "salt": ("", "s", "S", "s ", "\u00e4", "a\u0308"),
}
FIELDS: Final = tuple(_VALUES)
_TENANT: Final = frozenset({"namespace", "salt"})
_NAMES: Final = ("model", "revision", "codec", "engine_layout")


def run(cases: int, seed: int) -> Tally:
    """Cases 0 .. `cases`; from `systematic()` on they are random."""
    return run_cases(NAME, _case, cases, seed)


def replay(seed: int, case: int) -> None:
    """One case again; raises what was wrong with it."""
    _case(case_random(NAME, seed, case), case)


@lru_cache(maxsize=1)
def systematic() -> list[frozenset[str]]:
    """What differs in the first cases: nothing, each field, each pair of fields."""
    sets = [frozenset[str]()]
    for count in (1, 2):
        sets += [frozenset(some) for some in combinations(FIELDS, count)]
    return sets


def draw(rng: random.Random, number: int) -> tuple[User, User]:
    """The two users of a case."""
    known = systematic()
    if number < len(known):
        return _draw_apart(rng, known[number])
    kind = rng.randrange(6)
    if kind == 0:
        return _draw_apart(rng, frozenset())
    if kind == 1:
        return _draw_joined(rng)
    return _draw_apart(rng, frozenset(rng.sample(FIELDS, rng.randint(1, len(FIELDS)))))


def difference(a: User, b: User) -> frozenset[str]:
    """The fields in which two users differ."""
    return frozenset(name for name in FIELDS if getattr(a, name) != getattr(b, name))


def _draw_apart(rng: random.Random, wanted: frozenset[str]) -> tuple[User, User]:
    """Two users that differ in exactly these fields, drawn until they are possible."""
    while True:
        a = replace(User(), **{name: rng.choice(some) for name, some in _VALUES.items()})
        b = replace(a, **{name: rng.choice(_VALUES[name]) for name in FIELDS if name in wanted})
        if difference(a, b) != wanted:
            continue
        try:
            layouts = a.layout(), b.layout()
        except GeometryMismatch:
            continue
        # A value_dim that equals head_dim says nothing, so it may not be all that differs.
        if (layouts[0] == layouts[1]) == (wanted <= _TENANT):
            return a, b


def _draw_joined(rng: random.Random) -> tuple[User, User]:
    """Two users whose names differ, but are one text when they are joined."""
    a, _ = _draw_apart(rng, frozenset())
    one, other = rng.sample(_NAMES, 2)
    text = rng.choice(("abc", "model=a", "=", "aa", "\x04\0\0\0a", "revision=1", "a\0b"))
    cuts = rng.sample(range(len(text) + 1), 2)
    first, second = (_cut_at(a, one, other, text, cut) for cut in cuts)
    return first, second


def _cut_at(user: User, one: str, other: str, text: str, cut: int) -> User:
    names: dict[str, Any] = {one: text[:cut], other: text[cut:]}
    return replace(user, **names)


class _Disk:
    """A cold directory that two users share: simulated, or a real one."""

    def __init__(self, root: Path, *, is_real: bool) -> None:
        self.root = root
        self._is_real = is_real
        self._memory: dict[str, MemoryFiles] = {}

    def engine(self, root: Path) -> FileEngine:
        """A file engine on one layout's part of it."""
        if self._is_real:
            return PortableFiles(root)
        return self._memory.setdefault(root.name, MemoryFiles(root))

    def part_of(self, user: User) -> Path:
        """Where that user's layout lies."""
        return self.root / user.layout().fingerprint.hex()[:16]

    def contents(self, user: User) -> dict[str, bytes]:
        """Every file of that part but the lock, whose text is the last opener's."""
        root = self.part_of(user)
        if self._is_real:
            return {p.name: p.read_bytes() for p in root.iterdir() if p.name != "lock"}
        files = self._memory[root.name]
        return {name: _whole(files, name) for name in files.names() if name != "lock"}


def _whole(files: MemoryFiles, name: str) -> bytes:
    handle = files.open(name)
    try:
        out = np.zeros(files.size(handle) + files.align_bytes, np.uint8)
        start = -out.ctypes.data % files.align_bytes
        view = out[start : start + files.size(handle)]
        files.read(handle, 0, [view.data])
    finally:
        files.close(handle)
    return view.tobytes()


@contextmanager
def _disk(number: int) -> Iterator[_Disk]:
    """Every fourth case is on a real directory."""
    if number % 4 == 3:
        with TemporaryDirectory(prefix="tierkv-") as root:
            yield _Disk(Path(root), is_real=True)
    else:
        yield _Disk(Path("disk"), is_real=False)


@lru_cache(maxsize=1)
def _base_config() -> Config:
    """What all stores here share; made once, as it looks for plug-ins among what is installed."""
    cold = {"capacity": "2MiB", "directory": "disk", "segment_cold_pages": 2, "threads": 1}
    tiers = {"host": {"capacity": "1MiB", "hugepages": "off"}, "cold": cold}
    return Config.model_validate({"pages": _PAGES, "tiers": tiers})


def _config_of(disk: _Disk, user: User, tenants: tuple[User, ...]) -> Config:
    base = _base_config()
    cold = base.tiers.cold.model_copy(update={"directory": disk.root})
    spaces = {one.namespace: NamespaceConfig(salt=one.salt) for one in (*tenants, user)}
    return base.model_copy(
        update={
            "block_tokens": user.block_tokens,
            "tiers": base.tiers.model_copy(update={"cold": cold}),
            "namespaces": base.namespaces | spaces,
        }
    )


def _open(disk: _Disk, user: User, *tenants: User, on: Path | None = None) -> Store:
    """That user's store, with more tenants known; `on`: in another layout's part."""
    config = _config_of(disk, user, tenants)
    files_for: Callable[[Path], FileEngine] = disk.engine
    if on is not None:
        part = on
        files_for = lambda _root: disk.engine(part)  # noqa: E731 one line says it
    return Store.open(config, user.layout(), files_for=files_for)


def _case(rng: random.Random, number: int) -> None:
    a, b = draw(rng, number)
    tokens = [rng.randrange(1 << 32) for _ in range(rng.randint(16, 90))]
    bytes_a, bytes_b = a.bytes_of(tokens, rng.getrandbits(32)), b.bytes_of(tokens, number)
    _expect_identities(rng, a, b, tokens)
    knows_a = a.namespace != b.namespace
    tenants = (a,) if knows_a else ()
    with _disk(number) as disk:
        with _open(disk, a) as store:
            _put(store, a, tokens, bytes_a)
        if a.layout() != b.layout():
            _expect_refusal(disk, a, b)
        with _open(disk, b, *tenants) as store:
            _read_foreign(store, a, b, tokens, bytes_a)
            _put(store, b, tokens, bytes_a if a == b else bytes_b)
            store.check()
        with _open(disk, b, *tenants) as store:
            _expect_whole(store, b, tokens, bytes_a if a == b else bytes_b)
        with _open(disk, a, *((b,) if knows_a else ())) as store:
            if knows_a or a == b or a.layout() != b.layout():
                _expect_whole(store, a, tokens, bytes_a)
            else:
                _expect_prefix(store, a, tokens, bytes_a)
            store.check()


def _put(store: Store, user: User, tokens: list[int], data: Bytes) -> None:
    stored = store.put(tokens, data, namespace=user.namespace)
    if stored != data.shape[1]:
        raise Wrong(BROKEN, f"{stored} of {data.shape[1]} blocks were taken, by {user}")
    if not store.flush():
        raise Wrong(BROKEN, f"flush failed, of {user}")


def _read(store: Store, match: Match) -> Bytes:
    plan = store.plan
    out = np.zeros((plan.layers, match.blocks, plan.block_layer_bytes), np.uint8)
    return out[:, : store.get(match, out)]


def _expect_prefix(store: Store, user: User, tokens: list[int], data: Bytes) -> int:
    found = _read(store, store.match(tokens, namespace=user.namespace))
    blocks = int(found.shape[1])
    if not np.array_equal(found, data[:, :blocks]):
        raise Wrong(WRONG_BYTES, f"{user} got bytes that it did not put")
    return blocks


def _expect_whole(store: Store, user: User, tokens: list[int], data: Bytes) -> None:
    blocks = _expect_prefix(store, user, tokens, data)
    if blocks != data.shape[1]:
        raise Wrong(LOST, f"{blocks} of {data.shape[1]} blocks of {user}")


def _read_foreign(store: Store, a: User, b: User, tokens: list[int], data: Bytes) -> None:
    """B asks for what A has put: all of it where they are equal, else nothing in any way."""
    if a == b:
        _expect_whole(store, b, tokens, data)
        return
    found = store.match(tokens, namespace=b.namespace)
    made = Match(store.keys(tokens, namespace=b.namespace), b.block_tokens, b.namespace, {})
    got = int(_read(store, made).shape[1])
    if found.blocks or got:
        differ = ", ".join(sorted(difference(a, b)))
        raise Wrong(WRONG_BYTES, f"{b} found {found.blocks}, got {got} blocks of {a}: {differ}")


def _expect_refusal(disk: _Disk, a: User, b: User) -> None:
    """B's store on A's files: refused in words, and not a byte changed."""
    before = disk.contents(a)
    try:
        _open(disk, b, on=disk.part_of(a)).close()
    except TierFailed as error:
        if "another layout" not in str(error):
            raise Wrong(BROKEN, f"refused without the reason: {error}") from error
    else:
        raise Wrong(WRONG_BYTES, f"{b} opened the files of {a}")
    if disk.contents(a) != before:
        raise Wrong(LOST, f"the refusal of {b} changed the files of {a}")


def _expect_identities(rng: random.Random, a: User, b: User, tokens: list[int]) -> None:
    """No two different layouts share a fingerprint, no two different chains a key."""
    users = [a, b, *_cut_apart(a)]
    users += [user for _ in range(2) for user in (*_draw_joined(rng), *_draw_apart(rng, _TENANT))]
    prints: dict[bytes, Layout] = {}
    owners: dict[bytes, tuple[Layout, str, int]] = {}
    for user in users:
        layout = user.layout()
        if prints.setdefault(layout.fingerprint, layout) != layout:
            raise Wrong(WRONG_BYTES, f"{layout} and {prints[layout.fingerprint]} are one")
        for position, key in enumerate(user.keys(tokens)):
            owner = (layout, user.salt, position)
            if owners.setdefault(key, owner) != owner:
                raise Wrong(WRONG_BYTES, f"{owner} and {owners[key]} have one key")


def _cut_apart(user: User) -> list[User]:
    """The user under every way to cut one text into two of its names."""
    text = (user.model + user.revision) or "ab"
    pairs = combinations(_NAMES, 2)
    return [_cut_at(user, *pair, text, cut) for pair, cut in product(pairs, range(len(text) + 1))]
