"""The whole store over the staging ring, on recorded streams that end things in their own time."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from tierkv.config import Config  # noqa: E402
from tierkv.core.geometry import KVGeometry, Layout  # noqa: E402
from tierkv.kernels.driver import Copies  # noqa: E402
from tierkv.store import Hint, HintKind, Store  # noqa: E402
from tierkv.testing.store import staging_on  # noqa: E402
from tierkv.testing.streams import RecordingStreams  # noqa: E402
from tierkv.transfer.link_profile import SIZES, Direction, LinkProfile  # noqa: E402
from tierkv.transfer.staging import Route, Staging  # noqa: E402
from tierkv.transfer.streams import Queue  # noqa: E402

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
BLOCKS = 6
COPIES, KERNELS = (
    LinkProfile(way, way, "made up")
    for way in (Direction((1e9,) * len(SIZES), 1.0), Direction((1.0,) * len(SIZES), 1e9))
)


class World:
    """A store of 21 blocks on the device and 10 in host memory, and the streams beneath it."""

    def __init__(self, link: LinkProfile, streams: RecordingStreams) -> None:
        config = Config.model_validate(
            {
                "pages": {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"},
                "tiers": {
                    "host": {"capacity": "64KiB"},
                    "device": {"capacity": "128KiB", "device": "cpu"},
                },
                "transfer": {"demand_deadline_ms": 5000},
            }
        )
        self.streams = streams
        self.made: list[Staging] = []

        def staging(host: object, device: object) -> Staging:
            self.made.append(staging_on(self.streams, host, device, profile=link))
            return self.made[0]

        layout = Layout(GEOMETRY, targets=config.pages.targets, model="m")
        self.store = Store.open(config, layout, staging_for=staging)

    def tokens(self, seed: int) -> list[int]:
        draw = np.random.default_rng(seed)
        return [int(n) for n in draw.integers(0, 1000, BLOCKS * 16)]

    def bytes_of(self, seed: int) -> np.ndarray:
        shape = (self.store.plan.layers, BLOCKS, self.store.plan.block_layer_bytes)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    def fetch(self, seed: int) -> None:
        """Put a prompt that the device gives up at once, and have it brought back."""
        self.store.put(self.tokens(seed), self.bytes_of(seed))
        keys = self.store.keys(self.tokens(seed))
        self.store.hint(Hint(HintKind.DEMOTE, keys))
        assert self.store.match(self.tokens(seed)).tokens_by_tier == {"device": 0, "host": 96}
        self.store.hint(Hint(HintKind.PREFETCH, keys))
        ends = time.monotonic() + 5
        while not self.store.match(self.tokens(seed)).tokens_by_tier["device"]:
            assert time.monotonic() < ends
            self.store.step()
            time.sleep(0.001)  # a spinning thread would keep the others from the interpreter

    def use(self, prompts: int) -> int:
        """Put prompts, fetch and read them twice; blocks that came back, each as it was put."""
        found = 0
        for seed in range(prompts):
            self.store.put(self.tokens(seed), self.bytes_of(seed))
        for seed in [*range(prompts), *reversed(range(prompts))]:
            self.store.hint(Hint(HintKind.PREFETCH, self.store.keys(self.tokens(seed))))
            match = self.store.match(self.tokens(seed))
            out = np.zeros((3, match.blocks, self.store.plan.block_layer_bytes), np.uint8)
            count = self.store.get(match, out)
            assert np.array_equal(out[:, :count], self.bytes_of(seed)[:, :count]), f"prompt {seed}"
            found += count
            self.store.step()
        self.store.check()
        return found


@pytest.mark.parametrize("link", [COPIES, KERNELS], ids=["copies", "kernels"])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_cross_to_the_device_and_back_without_a_race(link: LinkProfile, seed: int) -> None:
    world = World(link, RecordingStreams(pace=2, seed=seed))
    with world.store:
        world.fetch(99)
        assert world.use(6) > 2 * BLOCKS
        links = world.store.snapshot()["links"]
        assert {"host,device,bytes_per_second", "device,host,bytes_per_second"} <= set(links)
    moved = world.made[0].moved_bytes
    assert moved[Route.MAPPED if link is KERNELS else Route.RUNS] > 0
    assert world.streams.races() == []


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_device_that_fails_costs_recomputing_and_nothing_else(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(COPIES, RecordingStreams(pace=1, broken_after=count))
    with world.store:
        assert world.use(6) > 0
    assert "an error of the device, as planted" in caplog.text


class Refusing(RecordingStreams):
    """Every third batch of copies is refused, after other operations of its call were queued."""

    calls = 0

    def copy(self, queue: Queue, copies: Copies, *, pinned: bool = True) -> None:
        self.calls += 1
        if self.calls % 3 == 2:
            raise RuntimeError("refused, as planted")
        super().copy(queue, copies, pinned=pinned)


def test_a_call_that_fails_half_way_is_waited_for_before_its_places_are_used_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel that a copy would have followed writes a slot that the next call takes."""
    world = World(COPIES, Refusing(pace=1))
    with world.store:
        assert world.use(6) > 0
    assert "refused, as planted" in caplog.text
    assert world.streams.races() == []
    assert len(world.streams.done) == len(world.streams.operations)
