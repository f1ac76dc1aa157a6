"""Traces that are hard on a predictor: what it learned does not hold, or there is nothing to learn.

Sessions of some turns; each turn's prompt is the last one and more blocks. How long a session
pauses between turns is what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from tierkv.sim import Trace, TraceBuilder, TraceFacts

BLOCK: Final = 64
_TURN_BLOCKS: Final = 6
_SESSIONS: Final = 4000
_TURNS: Final = 5.0

#: Seconds of a pause, from a generator and when in the trace it is (0 .. 1).
Pause = Callable[[np.random.Generator, float], float]


def exponential(mean_s: float) -> Pause:
    """Memoryless: how long it has lasted tells nothing."""
    return lambda rng, _when: float(rng.exponential(mean_s))


PAUSES: Final[dict[str, Pause]] = {
    "memoryless 20 s": exponential(20.0),
    "memoryless 300 s": exponential(300.0),
    "Pareto": lambda rng, _when: 5.0 * float(rng.pareto(1.2) + 1.0),
    "fixed 60 s, then memoryless 5 s": lambda rng, when: (
        60.0 if when < 0.5 else float(rng.exponential(5.0))
    ),
    "memoryless 5 s, then fixed 60 s": lambda rng, when: (
        60.0 if when >= 0.5 else float(rng.exponential(5.0))
    ),
    "by turns: 8 s, 200 s": lambda rng, when: 8.0 if int(when * 20) % 2 else 200.0,
}


def stress_traces(seed: int = 0) -> Iterator[Trace]:
    """One trace for each kind of pause."""
    for name, pause in PAUSES.items():
        yield sessions_of(name, pause, np.random.default_rng(seed))


def sessions_of(name: str, pause: Pause, rng: np.random.Generator) -> Trace:
    """Sessions that begin one by one, a second apart on average."""
    requests = []
    begin_s = 0.0
    for session in range(_SESSIONS):
        begin_s += float(rng.exponential(1.0))
        now_s, ids = begin_s, []
        for turn in range(int(rng.geometric(1.0 / _TURNS))):
            ids += [(session, turn, n) for n in range(int(rng.integers(1, 2 * _TURN_BLOCKS)))]
            requests.append((now_s, tuple(ids), int(rng.integers(20, 800))))
            now_s += pause(rng, session / _SESSIONS)
    requests.sort(key=lambda request: request[0])
    numbers: dict[tuple[int, int, int], int] = {}
    builder = TraceBuilder(name, BLOCK)
    for now_s, chain, answer in requests:
        dense = [numbers.setdefault(block, len(numbers)) for block in chain]
        builder.add(
            int(now_s * 1e9),
            np.array(dense, np.int64),
            input_tokens=len(chain) * BLOCK,
            output_tokens=answer,
        )
    return builder.build(TraceFacts(format="stress", source=(name,)))
