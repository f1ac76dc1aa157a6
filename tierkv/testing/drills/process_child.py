"""What a child of the drill `processes` does: a store's life under faults.

A **life** is a script drawn from a seed, on a real `Store` in a real directory. It writes an
acknowledgement journal to a socket, which outlives it: what it is about to put, what a flush that
returned True covered, what it forgot on purpose. Every get is verified where it is made.

It runs in a process that was forked with everything imported (`process_server`), and ends it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import resource
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from tierkv.config import Config
from tierkv.core.errors import TierFailed
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.store import Hint, HintKind, Store
from tierkv.testing.drills.base import BROKEN, LEAKED, WRONG_BYTES

Bytes = npt.NDArray[np.uint8]
#: A namespace and the numbers of a prompt; each number is one block.
Prefix: TypeAlias = tuple[str, tuple[int, ...]]

GEOMETRY: Final = KVGeometry(layers=2, kv_heads=1, head_dim=64, dtype="float32")
SPACES: Final = ("default", "b")
_PAGE: Final = 8192  # four blocks of two tokens: 2 layers x 2 x 2 x 64 x 4 bytes
_COLD_PAGES: Final = 400  # so many that nothing is ever evicted from the disk
_STEPS: Final = 16
_IDLE_S: Final = 10.0


class Task(msgspec.Struct, frozen=True):
    """A life: what it does, on what, and the faults that it makes for itself."""

    top: str
    seed: int
    engine: str = "direct"
    clients: int = 1
    host_pages: int = 6
    #: Nothing but the end is wrong: a flush must return True, and opening must succeed.
    is_faultless: bool = True
    #: Pages whose read fails are gone: nothing can be called durable.
    spoils_reads: bool = False
    closes: bool = True
    #: At this step, 0 is before the store is opened, the fault below begins.
    strikes_at: int = 0
    file_bytes_max: int | None = None
    disk_bytes_left: int | None = None
    #: Allocations from `first` on, `width` of them, fail in an operation; then `stride` later ones.
    nomemory: tuple[str, int, int, int] | None = None


class Offered(msgspec.Struct, frozen=True, tag=True):
    """About to be put: these prefixes with this value."""

    prefixes: list[Prefix]
    value: int


class Durable(msgspec.Struct, frozen=True, tag=True):
    """A flush that covered these prefixes has returned True."""

    prefixes: list[Prefix]


class Forgetting(msgspec.Struct, frozen=True, tag=True):
    """About to ask that all of a namespace's prompts are forgotten, one after the other."""

    namespace: str


class Said(msgspec.Struct, frozen=True, tag=True):
    """Something is wrong, of a kind in `base`."""

    kind: str
    words: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """It came to its end, having met so many faults of its own making."""

    faults: int = 0


Word: TypeAlias = Offered | Durable | Forgetting | Said | Ended


class Book(msgspec.Struct):
    """What a journal amounts to: values by prefix, and what must be found."""

    offered: list[tuple[Prefix, list[int]]]
    durable: list[Prefix]


def config_of(task: Task) -> Config:
    """A store of few and tiny pages."""
    return Config.model_validate(
        {
            "block_tokens": 2,
            "pages": {"hot": 512, "warm": _PAGE, "cold": 4 * _PAGE},
            "tiers": {
                "host": {"capacity": task.host_pages * _PAGE, "hugepages": "off"},
                "device": {"capacity": 0},
                "cold": {
                    "capacity": _COLD_PAGES * _PAGE,
                    "directory": str(Path(task.top) / "cold"),
                    "engine": task.engine,
                    "threads": 1,
                    "segment_cold_pages": 1,
                },
            },
            "transfer": {
                "put_deadline_ms": 1000,
                "demand_deadline_ms": 2000,
                "flush_deadline_ms": 20_000,
            },
            "namespaces": {"b": {"salt": "s"}},
        }
    )


def layout_of(config: Config) -> Layout:
    """The layout of every life."""
    return Layout(GEOMETRY, block_tokens=2, targets=config.pages.targets)


def root_of(top: Path) -> Path:
    """Where the segments of a life lie."""
    config = config_of(Task(str(top), 0))
    return top / "cold" / layout_of(config).fingerprint.hex()[:16]


@lru_cache(maxsize=4096)
def block_bytes(prefix: Prefix, value: int) -> Bytes:
    """The bytes of a block: no two prefixes or values have a row in common."""
    rows, row_bytes = 2, 1024
    digest = hashlib.shake_128(repr((prefix, value)).encode()).digest(rows * row_bytes)
    return np.frombuffer(digest, np.uint8).reshape(rows, row_bytes)


def prefixes_of(prompt: Sequence[int], namespace: str) -> list[Prefix]:
    """One for each block of a prompt."""
    return [(namespace, tuple(prompt[: n + 1])) for n in range(len(prompt))]


def tokens_of(prompt: Sequence[int]) -> list[int]:
    """Each number is a block of two tokens."""
    return [token for number in prompt for token in (number, number)]


class Journal:
    """Where a life says what it does. Any thread; a word is on its way when `say` returns."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send

    def say(self, word: Word) -> None:
        """Send one word."""
        self._send(msgspec.json.encode(word))

    def wrong(self, kind: str, words: str) -> None:
        """Say what is wrong."""
        self.say(Said(kind, words[-6000:]))


class Life:
    """One store, and what was put into it; several clients at once."""

    def __init__(self, task: Task, journal: Journal) -> None:
        self.task = task
        self.journal = journal
        self.config = config_of(task)
        self.layout = layout_of(self.config)
        self.store: Store | None = None
        self.offered: dict[Prefix, set[int]] = {}
        self.stored: set[Prefix] = set()
        self._lock = threading.Lock()
        self._version = 0

    @property
    def opened(self) -> Store:
        """The store, which is open."""
        assert self.store is not None
        return self.store

    # ---- what a client does

    def open(self) -> bool:
        """Open the store; False if its disk refuses, which only a fault excuses."""
        try:
            self.store = Store.open(self.config, self.layout)
        except TierFailed as error:
            self.store = None
            if self.task.is_faultless:
                self.journal.wrong(BROKEN, f"it does not open: {error}")
            return False
        return True

    def put(self, prompt: Sequence[int], namespace: str, first: int = 0) -> None:
        """Put a prompt from a block on, with a value of its own."""
        assert self.store is not None
        chosen = prefixes_of(prompt, namespace)[first:]
        with self._lock:
            self._version += 1
            value = self._version
            for prefix in chosen:
                self.offered.setdefault(prefix, set()).add(value)
        self.journal.say(Offered(chosen, value))
        data = np.stack([block_bytes(prefix, value) for prefix in chosen], axis=1)
        count = self.store.put(tokens_of(prompt), data, first_block=first, namespace=namespace)
        with self._lock:
            self.stored.update(chosen[:count])

    def get(self, prompt: Sequence[int], namespace: str) -> int:
        """Get what there is of a prompt, and verify it; gives how many blocks."""
        assert self.store is not None
        match = self.store.match(tokens_of(prompt), namespace=namespace)
        out = np.full((2, match.blocks, 1024), 0xAA, np.uint8)
        count = self.store.get(match, out)
        self.verify(out, prompt[:count], namespace)
        return count

    def verify(self, rows: Bytes, prompt: Sequence[int], namespace: str) -> None:
        """Say which blocks have bytes that were never offered for them."""
        for number, prefix in enumerate(prefixes_of(prompt, namespace)):
            with self._lock:
                values = list(self.offered.get(prefix, ()))
            if not any(np.array_equal(rows[:, number], block_bytes(prefix, v)) for v in values):
                self.journal.wrong(WRONG_BYTES, f"{prefix} has bytes that nobody put there")

    def flush(self) -> bool:
        """Flush, and say what that made durable."""
        assert self.store is not None
        with self._lock:
            covered = set(self.stored)
        covered &= self.found(covered)
        ok = self.store.flush()
        if ok and not self.task.spoils_reads:
            self.journal.say(Durable(sorted(covered & self.found(covered))))
        elif not ok and self.task.is_faultless:
            self.journal.wrong(BROKEN, "a flush returned False, and nothing was wrong")
        return ok

    def hint(self, prompt: Sequence[int], namespace: str, kind: HintKind) -> None:
        """Give a hint; what is to be forgotten is nobody's to promise."""
        assert self.store is not None
        if kind is HintKind.FORGET:
            self.journal.say(Forgetting(namespace))
            with self._lock:
                self.stored = {prefix for prefix in self.stored if prefix[0] != namespace}
        keys: list[bytes] = [*self.store.keys(tokens_of(prompt), namespace=namespace)]
        self.store.hint(Hint(kind, keys, namespace, at_ns=1))

    def step(self) -> None:
        """Let time pass, and look at the planner's tables."""
        assert self.store is not None
        self.store.step()
        self.store.check()

    def reopen(self) -> None:
        """A clean stop and a start."""
        assert self.store is not None
        self.store.close()
        self.store = None
        self.open()

    def found(self, prefixes: set[Prefix]) -> set[Prefix]:
        """Those of them that match."""
        assert self.store is not None
        store = self.store
        return {
            one
            for one in prefixes
            if store.match(tokens_of(one[1]), namespace=one[0]).blocks == len(one[1])
        }

    def expect_rest(self) -> None:
        """No transfer is left over, and nothing is pinned by nobody."""
        assert self.store is not None
        runtime = self.store._runtime
        until = time.monotonic() + _IDLE_S
        while runtime.engine.busy and time.monotonic() < until:
            time.sleep(0.001)
        self.step()
        if runtime.gave_up:
            self.journal.wrong(BROKEN, "the store gave up")
        if runtime.engine.busy or runtime.planner.movement.flights:
            self.journal.wrong(LEAKED, "a transfer never ended")
        planner = runtime.planner
        pins = {tier.label: sum(table.pins) for tier, table in planner.tables.items()}
        if any(pins.values()) or planner.tickets or planner.leases:
            rest = f"pins {pins}, {len(planner.tickets)} tickets, {len(planner.leases)} leases"
            self.journal.wrong(LEAKED, f"nobody reads or writes, and there are {rest}")


Step: TypeAlias = Callable[[Life], object]


def script(rng: random.Random, *, alone: bool, steps: int = _STEPS) -> list[Step]:
    """Operations of one client; `alone` it may stop and start the store, and have it forget."""
    kinds = ["put"] * 8 + ["get"] * 5 + ["flush"] * 4 + ["hint"] * 2 + ["step"]
    if alone:
        kinds += ["reopen", "forget"]
    hints = [kind for kind in HintKind if kind not in (HintKind.FORGET, HintKind.TTL)]
    return [_step(rng, rng.choice(kinds), hints) for _ in range(steps)]


def _step(rng: random.Random, kind: str, hints: Sequence[HintKind]) -> Step:
    prompt = [rng.randrange(3) for _ in range(rng.randint(1, 10))]
    space = rng.choice(SPACES)
    if kind == "put":
        first = rng.randrange(len(prompt)) if rng.random() < 0.2 else 0
        return lambda life: life.put(prompt, space, first)
    if kind == "get":
        return lambda life: life.get(prompt, space)
    if kind in ("hint", "forget"):
        hint = HintKind.FORGET if kind == "forget" else rng.choice(hints)
        return lambda life: life.hint(prompt, space, hint)
    return {"flush": Life.flush, "step": Life.step, "reopen": Life.reopen}[kind]


def live(task: Task, send: Callable[[bytes], object]) -> None:
    """Live a life, and end this process."""
    journal = Journal(send)
    talk_to_nobody()
    try:
        before = holdings()
        life = Life(task, journal)
        if task.nomemory is not None:
            from tierkv.testing.drills.process_memory import starve

            faults = starve(life, task.nomemory)
        else:
            faults = 0
            _play(life)
        if not task.closes:
            journal.say(Ended(faults))
            os._exit(0)
        if life.store is not None:
            if task.clients == 1:
                life.expect_rest()
            life.store.close()
        life.store = None
        left = holdings() - before
        if left:
            journal.wrong(LEAKED, f"after the store was closed there are {sorted(left)}")
        journal.say(Ended(faults))
    except BaseException:  # noqa: BLE001 an engine would have seen it
        journal.wrong(BROKEN, traceback.format_exc())
    os._exit(0)


def _play(life: Life) -> None:
    task = life.task
    steps = script(random.Random(f"{task.seed}/0"), alone=task.clients == 1)
    if task.strikes_at == 0:
        _strike(task)
    if not life.open() and not life.open():
        return
    if task.clients > 1:
        _play_beside(life)
        return
    for number, step in enumerate(steps, 1):
        if number == task.strikes_at:
            _strike(task)
        step(life)
        if life.store is None and not life.open():
            return


def _play_beside(life: Life) -> None:
    """Several clients, round after round, each with its own script."""

    def play(number: int) -> None:
        rng = random.Random(f"{life.task.seed}/{number}")
        try:
            for step in script(rng, alone=False, steps=60):
                step(life)
                time.sleep(0.0005)
        except BaseException:  # noqa: BLE001 an engine would have seen it
            life.journal.wrong(BROKEN, traceback.format_exc())

    threads = [threading.Thread(target=play, args=(n,)) for n in range(life.task.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _strike(task: Task) -> None:
    """Begin the fault that a life makes for itself."""
    if task.file_bytes_max is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (task.file_bytes_max, hard))
    if task.disk_bytes_left is not None:
        fill_disk(Path(task.top) / "cold", task.disk_bytes_left)


FILLER: Final = "filler"


def fill_disk(directory: Path, left_bytes: int) -> None:
    """Take all of a file system but so much."""
    status = os.statvfs(directory)
    fd = os.open(directory / FILLER, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(OSError):
        os.posix_fallocate(fd, 0, max(1, status.f_bavail * status.f_bsize - left_bytes))
    os.close(fd)


def holdings() -> set[str]:
    """Descriptors and threads of this process, and what the descriptors are."""
    held = {f"thread {thread.name}" for thread in threading.enumerate()}
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            held.add(f"descriptor {fd.name} of {fd.readlink()}")
    return {one for one in held if "/proc/" not in one}


def talk_to_nobody() -> None:
    """Log as a service would, to where nobody reads."""
    logging.disable(logging.NOTSET)
    handler = logging.StreamHandler(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
