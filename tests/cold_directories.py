"""Cold directories of a small model for the tests of `check`, `scrub` and `drill`.

A page holds 5 blocks of 16 tokens, a segment 8 pages. What is stored follows from the number of
the namespace alone, so that a test can ask for it again by `tokens_of`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tierkv import cli
from tierkv.config import Config
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.store import Store
from tierkv.tiers.segment_format import page_header_bytes

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=16, dtype="float16")
PAGES = {"hot": "1KiB", "warm": "32KiB", "cold": "128KiB"}
NAMESPACES = ("default", "tenant")
HEADER = page_header_bytes(5)
SLOT = HEADER + 32768


def config_of(directory: Path) -> Config:
    cold = {"capacity": "4MiB", "directory": directory, "segment_cold_pages": 2, "threads": 2}
    tiers = {
        "host": {"capacity": "512KiB"},
        "device": {"capacity": 0, "device": "cpu"},
        "cold": cold,
    }
    spaces: dict[str, dict[str, str]] = {"default": {}, "tenant": {"salt": "s"}}
    return Config.model_validate({"pages": PAGES, "tiers": tiers, "namespaces": spaces})


def open_store(directory: Path, model: str = "m") -> Store:
    config = config_of(directory)
    return Store.open(config, Layout(GEOMETRY, targets=config.pages.targets, model=model))


def tokens_of(blocks: int, seed: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, 1000, blocks * 16)]


def fill(
    directory: Path,
    blocks: int = 60,
    *,
    model: str = "m",
    namespaces: Sequence[str] = NAMESPACES[:1],
) -> None:
    """Store a prompt of so many blocks in each namespace, durable, and close cleanly."""
    with open_store(directory, model) as store:
        shape = (store.plan.layers, blocks, store.plan.block_layer_bytes)
        for seed, name in enumerate(namespaces):
            data = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
            store.put(tokens_of(blocks, seed), data, namespace=name)
        assert store.flush()


def slot_of(folder: Path, page: int) -> tuple[Path, int]:
    """The file of a page and where in it the page's header begins."""
    return folder / f"segment-{page // 8:08d}.tkv", 4096 + page % 8 * SLOT


def flip(path: Path, offset: int, mask: int = 1) -> None:
    """Flip bits of one byte in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def flip_page(folder: Path, page: int, at: int, mask: int = 1) -> None:
    """Flip bits of the byte `at` of a page's slot: its header, then its payload."""
    path, offset = slot_of(folder, page)
    flip(path, offset + at, mask)


def run_command(*arguments: object) -> int:
    """The exit code of `tierkv ARGUMENTS`; what it prints goes where the test's output goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tierkv", *map(str, arguments)])
        patch.setattr(os, "nice", lambda _: None)  # a process cannot take that back
        with pytest.raises(SystemExit) as caught:
            cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else int(code is not None)
