"""What is written behind gives way to whoever reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.cold_directories import GEOMETRY, config_of, tokens_of
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
