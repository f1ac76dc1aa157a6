"""A small trace by seed, for tests: conversations that grow, share beginnings, and are left."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Trace(NamedTuple):
    """Requests as `tierkv.sim.replay` takes them."""

    starts: NDArray[np.int64]
    blocks: NDArray[np.int32]


def conversations(seed: int, requests: int) -> Trace:
    """That many requests; each continues a conversation, mostly a recent one, or begins one."""
    rng = Random(seed)
    names = iter(range(1_000_000_000))
    prompts = [[next(names) for _ in range(rng.randrange(3, 9))] for _ in range(4)]
    open_chains: list[list[int]] = []
    starts, blocks = [0], list[int]()
    for _ in range(requests):
        if not open_chains or rng.random() < 0.35:
            chain = prompts[min(rng.randrange(9), 3)].copy()
        else:
            chain = open_chains.pop(-1 - min(int(rng.expovariate(0.02)), len(open_chains) - 1))
        chain += [next(names) for _ in range(rng.randrange(1, 7))]
        blocks += chain
        starts.append(len(blocks))
        open_chains.append(chain)
    return Trace(np.array(starts, np.int64), _dense(blocks))


def _dense(blocks: list[int]) -> NDArray[np.int32]:
    ids: dict[int, int] = {}
    return np.array([ids.setdefault(block, len(ids)) for block in blocks], np.int32)
