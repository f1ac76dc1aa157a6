"""Hazard: the chance that what a request used is used again, by how long ago that was.

The predictor of `adaptive`. The age of a *group* (blocks that one request used last) runs from that
use, in bins that grow by a constant factor. A group is at risk in each bin that it enters unused,
and its reuse is an event of the bin that it is in: hazard = events / risk, as in discrete survival
analysis (Cox, 1972). It is taken for a product::

    baseline of the group's segment [bin]  x  effect of each of its levels [bin]

A level is a cell of one factor (`FACTORS`): how far the session is and how much was new; the pause
before and the length of the answer; the usual pause and why the answer ended. Effects are fitted by
iterative proportional fitting in one pass: risk is summed as groups grow older, weighted by the
effects of their other levels at that time. What was seen counts half every `HALF_LIFE` requests.

Where little was seen a cell leans on what is known: the baseline of a segment on that of all, that
on a hazard that falls with age, an effect on its own younger bins. An age that nobody reached yet
must not look like a good one.

`worth` makes a rank of hazards: the largest rate, over all horizons, of reuses per second of
keeping (Gittins, 1979; for caches: LHD, NSDI 2018, section 3). A group whose reuse is due soon is
worth more than one whose reuse is not, however recent. A `Model` is arrays, changed in place.
Single owner.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierkv.core.compiled import compiled

Floats = NDArray[np.float64]

#: Segments of a request's blocks: shared with other requests, its own, its partial last block.
SEGMENTS: Final = 3

#: Upper bounds of the levels of each feature; one more level lies above the last.
TURNS: Final = (1.0, 2.0, 3.0, 4.0)
NEW_TOKENS: Final = (513.0, 1025.0, 2049.0, 8000.0)
ANSWER_TOKENS: Final = (50.0, 150.0, 300.0, 600.0)
PAUSES_S: Final = (0.0, 8.0, 12.0, 18.0, 30.0, 50.0, 90.0, 200.0)  # below 0: there was none
STOPS: Final = (1.0, 2.0, 3.0)
FEATURES: Final = (TURNS, NEW_TOKENS, ANSWER_TOKENS, PAUSES_S, PAUSES_S, STOPS)
_CUTS: Final = np.array([b + (np.inf,) * (10 - len(b)) for b in FEATURES])
#: Factors of a hazard: features whose levels are crossed.
FACTORS: Final = ((0, 1), (3, 2), (4, 5))
_SIZES: Final = np.array([len(bounds) + 1 for bounds in FEATURES])
LEVELS_MAX: Final = max(math.prod(int(_SIZES[f]) for f in crossed) for crossed in FACTORS)
_CROSSED: Final = np.array([(*c, -1)[:2] for c in FACTORS])

#: Requests after which what was learned counts half.
HALF_LIFE: Final = 5000.0
#: Requests between two fits.
FIT_EVERY: Final = 128
#: How much of the usual pause of a session is its last one.
PAUSE_WEIGHT: Final = 0.15

#: Pseudo-groups that stand for what is known where little was seen.
_LEAN_ALL: Final = 30.0
_LEAN_SEGMENT: Final = 20.0
_LEAN_LEVEL: Final = 2.0
_LEAN_RUN: Final = 5.0
#: What a younger bin counts in the running ratio of a level, from bin to bin.
_RUN_DECAY: Final = 0.6
#: The hazard of ages that nobody has reached falls with them, from this age on faster.
_FALL: Final = 0.3
_FALL_FROM_S: Final = 200.0
_FALL_MORE: Final = 0.85
_EFFECT_MAX: Final = 3.0
_HAZARD_MAX: Final = 0.95


def edges_s(first: float = 1.0, last: float = 4e6, ratio: float = 1.5) -> Floats:
    """Ages at which bins begin, in seconds: 0, `first`, and on by `ratio` until `last`."""
    count = math.ceil(math.log(last / first, ratio)) + 1
    return np.concatenate([[0.0], first * ratio ** np.arange(count)])


class Model(NamedTuple):
    """What was learned. K bins, F features, L levels."""

    edges: Floats  # (K + 1,)
    events: Floats  # (SEGMENTS, K)
    risk: Floats  # (SEGMENTS, K)
    level_events: Floats  # (SEGMENTS, F, L, K)
    level_risk: Floats  # (SEGMENTS, F, L, K): times the effects of the other levels
    effects: Floats  # (SEGMENTS, F, L, K): factors
    baseline: Floats  # (SEGMENTS, K)
    weights: Floats  # (2,): sum and count of the weights of groups


def new_model() -> Model:
    """A model that has seen nothing."""
    edges = edges_s()
    bins, features = len(edges) - 1, len(FACTORS)
    shape = (SEGMENTS, features, LEVELS_MAX, bins)
    model = Model(
        edges=edges,
        events=np.zeros((SEGMENTS, bins)),
        risk=np.zeros((SEGMENTS, bins)),
        level_events=np.zeros(shape),
        level_risk=np.zeros(shape),
        effects=np.ones(shape),
        baseline=np.zeros((SEGMENTS, bins)),
        weights=np.ones(2),
    )
    fit(model, 1.0)
    return model


@compiled
def levels_of(features: Floats, levels: NDArray[np.uint8]) -> None:
    """Cut the features of a request, and cross them to the level of each factor."""
    for factor in range(len(levels)):
        level = 0
        for feature in _CROSSED[factor]:
            if feature >= 0:
                cut = 0
                while features[feature] >= _CUTS[feature, cut]:
                    cut += 1
                level = level * _SIZES[feature] + cut
        levels[factor] = level


@compiled
def at_risk(
    model: Model, segment: int, levels: NDArray[np.uint8], bin_: int, weight: float
) -> None:
    """Blocks of a group enter a bin unused."""
    model.risk[segment, bin_] += weight
    effects, whole = model.effects, 1.0
    for feature in range(len(levels)):
        whole *= effects[segment, feature, levels[feature], bin_]
    for feature in range(len(levels)):
        level = levels[feature]
        others = whole / effects[segment, feature, level, bin_]
        model.level_risk[segment, feature, level, bin_] += weight * others


@compiled
def used(model: Model, segment: int, levels: NDArray[np.uint8], bin_: int, weight: float) -> None:
    """Blocks of a group are used in the bin that it is in."""
    model.events[segment, bin_] += weight
    for feature in range(len(levels)):
        model.level_events[segment, feature, levels[feature], bin_] += weight


@compiled
def fit(model: Model, keep: float) -> None:
    """Let what was seen fade to `keep` of it, and make effects and baselines of it."""
    edges, bins = model.edges, len(model.edges) - 1
    _fade(model.events.ravel(), keep)
    _fade(model.risk.ravel(), keep)
    _fade(model.level_events.ravel(), keep)
    _fade(model.level_risk.ravel(), keep)
    one = model.weights[0] / model.weights[1]  # the weight of a usual group
    all_, fall = np.empty(bins), _FALL
    for k in range(bins):
        width = math.log((edges[k + 1] + 1.0) / (edges[k] + 1.0))
        events = risk = 0.0
        for segment in range(SEGMENTS):
            events += model.events[segment, k]
            risk += model.risk[segment, k]
        lean = _LEAN_ALL * one
        all_[k] = (events + lean * (1.0 - math.exp(-fall * width))) / (risk + lean)
        if edges[k] >= _FALL_FROM_S:
            seen = -math.log(1.0 - min(all_[k], 0.999)) / width
            fall = min(fall, _FALL_MORE * seen)
    for segment in range(SEGMENTS):
        found, expected, lean = 0.0, 0.0, _LEAN_SEGMENT * one
        for k in range(bins):
            run = (found + _LEAN_RUN * one) / (expected + _LEAN_RUN * one)
            events, risk = model.events[segment, k], model.risk[segment, k]
            prior = min(0.9, all_[k] * run)
            model.baseline[segment, k] = min(0.9, (events + lean * prior) / (risk + lean))
            found = _RUN_DECAY * found + events
            expected = _RUN_DECAY * expected + risk * all_[k]
        _fit_levels(model, segment, one)


@compiled
def _fade(counts: Floats, keep: float) -> None:
    for at in range(len(counts)):  # a loop, as numba compiles an array's `*=` for seconds
        counts[at] *= keep


@compiled
def _fit_levels(model: Model, segment: int, one: float) -> None:
    low, high = math.exp(-_EFFECT_MAX), math.exp(_EFFECT_MAX)
    _, features, levels, bins = model.effects.shape
    lean, lean_run = _LEAN_LEVEL * one, _LEAN_RUN * one
    for feature in range(features):
        for level in range(levels):
            found, expected = 0.0, 0.0
            for k in range(bins):
                events = model.level_events[segment, feature, level, k]
                risk = model.level_risk[segment, feature, level, k] * model.baseline[segment, k]
                run = (found + lean_run) / (expected + lean_run)
                effect = (events + lean * run) / (risk + lean)
                model.effects[segment, feature, level, k] = min(high, max(low, effect))
                found = _RUN_DECAY * found + events
                expected = _RUN_DECAY * expected + risk


@compiled
def worth(
    model: Model, segment: int, levels: NDArray[np.uint8], bin_: int, chances: Floats
) -> tuple[float, float]:
    """What keeping a group is worth where it enters a bin, and where it leaves it.

    In reuses a second, at the best horizon. `chances`: (K,), for scratch.
    """
    bins = len(model.edges) - 1
    chances[bin_:] = model.baseline[segment, bin_:]
    for feature in range(len(levels)):
        effects = model.effects[segment, feature, levels[feature]]
        for k in range(bin_, bins):
            chances[k] *= effects[k]
    for k in range(bin_, bins):
        chances[k] = min(_HAZARD_MAX, chances[k])
    first = _rate(model.edges, chances, bin_)
    return first, _rate(model.edges, chances, bin_ + 1) if bin_ + 1 < bins else first


@compiled
def _rate(edges: Floats, chances: Floats, bin_: int) -> float:
    best, alive, gain, cost = 0.0, 1.0, 0.0, 0.0
    for k in range(bin_, len(chances)):
        chance, width = chances[k], edges[k + 1] - edges[k]
        gain += alive * chance
        cost += alive * width * (1.0 - chance * 0.5)
        alive *= 1.0 - chance
        rate = gain / cost
        if rate > best:
            best = rate
        elif chance < 0.2 * best * width and k > bin_ + 12:
            break
    return best
