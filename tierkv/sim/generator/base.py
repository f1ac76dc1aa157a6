"""What a generator is made of: tables of quantiles, and a sink of requests.

Distributions are tables of quantiles measured on a public trace, read backwards: a uniform number
is looked up and interpolated, in logarithms. They need no family of curves to fit, and the same
seed gives the same trace on every machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from tierkv.core.errors import ConfigError
from tierkv.sim.chaining import History
from tierkv.sim.settings import Seed, Settings
from tierkv.sim.trace import SECOND_NS, TOKENS_MAX, Stop, Trace, TraceBuilder, TraceFacts

BlockTokens = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Hours = Annotated[float, msgspec.Meta(gt=0, le=24 * 31)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1e5)]
Amount = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]

#: No generator makes more than so many requests: a setting is soon mistyped.
REQUESTS_MAX: Final = 5_000_000
REFERENCES_MAX: Final = 500_000_000

#: Where the tables below have their values.
LEVELS: Final = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)


class Quantiles:
    """A distribution of positive numbers by its quantiles at `LEVELS`."""

    __slots__ = ("_logs",)

    def __init__(self, *values: float) -> None:
        if len(values) != len(LEVELS):
            raise ValueError(f"{len(values)} values for {len(LEVELS)} levels")
        self._logs = np.log(np.maximum(values, 1e-3))

    def draw(self, rng: np.random.Generator) -> float:
        """One number."""
        return float(np.exp(np.interp(rng.random(), LEVELS, self._logs)))


class Sink:
    """Where a generator's requests go: gives out ids of blocks, numbers of threads and tenants."""

    def __init__(self, builder: TraceBuilder, block_tokens: int) -> None:
        self._builder = builder
        self._next_block = 0
        self._next_session = 0
        self._references = 0
        self.block_tokens = block_tokens
        self.tenant = 0
        self.start = 0.0

    def new_blocks(self, count: int) -> NDArray[np.int64]:
        """Ids of blocks that were never seen."""
        first = self._next_block
        self._next_block += count
        return np.arange(first, first + count, dtype=np.int64)

    def new_session(self) -> int:
        """The number of a new thread."""
        self._next_session += 1
        return self._next_session - 1

    def prompt(self, tokens: int) -> History:
        """A new prefix of so many tokens, to begin histories with."""
        history = History()
        history.grow(self, tokens)
        return history

    def add(
        self,
        at: float,
        history: History,
        *,
        output: float,
        session: int,
        stop: Stop = Stop.END,
        pause: float | None = None,
        busy: float | None = None,
    ) -> None:
        """One request, sent `at` seconds from the start."""
        self._references += history.count
        if len(self._builder) >= REQUESTS_MAX or self._references > REFERENCES_MAX:
            raise ConfigError(
                f"more than {REQUESTS_MAX} requests or {REFERENCES_MAX} references to blocks: "
                "ask for fewer hours, sessions or requests a second"
            )
        self._builder.add(
            round((self.start + at) * SECOND_NS),
            history.ids(),
            input_tokens=min(history.tokens, TOKENS_MAX),
            output_tokens=max(1, round(output)),
            session=session,
            tenant=self.tenant,
            stop=stop,
            pause_ns=-1 if pause is None else round(pause * SECOND_NS),
            busy_ns=-1 if busy is None else round(busy * SECOND_NS),
        )


class GeneratorSettings(Settings, frozen=True):
    """What every generator may be asked for. `block_tokens` as in the trace it was fitted to."""

    seed: Seed = 1
    block_tokens: BlockTokens = 512


class Generator(ABC):
    """One kind of load. Holds no state: the seed decides everything."""

    name: ClassVar[str]
    #: Counts up when the same settings give another trace than before.
    version: ClassVar[int] = 1
    settings: ClassVar[type[GeneratorSettings]] = GeneratorSettings
    #: The public trace that the numbers were fitted to, or what they are instead.
    fitted: ClassVar[str]

    @abstractmethod
    def fill(self, sink: Sink, settings: GeneratorSettings, rng: np.random.Generator) -> None:
        """Add all requests, in any order."""


def made(generator: Generator, settings: GeneratorSettings) -> Trace:
    """The trace of one generator. Raises ConfigError if no request comes of it."""
    name = f"builtin:{generator.name}"
    builder = TraceBuilder(name, settings.block_tokens)
    generator.fill(Sink(builder, settings.block_tokens), settings, _rng(settings.seed))
    if not len(builder):
        raise ConfigError(f"{name}: no request comes of these settings")
    words = settings.words()
    text = "\0".join([name, str(generator.version), *(f"{k}={v}" for k, v in words.items())])
    return builder.build(
        TraceFacts(
            format="builtin",
            source=(name,),
            digest=xxhash.xxh3_128_hexdigest(text.encode()),
            synthesised=(f"everything: {generator.fitted}",),
            settings=words,
        )
    )


def poisson_times(rng: np.random.Generator, rate: float, seconds: float) -> NDArray[np.float64]:
    """Times of a Poisson process of `rate` a second. Raises ConfigError for too many."""
    if rate * seconds > REQUESTS_MAX:
        raise ConfigError(f"about {rate * seconds:.3g} arrivals, more than {REQUESTS_MAX}")
    return np.sort(rng.random(int(rng.poisson(rate * seconds))) * seconds)


def zipf_weights(count: int, slope: float) -> NDArray[np.float64]:
    """Cumulative popularity of `count` things, the most popular first."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -slope
    return np.cumsum(weights / weights.sum())


def drawn(rng: np.random.Generator, cumulative: NDArray[np.float64]) -> int:
    """The index of one thing by cumulative weights."""
    return min(int(np.searchsorted(cumulative, rng.random())), len(cumulative) - 1)


def _rng(seed: int) -> np.random.Generator:
    # Named, so that a new default of numpy's changes no trace.
    return np.random.Generator(np.random.PCG64(seed))
