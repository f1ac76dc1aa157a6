"""Directories as `tierkv demo --directory` leaves them, made and read by processes of their own.

Page sizes and configuration are the demo's, so that the README's commands hit here what they hit
there. Only what is stored is less: prompts of eight blocks, which are four pages each and follow
from their number. Run as ``python -m tests.demo_directories WORD DIRECTORY COUNT``:

    put     stores the prompts 0 .. COUNT - 1, durable, and stops
    serve   stores prompt after prompt from COUNT on, and says a number when that prompt is durable
    look    gets the prompts 0 .. COUNT - 1, stores anew what is missing, and one prompt more; says
            how many blocks of each it found, and how many pages were damaged, as JSON
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from tierkv.core.errors import TierKVError
from tierkv.core.geometry import MIB, KVGeometry, Layout
from tierkv.demo.restart import Capacities, damaged_pages
from tierkv.store import Store

#: That of the demo's model.
GEOMETRY: Final = KVGeometry(layers=30, kv_heads=3, head_dim=64, dtype="float32")
BLOCKS: Final = 8
PAGES: Final = 4


def open_store(directory: Path) -> Store:
    capacities = Capacities(device=0, host=64 * MIB, cold=512 * MIB)
    return Store.open(capacities.config(directory / "kv"), Layout(GEOMETRY, model="m"))


def tokens_of(number: int) -> list[int]:
    return list(range(1000 * number, 1000 * number + 16 * BLOCKS))


def bytes_of(store: Store, number: int) -> npt.NDArray[np.uint8]:
    shape = (store.plan.layers, BLOCKS, store.plan.block_layer_bytes)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def put(store: Store, number: int) -> None:
    """Store a prompt and make it durable."""
    assert store.put(tokens_of(number), bytes_of(store, number)) == BLOCKS
    assert store.flush()


def found_of(store: Store, number: int) -> int:
    """Get a prompt and compare every byte; how many blocks there were."""
    match = store.match(tokens_of(number))
    expected = bytes_of(store, number)
    out = np.empty_like(expected)
    blocks = store.get(match, out)
    if not np.array_equal(out[:, :blocks], expected[:, :blocks]):
        sys.exit(f"WRONG BYTES in the first {blocks} blocks of prompt {number}")
    return blocks


def look(store: Store, prompts: int) -> dict[str, object]:
    found = [found_of(store, number) for number in range(prompts)]
    for number in range(prompts + 1):
        put(store, number)
        assert found_of(store, number) == BLOCKS
    return {"blocks": found, "damaged": damaged_pages(store)}


def say(line: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    word, directory, prompts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    try:
        with open_store(directory) as store:
            if word == "look":
                say(json.dumps(look(store, prompts)))
                return
            for number in range(prompts) if word == "put" else count(prompts):
                put(store, number)
                say(str(number))
    except TierKVError as error:
        sys.exit(f"tierkv: {error}")


if __name__ == "__main__":
    main()
