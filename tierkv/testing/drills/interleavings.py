"""The whole store, its threads, its clock and its disk in an order that one seed draws.

A case is a few **lives** of a store on one simulated disk. In each, up to four clients put, get,
lease, hint, flush and step at once. Locks, lanes and deadlines are the store's own, on threads that
`tierkv.testing.scheduler` lets take turns; copies and calls to the disk are cut, so that others
come in between. The disk fails, hangs or lies. A life ends by a clean stop or by a loss of power at
any step; the next one begins with what survived.

What must hold. Every block that is read has exactly the bytes of one put under its prefix and
namespace, and the same when it is read again under one lease. What was seen of each key can be
explained by registers that may forget (`tierkv.testing.history`). What a flush covered is there
after a loss of power, as long as nothing was evicted or forgotten. A healthy store delivers what it
says it has. No thread dies or waits for ever, no pin and no handle stays, the planner's invariants
hold.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from tierkv import reading, runtime, store
from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.plan.events import Hint, HintKind
from tierkv.store import Store
from tierkv.testing.drills.base import (
    BROKEN,
    LEAKED,
    LOST,
    WRONG_BYTES,
    Tally,
    Wrong,
    case_random,
    quiet,
    run_cases,
)
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles, Schedule, at_rates
from tierkv.testing.history import History, Span
from tierkv.testing.preemption import PreemptibleFiles, cut_copies
from tierkv.testing.scheduler import PowerLoss, Scheduler, Stuck
from tierkv.tiers import segment_directory, segments
from tierkv.tiers.files.base import FileEngine
from tierkv.transfer import breaker, engine, lane

Bytes = npt.NDArray[np.uint8]
#: A namespace and the numbers of a prompt's blocks.
Prefix = tuple[str, tuple[int, ...]]

NAME: Final = "interleavings"
#: Where threads and clocks are the scheduler's.
MODULES: Final[tuple[ModuleType, ...]] = (
    store, reading, runtime, engine, lane, breaker, segments, segment_directory,
)  # fmt: skip
GEOMETRY: Final = KVGeometry(layers=2, kv_heads=1, head_dim=62, dtype="float32")
_PAGE: Final = 8192  # four blocks of two tokens
_SPACES: Final = ("default", "default", "b")
_ERRORS: Final = (Fault.EIO, Fault.SHORT, Fault.ENOSPC)
_LIES: Final = (Fault.FLIP, Fault.LOST, Fault.MISDIRECTED)
#: How often a call fails.
_RATES: Final = (0.02, 0.1, 0.3)
#: How long a call to a slow disk may take, in seconds: within deadlines, around, beyond them.
_WAITS_S: Final = (0.01, 0.5, 4.0, 30.0)
_ACTIONS: Final = ("put", "get", "lease", "hint", "flush", "step")
#: What may make a block unfindable although it is durable.
_DROPS: Final = (HintKind.FORGET, HintKind.TTL)


def run(cases: int, seed: int) -> Tally:
    """Cases 0 .. of this seed."""
    with quiet():
        return run_cases(NAME, _case, cases, seed)


def replay(seed: int, case: int) -> None:
    """One case again; raises what was wrong with it."""
    _case(case_random(NAME, seed, case), case)


def _case(rng: random.Random, _number: int) -> None:
    World(rng).run()


class Action(NamedTuple):
    """One call of a client."""

    name: str
    prompt: tuple[int, ...]
    namespace: str
    first: int
    kind: HintKind


class World:
    """One case: a disk, and the lives of stores on it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._config = _config(
            host=rng.randint(2, 5),
            cold=rng.choice((0, 4, 12, 200, 200)),
            device=rng.choice((0, 0, 0, 1)),
            threads=rng.randint(1, 2),
            sync=rng.choice(("flush", "flush", "always")),
            zero_freed=rng.random() < 0.25,
        )
        tiers = self._config.tiers
        self._copies = 1 + bool(tiers.device.capacity) + bool(tiers.cold.capacity)
        self._layout = Layout(GEOMETRY, block_tokens=2, targets=self._config.pages.targets)
        self._disk = MemoryFiles(Path("disk"), seed=rng.randrange(1 << 30))
        self._numbers: dict[Prefix, int] = {}
        self._ever: dict[Prefix, set[int]] = {}
        self._versions = 0
        #: The prompts of this case: so many numbers, so many blocks. Few of them meet often.
        self._alphabet, self._length = rng.choice(((1, 4), (2, 3), (2, 5), (3, 7)))
        self._weights = [rng.choice((1, 3, 9)) for _ in _ACTIONS]
        self._must: dict[Prefix, int] = {}
        #: Turns that threads have taken.
        self.steps = 0
        self._was_damaged = False  # by a failed call or a lie: then what is there may be unreadable

    def run(self) -> None:
        """Some lives, then a healthy one that finds what must be there."""
        for left in range(self._rng.randint(1, 3), -1, -1):
            life = Life(self, is_last=not left)
            try:
                life.live()
            finally:
                self.steps += life.steps


class Life:
    """One life of a store: from opening to its end."""

    def __init__(self, world: World, *, is_last: bool) -> None:
        self.world = world
        rng = self._rng = random.Random(world._rng.randrange(1 << 62))
        self._is_last = is_last
        self._scheduler = Scheduler(random.Random(rng.randrange(1 << 62)))
        self._faults = "none" if is_last else rng.choice(("none", "none", "writes", "all", "lies"))
        world._was_damaged |= self._faults != "none"
        self._is_slow = not is_last and rng.random() < 0.2
        self._may_drop = rng.random() < 0.5
        self._ends_badly = not is_last and rng.random() < 0.7
        self._files = FaultyFiles(world._disk, seed=rng.randrange(1 << 30))
        self._history = History(copies=world._copies)
        self._is_open = False
        self._flushes: list[Span] = []
        self._tick = 0
        self._wrong: list[Wrong] = []

    def live(self) -> None:
        """Open, let the clients work, end. Raises `Wrong`."""
        scheduler = self._scheduler
        with scheduler.replacing(MODULES):
            self._begun = self._now()
            try:
                if self._ends_badly:
                    scheduler.loses_power_at = self._rng.randint(1, 1000)
                self._open()
                self._work()
                self._close()
            except PowerLoss:
                scheduler.stop()
                if self._is_open:
                    self._store._parts.host.close()
                    self._settle()
                self.world._disk.crash()
            except Stuck as error:
                scheduler.stop()
                raise Wrong(BROKEN, f"stuck: {error}") from error
            except BaseException:
                scheduler.stop()
                raise
        if scheduler.errors:
            raise Wrong(BROKEN, "; ".join(scheduler.errors))

    @property
    def steps(self) -> int:
        """Turns that threads have taken."""
        return self._scheduler.steps

    # ---- the ends

    def _open(self) -> None:
        files = cast("FileEngine", PreemptibleFiles(self._files, self._scheduler, self._hang))
        world = self.world
        self._store = Store.open(world._config, world._layout, files_for=lambda _root: files)
        self._is_open = True
        parts = self._store._parts
        parts.engine.breaker._clock = self._scheduler.monotonic
        cut_copies(parts.host, self._scheduler, offset=1)
        if parts.device is not None:
            cut_copies(parts.device, self._scheduler, page=1)
        self._files.schedule = self._schedule()
        self._store.check()
        self._expect_durable()

    def _schedule(self) -> Schedule | None:
        if self._faults == "none":
            return None
        kinds = _LIES if self._faults == "lies" else _ERRORS
        rate = self._rng.choice(_RATES)
        draw = at_rates(self._rng.randrange(1 << 30), dict.fromkeys(kinds, rate))
        if self._faults != "writes":
            return draw
        return lambda number, call: None if call == "read" else draw(number, call)

    def _hang(self) -> None:
        if self._is_slow and self._rng.random() < 0.05:
            scheduler = self._scheduler
            seconds = self._rng.choice(_WAITS_S)
            scheduler.wait("the disk", scheduler.now_ns + int(seconds * 1e9))

    def _work(self) -> None:
        clients = []
        for number in range(self._rng.randint(1, 4)):
            actions = [self._action() for _ in range(self._rng.randint(2, 9))]
            work = partial(self._client, actions)
            clients.append(self._scheduler.start(work, f"client {number}"))
        for client in clients:
            self._scheduler.join(client)
        if self._wrong:
            raise self._wrong[0]

    def _close(self) -> None:
        self._files.schedule = None
        store = self._store
        planner = store._runtime.planner
        store.step()
        while planner.movement.flights:
            self._scheduler.sleep(0.01)
            store.step()  # what has ended may have something else begin
        store.check()
        pins = {tier.label: sum(table.pins) for tier, table in planner.tables.items()}
        if any(pins.values()):
            raise Wrong(LEAKED, f"pins {pins}")
        if planner.leases or planner.tickets:
            raise Wrong(LEAKED, f"leases {len(planner.leases)}, tickets {len(planner.tickets)}")
        if not (self.world._was_damaged or self._is_slow):
            for prefix in sorted(self.world._ever):
                self._get(prefix, 0, delivers_all=True)
        if self._rng.random() < 0.5:
            self._flush()
        store.close()  # it flushes, which may evict
        self._settle()
        odd = [name for name in self.world._disk.names() if name.endswith(".tmp")]
        if odd:
            raise Wrong(LEAKED, f"left behind: {odd}")
        if self.world._disk._handles:
            raise Wrong(LEAKED, "handles are open")

    def _settle(self) -> None:
        """What was seen must be explained; note what the next life must find."""
        for words in self._history.unexplained():
            raise Wrong(WRONG_BYTES, words)
        stats = self._store._runtime.planner.stats.snapshot()
        evicted = stats.get("tierkv_evicted_pages_total", {}).get("cold", 0)
        must = self.world._must
        if evicted or self._may_drop or self._faults in ("all", "lies"):
            must.clear()
        if (
            evicted
            or self._faults in ("all", "lies")
            or self.world._config.tiers.cold.capacity == 0
        ):
            return
        if not self._may_drop:
            for flush in self._flushes:
                there = cast("dict[Prefix, int]", dict(self._history.settled_before(*flush)))
                for prefix, value in there.items():  # found only with all that is above it
                    if all((prefix[0], prefix[1][:n]) in there for n in range(1, len(prefix[1]))):
                        must[prefix] = value

    def _expect_durable(self) -> None:
        for prefix in self.world._must:
            blocks = self._store.match(_tokens(prefix[1]), namespace=prefix[0]).blocks
            if blocks < len(prefix[1]):
                raise Wrong(LOST, f"{prefix} was flushed, {blocks} blocks are found")

    # ---- the clients

    def _action(self) -> Action:
        rng, world = self._rng, self.world
        name = rng.choices(_ACTIONS, world._weights)[0]
        length = rng.randint(1, world._length)
        prompt = tuple(rng.randrange(world._alphabet) for _ in range(length))
        kinds = [kind for kind in HintKind if self._may_drop or kind not in _DROPS]
        first = rng.choice((0, 0, 0, 1, 2))
        return Action(name, prompt, rng.choice(_SPACES), first, rng.choice(kinds))

    def _client(self, actions: Sequence[Action]) -> None:
        for action in actions:
            try:
                self._act(action)
            except Wrong as wrong:
                self._wrong.append(wrong)
                return
            except Exception as error:  # noqa: BLE001 it reached the engine
                self._wrong.append(Wrong(BROKEN, f"{action.name} raised {error!r}"))
                return

    def _act(self, action: Action) -> None:
        prefix = (action.namespace, action.prompt)
        if action.name == "put":
            self._put(prefix, min(action.first, len(action.prompt) - 1))
        elif action.name == "get":
            self._get(prefix, action.first)
        elif action.name == "lease":
            self._lease(prefix)
        elif action.name == "hint":
            tokens = _tokens(action.prompt)
            keys: list[bytes] = [*self._store.keys(tokens, namespace=action.namespace)]
            at_ns = self._scheduler.now_ns + self._rng.choice((0, 1_000_000))
            self._store.hint(Hint(action.kind, keys, action.namespace, at_ns=at_ns))
        elif action.name == "flush":
            self._flush()
        else:
            self._store.step()

    def _put(self, prompt: Prefix, first: int) -> None:
        world = self.world
        world._versions += 1
        version = world._versions
        chain = [(prompt[0], prompt[1][: n + 1]) for n in range(first, len(prompt[1]))]
        begun = self._now()
        for prefix in chain:
            world._ever.setdefault(prefix, set()).add(version)
            self._history.writes(prefix, version, begun)
        blocks = [_block(world._numbers.setdefault(p, len(world._numbers)), version) for p in chain]
        data = np.stack(blocks, axis=1)
        stored = self._store.put(_tokens(prompt[1]), data, first_block=first, namespace=prompt[0])
        data[:] = 0xEE  # it is the caller's again
        if not 0 <= stored <= len(chain):
            raise Wrong(BROKEN, f"put says {stored} of {len(chain)} blocks")
        ended = self._now()
        for prefix in chain:
            self._history.wrote(prefix, version, ended)

    def _get(self, prompt: Prefix, first: int, *, delivers_all: bool = False) -> None:
        begun = self._now()
        match = self._store.match(_tokens(prompt[1]), namespace=prompt[0])
        if match.blocks <= first:
            return
        out = self._rows(match.blocks - first)
        count = self._store.get(match, out, first_block=first)
        self._saw(prompt, first, out[:, :count], begun)
        if delivers_all and count < match.blocks:
            raise Wrong(BROKEN, f"{prompt}: {match.blocks} blocks are there, {count} delivered")

    def _lease(self, prompt: Prefix) -> None:
        begun = self._now()
        match = self._store.match(_tokens(prompt[1]), namespace=prompt[0])
        with self._store.lease(match) as lease:
            before = self._rows(lease.blocks)
            lease.read(before)
            self._saw(prompt, 0, before, begun)
            for _ in range(self._rng.randrange(12)):
                self._scheduler.pause()
            again = self._rows(lease.blocks)
            lease.read(again)
            if not np.array_equal(before, again):
                raise Wrong(WRONG_BYTES, f"{prompt} changed under a lease")

    def _flush(self) -> None:
        begun = self._now()
        if not self._store.flush():
            return
        self._flushes.append(Span(begun, self._now()))
        # What is seen now was there before: it must be found if the power is lost from here on.
        rng = self._rng
        known = sorted(self.world._ever)
        for prefix in rng.sample(known, min(len(known), 3)):
            self._get(prefix, 0)
        if self._ends_badly and rng.random() < 0.5:
            self._scheduler.loses_power_at = self.steps + rng.randrange(50)

    def _saw(self, prompt: Prefix, first: int, rows: Bytes, begun: int) -> None:
        """Every block must be one that was put under its prefix; note which."""
        world, ended = self.world, self._now()
        for column in range(rows.shape[1]):
            prefix = (prompt[0], prompt[1][: first + column + 1])
            number, version = rows[0, column, :16].view(np.int64).tolist()
            values = world._ever.get(prefix, set())
            if version not in values or number != world._numbers[prefix]:
                raise Wrong(WRONG_BYTES, f"{prefix} has bytes of key {number}, put {version}")
            if not np.array_equal(rows[:, column], _block(number, version)):
                raise Wrong(WRONG_BYTES, f"{prefix} has a mixture of bytes")
            if not self._history.was_written(prefix, version):  # by an earlier life
                self._history.writes(prefix, version, self._begun)
                self._history.wrote(prefix, version, self._begun)
            self._history.read(prefix, version, Span(begun, ended))

    def _rows(self, blocks: int) -> Bytes:
        plan = self._store.plan
        return np.full((plan.layers, blocks, plan.block_layer_bytes), 0xAA, np.uint8)

    def _now(self) -> int:
        """A moment of the history: later than every one before."""
        self._tick += 1
        return self._tick


def _tokens(prompt: Sequence[int]) -> list[int]:
    return [token for number in prompt for token in (number, number)]


@lru_cache(maxsize=4096)
def _block(number: int, version: int) -> Bytes:
    """The bytes that a put writes: they say whose they are, and no two sectors are alike."""
    layers, size = GEOMETRY.layers, GEOMETRY.token_layer_bytes * 2
    seed = int.from_bytes(blake2b(f"{number}/{version}".encode(), digest_size=4).digest(), "little")
    block = np.random.default_rng(seed).integers(0, 256, (layers, size), dtype=np.uint8)
    block[0, :16] = np.array([number, version], np.int64).view(np.uint8)
    return block


@lru_cache(maxsize=512)
def _config(host: int, cold: int, device: int, threads: int, sync: str, zero_freed: bool) -> Config:
    return Config.model_validate(
        {
            "block_tokens": 2,
            "pages": {"hot": 512, "warm": _PAGE, "cold": 2 * _PAGE},
            "tiers": {
                "host": {
                    "capacity": host * _PAGE,
                    "hugepages": "off",
                    "zero_freed": zero_freed,
                },
                "device": {"capacity": device * _PAGE, "device": "cpu"},
                "cold": {
                    "capacity": cold * _PAGE,
                    "directory": "/nowhere",
                    "threads": threads,
                    "segment_cold_pages": 4,
                    "sync": sync,
                },
            },
            "transfer": {"put_deadline_ms": 2000, "demand_deadline_ms": 2000},
            "namespaces": {"b": {"salt": "s"}},
        }
    )
