"""Giving way: what is written behind to whoever reads, and what has failed to who comes next."""

from __future__ import annotations

import errno
import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.cold_directories import GEOMETRY, HEADER, SLOT, config_of, fill, tokens_of
from tierkv.core.geometry import Layout
from tierkv.store import Store
from tierkv.tiers.files import base
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.files.portable import PortableFiles
from tierkv.transfer.lane import Lane


class Noted(PortableFiles):
    """The bytes of each write are noted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.writes: list[int] = []

    def write(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        self.writes.append(sum(map(len, buffers)))
        super().write(handle, offset, buffers)


@pytest.mark.parametrize("is_busy", [True, False])
def test_writes_are_small_while_somebody_reads_and_whole_pages_when_nobody_does(
    is_busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "TURN_BYTES", 8192)
    monkeypatch.setattr(Lane, "is_busy", property(lambda _: is_busy))
    config, made = config_of(tmp_path), []

    def files_for(root: Path) -> Noted:
        made.append(Noted(root))
        return made[0]

    layout = Layout(GEOMETRY, targets=config.pages.targets, model="m")
    with Store.open(config, layout, files_for=files_for) as store:
        shape = (store.plan.layers, 40, store.plan.block_layer_bytes)
        data = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert store.put(tokens_of(40, 0), data) == 40
        assert store.flush()
        assert sum(made[0].writes) > 40 * store.plan.block_bytes
        assert (max(made[0].writes) <= 8192) == is_busy


class Faulty(PortableFiles):
    """Reads that cover `at` get another bit there, or an error."""

    at: int | None = None
    error: int | None = None

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        super().read(handle, offset, buffers)
        for buffer in buffers:
            if self.at is not None and offset <= self.at < offset + len(buffer):
                if self.error is not None:
                    raise OSError(self.error, "a bad sector")
                buffer[self.at - offset] ^= 1
            offset += len(buffer)


@pytest.mark.parametrize("error", [None, errno.EIO])
def test_a_page_that_failed_keeps_no_memory_in_use(error: int | None, tmp_path: Path) -> None:
    fill(tmp_path, 60)
    config, made = config_of(tmp_path), []

    def files_for(root: Path) -> Faulty:
        made.append(Faulty(root))
        return made[0]

    layout = Layout(GEOMETRY, targets=config.pages.targets, model="m")
    gc.collect()
    gc.disable()
    try:
        with Store.open(config, layout, files_for=files_for) as store:
            made[0].at, made[0].error = SLOT + 2 * HEADER, error
            match = store.match(tokens_of(60, 0))
            out = np.empty((store.plan.layers, 60, store.plan.block_layer_bytes), np.uint8)
            assert 0 < store.get(match, out) < 60
            arena = store._runtime.engine._host._map
            assert arena is not None
        assert arena.closed
    finally:
        gc.enable()
