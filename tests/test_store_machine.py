"""The whole store against a dict: every tier, hints, faults, crashes and restarts.

The disk is `MemoryFiles` (torn and dropped unsynced writes) under `FaultyFiles`. The rules:
a get gives, block by block, bytes that were put under that prefix, or ends; what was durable when
`flush` said so is found again after a crash, as long as nothing had to be evicted from the disk.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.core.tier import TierId
from tierkv.store import Hint, HintKind, Lease, Store
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles, at_rates
from tierkv.testing.store import abandon, staging_on
from tierkv.testing.streams import RecordingStreams
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.host import HostTier
from tierkv.transfer.link_profile import SIZES, Direction, LinkProfile
from tierkv.transfer.staging import Staging

Bytes = npt.NDArray[np.uint8]
Prefix = tuple[str, tuple[int, ...]]

GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=64, dtype="float32")
SPACES = ("default", "b")
ROOT = Path("machine")
#: Links on which whole pages, and kernels, are the fastest.
LINKS = [
    LinkProfile(way, way, "made up")
    for way in (Direction((1e9,) * len(SIZES), 1.0), Direction((1.0,) * len(SIZES), 1e9))
]
RATES = {Fault.EIO: 0.02, Fault.SHORT: 0.02, Fault.FLIP: 0.02, Fault.LOST: 0.02}
#: Rules in one run: examples x steps. `TIERKV_RULES` asks for more.
RULES = int(os.environ.get("TIERKV_RULES", "50000"))
STEPS = 100


def config_of(host: int, cold: int, device: int, *, zero_freed: bool = False) -> Config:
    page = 8192  # four blocks of two tokens: 2 layers x 2 x 2 x 64 x 4 bytes
    return Config.model_validate(
        {
            "block_tokens": 2,
            "pages": {"hot": 512, "warm": page, "cold": 4 * page},
            "tiers": {
                "host": {"capacity": host * page, "hugepages": "off", "zero_freed": zero_freed},
                "device": {"capacity": device * page, "device": "cpu"},
                "cold": {
                    "capacity": cold * page,
                    "directory": "/nowhere",
                    "threads": 2,
                    "segment_cold_pages": 1,
                },
            },
            "transfer": {"put_deadline_ms": 2000, "demand_deadline_ms": 2000},
            "namespaces": {"b": {"salt": "s"}},
        }
    )


class StoreMachine(RuleBasedStateMachine):
    """See the module."""

    prompts = st.lists(st.integers(0, 2), min_size=1, max_size=8)
    spaces = st.sampled_from(SPACES)

    @initialize(
        host=st.integers(2, 6),
        cold=st.sampled_from([0, 4, 12, 400]),
        device=st.sampled_from([0, 0, 1, 3]),
        seed=st.integers(0, 2**16),
        faulty=st.booleans(),
        staged=st.booleans(),
        zero_freed=st.booleans(),
    )
    def begin(
        self,
        host: int,
        cold: int,
        device: int,
        seed: int,
        faulty: bool,
        staged: bool = False,
        zero_freed: bool = False,
    ) -> None:
        self.config = config_of(host, cold, device, zero_freed=zero_freed)
        self.layout = Layout(GEOMETRY, block_tokens=2, targets=self.config.pages.targets)
        self.disk = MemoryFiles(ROOT, seed=seed)
        self.schedule = at_rates(seed, RATES) if faulty else None
        self.faulty = faulty
        self.seed = seed
        self.staged = staged
        self.put_values: dict[Prefix, set[int]] = {}
        self.durable: set[Prefix] = set()
        self.version = 0
        self.leases: list[tuple[Lease, str, list[int]]] = []
        self.open_store()

    def open_store(self) -> None:
        self.files = FaultyFiles(self.disk)
        self.streams = RecordingStreams(pace=3, seed=self.seed)
        self.store = Store.open(
            self.config,
            self.layout,
            files_for=lambda _root: self.files,
            staging_for=self.staging if self.staged else None,
        )
        self.files.schedule = self.schedule
        self.copy: dict[bytes, TierId | None] = {}

    def staging(self, host: HostTier, device: DeviceTier) -> Staging:
        """A ring whose copies and kernels end at some time, in some order; half of it is pinned."""
        link = LINKS[self.seed % len(LINKS)]
        return staging_on(self.streams, host, device, profile=link, pinned=host.page_count // 2)

    # ---- bytes

    def block_bytes(self, prefix: Prefix, version: int) -> Bytes:
        plan = self.store.plan
        rng = np.random.default_rng(abs(hash((prefix, version))) % 2**32)
        return rng.integers(0, 256, (plan.layers, plan.block_layer_bytes), dtype=np.uint8)

    def prefixes(self, prompt: list[int], namespace: str) -> list[Prefix]:
        return [(namespace, tuple(prompt[: n + 1])) for n in range(len(prompt))]

    def tokens(self, prompt: list[int]) -> list[int]:
        return [token for number in prompt for token in (number, number)]

    def expect_valid(self, rows: Bytes, prompt: list[int], namespace: str) -> None:
        for number, prefix in enumerate(self.prefixes(prompt[: rows.shape[1]], namespace)):
            values = self.put_values.get(prefix, set())
            assert any(
                np.array_equal(rows[:, number], self.block_bytes(prefix, value)) for value in values
            ), f"wrong bytes for {prefix}"

    # ---- rules

    @rule(prompt=prompts, namespace=spaces, first=st.integers(0, 3))
    def put(self, prompt: list[int], namespace: str, first: int) -> None:
        first = min(first, len(prompt) - 1)
        self.version += 1
        chosen = self.prefixes(prompt, namespace)[first:]
        for prefix in chosen:
            self.put_values.setdefault(prefix, set()).add(self.version)
        data = np.stack([self.block_bytes(prefix, self.version) for prefix in chosen], axis=1)
        stored = self.store.put(self.tokens(prompt), data, first_block=first, namespace=namespace)
        assert 0 <= stored <= len(chosen)

    @rule(prompt=prompts, namespace=spaces)
    def get(self, prompt: list[int], namespace: str) -> None:
        match = self.store.match(self.tokens(prompt), namespace=namespace)
        plan = self.store.plan
        out = np.full((plan.layers, match.blocks, plan.block_layer_bytes), 0xAA, np.uint8)
        delivered = self.store.get(match, out)
        assert delivered <= match.blocks
        if not self.faulty and not self.leases:
            assert delivered == match.blocks
        self.expect_valid(out[:, :delivered], prompt, namespace)

    @rule(prompt=prompts, namespace=spaces)
    def lease(self, prompt: list[int], namespace: str) -> None:
        if len(self.leases) < 2:
            lease = self.store.lease(self.store.match(self.tokens(prompt), namespace=namespace))
            self.leases.append((lease, namespace, prompt))

    @rule()
    def read_and_release(self) -> None:
        for lease, namespace, prompt in self.leases:
            plan = self.store.plan
            rows = np.zeros((plan.layers, lease.blocks, plan.block_layer_bytes), np.uint8)
            assert lease.read(rows) == lease.blocks
            self.expect_valid(rows, prompt, namespace)
            lease.release()
        self.leases.clear()

    @rule(prompt=prompts, namespace=spaces, kind=st.sampled_from(list(HintKind)))
    def hint(self, prompt: list[int], namespace: str, kind: HintKind) -> None:
        keys = list(self.store.keys(self.tokens(prompt), namespace=namespace))
        if kind is HintKind.TTL and self.leases:
            return  # it would be dropped later, at a time that the model does not know
        if kind in (HintKind.FORGET, HintKind.TTL):
            self.durable -= {p for p in self.durable if p[0] == namespace}
        self.store.hint(Hint(kind, keys, namespace, at_ns=1))
        if kind is HintKind.TTL:
            self.store.step()

    @rule()
    def step(self) -> None:
        self.store.step()
        self.store.check()

    @rule()
    def flush(self) -> None:
        if self.store.flush() and not self.faulty and self.config.tiers.cold.capacity:
            found = self.found()
            if self.store.snapshot().get("tierkv_evicted_pages_total", {}).get("cold", 0) == 0:
                self.durable |= found

    def found(self) -> set[Prefix]:
        """Every prefix that the store says it has."""
        return {
            prefix
            for prefix in self.put_values
            if self.store.match(self.tokens(list(prefix[1])), namespace=prefix[0]).blocks
            == len(prefix[1])
        }

    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        self.read_and_release()
        if not crash:
            self.store.flush()  # what `close` does; it may have to evict
        if self.store.snapshot().get("tierkv_evicted_pages_total", {}).get("cold", 0):
            self.durable.clear()
        self.files.schedule = None
        if crash:
            abandon(self.store)
            self.disk.crash()
        else:
            self.store.close()
        self.open_store()
        self.store.check()
        missing = self.durable - self.found()
        assert not missing, f"durable and lost: {sorted(missing)}"

    @invariant()
    def a_copy_that_is_kept_by_changes_has_what_the_store_has(self) -> None:
        """And a block that the store would give from a slower tier is not said to be faster."""
        runtime = self.store._runtime
        with runtime.lock:
            if runtime.gave_up:
                return
            for key, tier in runtime.planner.watch.changes().items():
                self.copy[key] = tier
            for namespace, prompt in list(self.put_values)[-12:]:
                keys = self.store.keys(self.tokens(list(prompt)), namespace=namespace)
                found = list(itertools.takewhile(lambda tier: tier is not None,
                                                 map(self.copy.get, keys)))  # fmt: skip
                counts = runtime.planner.match_counts(keys)
                assert Counter(found) == Counter(counts), f"{prompt} of {namespace}"

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.read_and_release()
            self.files.schedule = None
            self.store.check()
            pins = [sum(table.pins) for table in self.store._runtime.planner.tables.values()]
            if self.store._runtime.engine.busy == 0:
                self.store.step()
                pins = [sum(table.pins) for table in self.store._runtime.planner.tables.values()]
                assert not any(pins), "a pin leaked"
            self.store.close()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=max(1, RULES // STEPS), stateful_step_count=STEPS, deadline=None
)


def test_a_read_waits_for_room_rather_than_lose_its_own_tail() -> None:
    """Found by the machine: host and cold tier of two pages each, all of them in use."""
    for _ in range(10):
        machine = StoreMachine()
        machine.begin(host=2, cold=4, device=0, seed=0, faulty=False)
        for prompt in ([0, 1, 0], [1, 0, 0, 0], [0, 0, 0]):
            machine.put(prompt=prompt, namespace="default", first=0)
        machine.get(prompt=[0, 0], namespace="default")
        machine.teardown()


def test_a_read_does_not_call_off_the_prefetch_that_it_waits_for() -> None:
    """Found by the machine, as above with more disk."""
    for _ in range(10):
        machine = StoreMachine()
        machine.begin(host=2, cold=12, device=0, seed=0, faulty=False)
        for prompt in ([0, 1, 0], [1, 0, 0, 0], [0, 0, 0]):
            machine.put(prompt=prompt, namespace="default", first=0)
        machine.hint(kind=HintKind.PREFETCH, prompt=[0], namespace="default")
        machine.get(prompt=[0, 0], namespace="default")
        machine.teardown()
