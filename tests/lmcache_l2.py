"""What `test_lmcache_adapter.py` asks of the adapter beside LMCache's own classes.

    python tests/lmcache_l2.py PART DIRECTORY

It runs where LMCache is installed, without pytest. Each part is a function; an AssertionError says
what is wrong.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

os.environ.update(LMCACHE_LOG_LEVEL="ERROR", LMCACHE_TRACK_USAGE="false")

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import (
    FSL2Adapter,
    FSL2AdapterConfig,
)
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import (
    PluginL2AdapterConfig,
    _create_plugin_adapter,
)
from lmcache.v1.memory_management import (
    MemoryFormat,
    MemoryObj,
    MemoryObjMetadata,
    TensorMemoryObj,
)
from lmcache.v1.platform import consume_fd

from tierkv.core.errors import ConfigError
from tierkv.engines.lmcache import TierKVL2Adapter, forms, shelf
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.files.direct import DirectFiles
from tierkv.tiers.host import HostTier

#: What a chunk of each object group is.
SHAPES = {0: [(2, 3, 8, 64)], 1: [(3, 100), (5,)]}
DTYPES = {0: [torch.float32], 1: [torch.bfloat16, torch.uint8]}
LAYOUTS = {
    group: MemoryLayoutDesc([torch.Size(s) for s in SHAPES[group]], DTYPES[group])
    for group in (0, 1)
}
SIZES = {0: 12288, 1: 605}
#: What a serde might make of a chunk.
SMALL: dict[str, Any] = {"shapes": [(3072,)], "dtypes": [torch.uint8]}

Buffers = Sequence[Buffer]
Shapes = list[tuple[int, ...]]
Found = TypeVar("Found")


def key(number: int, *, group: int = 0, salt: str = "", model: str = "org/model") -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"), model, 0x01000100, group, salt)


KEYS = [
    *(key(number) for number in range(5)),
    *(key(number, group=1) for number in range(3)),
    key(0, salt="alice"), key(0, salt="bob"), key(0, model="org/other"),
    ObjectKey((0).to_bytes(32, "big"), "org/model", 0x02010201),
]  # fmt: skip


def chunk(
    group: int = 0,
    fill: int | None = None,
    *,
    shapes: Shapes | None = None,
    dtypes: list[torch.dtype] | None = None,
) -> MemoryObj:
    """A buffer of a group's form, filled from a seed, or with what nobody stores."""
    sizes = [torch.Size(shape) for shape in shapes or SHAPES[group]]
    dtypes = dtypes or DTYPES[group]
    size = sum(s.numel() * d.itemsize for s, d in zip(sizes, dtypes, strict=True))
    data = torch.full((size,), 0xA5, dtype=torch.uint8)
    if fill is not None:
        data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=_seeded(fill))
    meta = MemoryObjMetadata(sizes[0], dtypes[0], 0, size, 1, fmt=MemoryFormat.KV_2LTD,
                             shapes=sizes, dtypes=dtypes)  # fmt: skip
    return TensorMemoryObj(data, meta, None)


def content(fill: int, small: bool = False) -> bytes:
    """What such a chunk holds. It is copied while there is a chunk: a view does not keep one."""
    made = chunk(fill=fill, **SMALL) if small else chunk(fill=fill)
    return bytes(made.byte_array)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(place: Path, *, host: str = "128KiB", cold: str = "4MiB") -> L2AdapterInterface:
    """As the server makes it."""
    found = {"host": host, "cold": cold, "directory": str(place / "kv")}
    return plugin(found)


def plugin(params: dict[str, Any]) -> L2AdapterInterface:
    config = {"module_path": "tierkv.engines.lmcache", "class_name": "TierKVL2Adapter"}
    return _create_plugin_adapter(
        PluginL2AdapterConfig.from_dict({**config, "adapter_params": params})
    )


def waited(fd: int, ask: Callable[[], Found | None]) -> Found:
    """What a task gives, when the descriptor says that it has ended."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while (found := ask()) is None:
        assert poller.poll(30_000), "no event within 30 s"
        consume_fd(fd)
    return found


def store(adapter: L2AdapterInterface, keys: list[ObjectKey], chunks: list[MemoryObj]) -> int:
    task = adapter.submit_store_task(keys, chunks)
    fd = adapter.get_store_event_fd()
    return int(waited(fd, lambda: adapter.pop_completed_store_tasks().get(task)))


def lookup(
    adapter: L2AdapterInterface,
    keys: list[ObjectKey],
    layouts: dict[int, MemoryLayoutDesc] | None = None,
) -> list[int]:
    task = adapter.submit_lookup_and_lock_task(keys, LAYOUTS if layouts is None else layouts)
    fd = adapter.get_lookup_and_lock_event_fd()
    found = waited(fd, lambda: adapter.query_lookup_and_lock_result(task)).get_indices_list()
    assert adapter.query_lookup_and_lock_result(task) is None, "a result came twice"
    return list(found)


def load(
    adapter: L2AdapterInterface, keys: list[ObjectKey], chunks: list[MemoryObj] | None = None
) -> dict[int, bytes]:
    """What was loaded, by the number of its key."""
    chunks = [chunk(k.object_group_id) for k in keys] if chunks is None else chunks
    task = adapter.submit_load_task(keys, chunks)
    fd = adapter.get_load_event_fd()
    found = waited(fd, lambda: adapter.query_load_result(task)).get_indices_list()
    assert adapter.query_load_result(task) is None, "a result came twice"
    return {number: bytes(chunks[number].byte_array) for number in found}


@contextmanager
def refused(kind: type[Exception]) -> Iterator[list[str]]:
    """Gives the error that has to come."""
    errors: list[str] = []
    try:
        yield errors
    except kind as error:
        errors.append(str(error))


# ---- parts


class Beside(RuleBasedStateMachine):
    """Random operations on tierkv and on LMCache's own adapter of files: all is the same."""

    place: Path

    @initialize()
    def begin(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.locked: list[ObjectKey] = []
        self.fill = 0
        self._open()

    def _open(self) -> None:
        self.two = ours(self.place), FSL2Adapter(FSL2AdapterConfig(str(self.place / "fs")))

    some = st.lists(st.sampled_from(KEYS), min_size=1, max_size=8, unique=True)

    @rule(keys=some)
    def stores(self, keys: list[ObjectKey]) -> None:
        self.fill += 1
        chunks = [chunk(k.object_group_id, self.fill * 100 + n) for n, k in enumerate(keys)]
        found = [store(one, keys, chunks) for one in self.two]
        assert found[0] == found[1], f"stored bytes {found}"

    @rule(keys=some, says_layouts=st.booleans())
    def looks(self, keys: list[ObjectKey], says_layouts: bool) -> None:
        layouts = LAYOUTS if says_layouts else {}
        found = [lookup(one, keys, layouts) for one in self.two]
        assert found[0] == found[1], f"found {found}"
        self.locked += [keys[number] for number in found[0]]

    @rule(keys=some)
    def loads(self, keys: list[ObjectKey]) -> None:
        found = [load(one, keys) for one in self.two]
        assert found[0] == found[1], f"loaded {[sorted(one) for one in found]}"

    @rule(keys=some)
    def deletes(self, keys: list[ObjectKey]) -> None:
        for one in self.two:
            one.delete(keys)
        assert not lookup(self.two[0], keys)

    @rule()
    def unlocks(self) -> None:
        for one in self.two:
            one.submit_unlock(self.locked)
        self.locked.clear()

    @rule()
    def restarts(self) -> None:
        for one in self.two:
            one.close()
        self._open()
        self.locked.clear()
        there = lookup(self.two[0], KEYS)
        usage = self.two[0].get_usage()
        assert usage.total_bytes_used == sum(SIZES[KEYS[n].object_group_id] for n in there)
        assert sum(usage.bytes_by_cache_salt.values()) == usage.total_bytes_used
        self.two[0].submit_unlock([KEYS[number] for number in there])

    def teardown(self) -> None:
        for one in getattr(self, "two", ()):
            one.close()


def beside(place: Path) -> None:
    """Equal to LMCache's own adapter of files, on random operations with restarts."""
    Beside.place = place
    found = settings(max_examples=30, stateful_step_count=25, deadline=None, print_blob=True)
    run_state_machine_as_test(Beside, settings=found)


class _Heard(L2AdapterListener):
    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.said.append(("stored", sum(sizes)))

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.said.append(("accessed", len(keys)))

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.said.append(("deleted", len(keys)))


def interface(place: Path) -> None:
    """Descriptors, task numbers, listeners, usage, status and the end of it."""
    adapter, heard = ours(place), _Heard()
    adapter.register_listener(heard)
    assert isinstance(adapter, L2AdapterInterface)
    fds = [adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(),
           adapter.get_load_event_fd()]  # fmt: skip
    assert len(set(fds)) == 3
    assert lookup(adapter, []) == []
    assert load(adapter, []) == {}
    assert store(adapter, [], []) == 0
    assert adapter.query_load_result(999) is None
    two = KEYS[:2]
    assert store(adapter, two, [chunk(fill=1), chunk(fill=2)]) == 2 * SIZES[0]
    assert store(adapter, two, [chunk(fill=3), chunk(fill=4)]) == 0, "known chunks were stored"
    assert load(adapter, two) == {n: content(n + 1) for n in (0, 1)}
    assert load(adapter, [two[0], two[0]]).keys() == {0, 1}
    adapter.delete(two[:1])
    assert heard.said == [
        ("stored", 2 * SIZES[0]),
        ("accessed", 2),
        ("accessed", 2),
        ("deleted", 1),
    ]
    assert adapter.supports_global_eviction
    assert dict(adapter.get_usage().bytes_by_cache_salt) == {"": SIZES[0]}
    status = adapter.report_status()
    assert status["is_healthy"]
    assert status["counts"]["stored"] == 2
    adapter.close()
    adapter.close()
    assert adapter.submit_load_task(two, [chunk(), chunk()])
    assert not adapter.report_status()["is_healthy"]


def settings_of(place: Path) -> None:
    """What is not known, or cannot be, is said where the adapter is made."""
    for params, wanted in [
        ({"directori": "x"}, "unknown directori"),
        ({"host": "1 furlong"}, "tiers.host"),
        ({"config": str(place / "none.yaml")}, "none.yaml"),
    ]:
        with refused(ConfigError) as errors:
            plugin(params)
        assert wanted in errors[0], errors
    file = place / "tierkv.yaml"
    file.write_text("tiers: {host: {capacity: 1MiB}, cold: {capacity: 4MiB, directory: kv}}\n"
                    "namespaces: {alice: {salt: pepper}}\n")  # fmt: skip
    adapter = plugin({"config": str(file)})
    both = [key(1, salt="alice"), key(1)]
    store(adapter, both, [chunk(fill=1), chunk(fill=2)])
    adapter.close()
    file.write_text(file.read_text().replace("pepper", "thyme"))
    adapter = plugin({"config": str(file)})
    assert lookup(adapter, both) == [1], "a tenant's secret is not in the key"
    adapter.close()


def forms_apart(place: Path) -> None:
    """The same key with another dtype, shape or size is another chunk; LMCache's own mixes them."""
    adapter = ours(place)
    files = FSL2Adapter(FSL2AdapterConfig(str(place / "fs")))
    one = KEYS[:1]
    for each in (adapter, files):
        store(each, one, [chunk(fill=1)])
    others = [([(2, 3, 8, 64)], [torch.int32]), ([(2, 3, 4, 64)], [torch.float32]),
              ([(2, 3, 8, 64)], [torch.bfloat16])]  # fmt: skip
    for shapes, dtypes in others:
        layouts = {0: MemoryLayoutDesc([torch.Size(shape) for shape in shapes], dtypes)}
        assert lookup(adapter, one, layouts) == []
        assert load(adapter, one, [chunk(shapes=shapes, dtypes=dtypes)]) == {}
        assert load(files, one, [chunk(shapes=shapes, dtypes=dtypes)]), "this has been cured"
    assert lookup(adapter, one) == [0]
    with patch.object(forms, "FORMS_MAX", 3):
        more = chunk(shapes=[(77, 3)], dtypes=[torch.float32])
        assert store(adapter, [key(7)], [more]) == -1
    assert "more are kept" in str(adapter.report_status()["refused"])
    adapter.close()
    files.close()


def serialized(place: Path) -> None:
    """What a serde made bytes of is asked for by the layout of what it was, after restarts too."""
    adapter = ours(place)
    assert store(adapter, KEYS[:1], [chunk(fill=1, **SMALL)]) == 3072
    assert lookup(adapter, KEYS[:1]) == [0]
    adapter.close()
    adapter = ours(place)
    assert lookup(adapter, KEYS[:1]) == [0]
    found = load(adapter, KEYS[:1], [chunk(**SMALL)])
    assert found == {0: content(1, small=True)}
    adapter.close()
    adapter = ours(place)
    adapter.delete(KEYS[:1])  # no form of it was asked for in this life
    assert lookup(adapter, KEYS[:1]) == []
    adapter.close()


def locks(place: Path) -> None:
    """What is locked outlives what is put after it, until it was loaded or unlocked."""
    adapter = ours(place, host="32KiB", cold="80KiB")  # two chunks, and five with their headers
    many = [key(number) for number in range(100, 112)]

    def pressed() -> list[int]:
        """Fill the disk with other chunks, and see which of the first two are left."""
        for number, each in enumerate(many):
            store(adapter, [each], [chunk(fill=number)])
        left = sorted(load(adapter, KEYS[:2]))
        adapter.delete([*many, *KEYS[:2]])
        return left

    def put_two() -> None:
        store(adapter, KEYS[:2], [chunk(fill=1), chunk(fill=2)])
        for number, each in enumerate(many[:2]):  # so that only the disk has the two
            store(adapter, [each], [chunk(fill=number)])
        assert isinstance(adapter, TierKVL2Adapter)
        assert adapter.flush()

    put_two()
    assert pressed() == []
    put_two()
    assert lookup(adapter, KEYS[:1]) == [0]
    assert pressed() == [0]
    adapter.submit_unlock(KEYS[:1])
    adapter.submit_unlock(KEYS[:1])  # once too often
    put_two()
    assert lookup(adapter, KEYS[:1]) == lookup(adapter, KEYS[:1]) == [0]
    adapter.submit_unlock(KEYS[:1])
    assert pressed() == [0], "one of two locks is enough"
    adapter.submit_unlock(KEYS[:1])
    put_two()
    lookup(adapter, KEYS[:1])
    with patch.object(shelf, "LOCK_S", -1.0):
        lookup(adapter, KEYS[5:6])
    assert adapter.report_status()["counts"]["old_locks"] >= 1
    assert pressed() == []
    adapter.close()


def deleted_while_moved(place: Path) -> None:
    """A chunk that is being written is missing once it was deleted, and over a restart."""
    adapter, gate, real = ours(place), threading.Event(), DirectFiles.write

    def write(files: DirectFiles, handle: int, offset: int, buffers: Buffers) -> None:
        gate.wait(30)
        real(files, handle, offset, buffers)

    assert lookup(adapter, KEYS[:1]) == []  # the store is open, and has its files
    with patch.object(DirectFiles, "write", write):
        store(adapter, KEYS[:1], [chunk(fill=1)])
        adapter.delete(KEYS[:1])
        assert lookup(adapter, KEYS[:1]) == []
        assert load(adapter, KEYS[:1]) == {}
        assert store(adapter, KEYS[:1], [chunk(fill=2)]) == -1, "the old bytes are still there"
        gate.set()
    adapter.close()
    adapter = ours(place)
    assert lookup(adapter, KEYS[:1]) == []
    assert store(adapter, KEYS[:1], [chunk(fill=3)]) == SIZES[0]
    assert load(adapter, KEYS[:1]) == {0: content(3)}
    adapter.close()


def faults(place: Path) -> None:
    """Errors of disk, memory and directory are missing chunks and failed tasks; nothing raises."""
    logging.disable(logging.CRITICAL)
    adapter = ours(place)
    three = KEYS[:3]
    store(adapter, three, [chunk(fill=number) for number in range(3)])
    adapter.close()
    adapter, real = ours(place), DirectFiles.read

    def flip(files: DirectFiles, handle: int, offset: int, buffers: Buffers) -> None:
        real(files, handle, offset, buffers)
        if sum(map(len, buffers)) > 8192:
            memoryview(max(buffers, key=len)).cast("B")[100] ^= 1

    assert lookup(adapter, three) == [0, 1, 2]
    with patch.object(DirectFiles, "read", flip):
        assert load(adapter, three) == {}
    adapter.close()
    adapter = ours(place)
    with patch.object(HostTier, "write", side_effect=MemoryError):
        assert store(adapter, [key(50)], [chunk(fill=1)]) == -1
    adapter.close()
    adapter = ours(place)
    no_room = OSError(errno.ENOSPC, "no space left")
    assert lookup(adapter, [key(51)]) == []
    with patch.object(DirectFiles, "write", side_effect=no_room):
        store(adapter, [key(51)], [chunk(fill=1)])
        time.sleep(0.2)
        assert set(load(adapter, [key(51)]).values()) <= {content(1)}
    gone = chunk(fill=9)
    gone.invalidate()
    assert store(adapter, [key(52)], [gone]) == -1
    assert lookup(adapter, [key(52)]) == []
    adapter.close()
    (place / "file").write_text("")
    adapter = plugin({"directory": str(place / "file" / "kv")})
    assert lookup(adapter, three) == []
    assert store(adapter, three, [chunk(fill=number) for number in range(3)]) == -1
    assert not adapter.report_status()["is_healthy"]
    adapter.close()
    adapter = plugin({"directory": str(place / "small"), "host": "16KiB"})  # holds one chunk
    assert store(adapter, three[:1], [chunk(fill=1)]) == -1
    adapter.close()


def killed_server(place: Path) -> None:
    """A real server is killed while it stores; the next one serves what was durable."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import lmcache_life as life

    def ask(document: int) -> life.Ask:
        return life.Ask(tokens=[(document * 7919 + n * 104729) % 40_000 for n in range(659)])

    plain = life.Engine("m", "float32")
    params = {"directory": str(place / "kv"), "host": "8MiB", "cold": "256MiB"}
    with life.Server(life.adapter(params)) as server:
        engine = life.Engine("m", "float32", server)
        assert engine.turn([ask(0)]) == plain.turn([ask(0)])
        server.settle()
        assert engine.turn([ask(0)])[0].reused == 640
        engine.turn([ask(n) for n in range(1, 9)])
        server.kill()
    with life.Server(life.adapter(params)) as server:
        engine = life.Engine("m", "float32", server)
        for number in range(9):
            said, wanted = engine.turn([ask(number)])[0], plain.turn([ask(number)])[0]
            assert said.tokens == wanted.tokens
            assert number or said.reused == 640


PARTS = {
    found.__name__: found
    for found in (beside, interface, settings_of, forms_apart, serialized, locks,
                  deleted_while_moved, faults, killed_server)
}  # fmt: skip

if __name__ == "__main__":
    PARTS[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write("done\n")
