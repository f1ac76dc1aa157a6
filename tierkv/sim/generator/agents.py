"""Agents: coding sessions with tool calls, after the sessions of kv-cache-tester.

A session begins with tools and system prompt, which it may share with others, and a first input.
Each answer calls a tool (its pause is known when the answer ends) or ends a turn (the user's
pause is as long as the user takes); the answer and what the tool says are appended. Now and then
the context is compacted, or a side request begins anew behind the prompt.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, cast

import msgspec
import numpy as np

from tierkv.sim.chaining import History
from tierkv.sim.generator.base import (
    Amount,
    Generator,
    GeneratorSettings,
    Hours,
    Quantiles,
    Sink,
)
from tierkv.sim.trace import Stop

# Measured on the 495 different sessions of cc_public (kv-cache-tester), 33,077 requests.
_TURNS: Final = Quantiles(1, 3, 4, 7, 17.5, 46, 93.5, 151, 208, 342, 700)
_FIRST_TOKENS: Final = Quantiles(
    9000, 10220, 12640, 15430, 18570, 24570, 107400, 259900, 354700, 724200, 900000
)
_PROMPT_TOKENS: Final = Quantiles(
    8000, 8520, 10060, 11610, 12800, 14940, 15450, 15930, 16800, 20950, 30000
)
_TOOL_TOKENS: Final = Quantiles(50, 114, 157, 197, 339, 682, 1630, 3813, 6619, 16740, 60000)
_USER_TOKENS: Final = Quantiles(30, 60, 90, 110, 230, 525, 1006, 2351, 5472, 23510, 60000)
_TOOL_OUTPUT: Final = Quantiles(40, 70, 92, 108, 139, 214, 418, 916, 1580, 3871, 16000)
_USER_OUTPUT: Final = Quantiles(8, 13, 24, 40, 177, 400, 599, 918, 1241, 2427, 8000)
_TOOL_PAUSE_S: Final = Quantiles(1, 2, 3, 4, 5, 8, 19, 70, 150, 618, 3600)
_USER_PAUSE_S: Final = Quantiles(1, 2, 3, 5, 47, 177, 765, 2663, 5470, 39530, 80000)
_ENDS_TURN: Final = 0.061  # 1,836 of 30,055 answers with a known end
_COMPACTS: Final = 0.006
_SIDE: Final = 0.010
_SESSION_PACE: Final = 0.35  # deviation of the logarithm of a session's tool pauses from all
_BUSY_S: Final = (2.8, 0.0155)  # and a token; least squares of api_time
_BUSY_SPREAD: Final = 0.3
_NEW_PROMPT: Final = (10.0, 0.75)  # theta and d: 279 prompts in 512 sessions, 16 with the first
_CONTEXT_TOKENS_MAX: Final = 1_000_000


class AgentSettings(GeneratorSettings, frozen=True):
    """hours: sessions begin uniformly over them, and are cut at twice as many."""

    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    hours: Hours = 3.0
    sessions: Amount = 120


class Agents(Generator):
    """Generates agent sessions."""

    name = "agents"
    settings: ClassVar[type[GeneratorSettings]] = AgentSettings
    fitted = "fitted to the agent sessions of kv-cache-tester"

    def fill(self, sink: Sink, settings: GeneratorSettings, rng: np.random.Generator) -> None:
        """Add all sessions."""
        chosen = cast("AgentSettings", settings)
        prompts: list[History] = []
        uses: list[int] = []
        for _ in range(chosen.sessions):
            prompt = _prompt(sink, prompts, uses, rng)
            start = float(rng.random()) * chosen.hours * 3600
            _session(sink, prompt, start, 2 * chosen.hours * 3600, rng)


def _prompt(
    sink: Sink, prompts: list[History], uses: list[int], rng: np.random.Generator
) -> History:
    """A known prompt, the likelier the more it was used, or a new one (Pitman and Yor)."""
    theta, d = _NEW_PROMPT
    at = float(rng.random()) * (theta + sum(uses))
    for number, count in enumerate(uses):
        at -= count - d
        if at < 0:
            uses[number] += 1
            return prompts[number]
    prompts.append(sink.prompt(round(_PROMPT_TOKENS.draw(rng))))
    uses.append(1)
    return prompts[-1]


def _session(
    sink: Sink, prompt: History, start: float, end: float, rng: np.random.Generator
) -> None:
    session, history = sink.new_session(), History()
    turns = max(1, round(_TURNS.draw(rng)))
    pace = float(np.exp(_SESSION_PACE * rng.standard_normal()))
    at = start
    _begin(sink, history, prompt, rng)
    for turn in range(turns):
        ends_turn = rng.random() < _ENDS_TURN
        output = (_USER_OUTPUT if ends_turn else _TOOL_OUTPUT).draw(rng)
        noise = float(np.exp(_BUSY_SPREAD * rng.standard_normal()))
        busy = (_BUSY_S[0] + _BUSY_S[1] * output) * noise
        pause = _USER_PAUSE_S.draw(rng) if ends_turn else pace * _TOOL_PAUSE_S.draw(rng)
        is_last = turn + 1 == turns
        sink.add(
            at,
            history,
            output=output,
            session=session,
            stop=Stop.END if ends_turn or is_last else Stop.TOOL,
            pause=None if is_last else pause,
            busy=busy,
        )
        at += busy + pause
        if at >= end:
            return
        _go_on(sink, history, prompt, ends_turn, rng)


def _begin(sink: Sink, history: History, prompt: History, rng: np.random.Generator) -> None:
    history.set_ids(prompt.ids(), prompt.tokens)
    history.keep(sink, prompt.count)
    first = round(_FIRST_TOKENS.draw(rng))
    history.grow(sink, max(200, first - history.tokens))


def _go_on(
    sink: Sink, history: History, prompt: History, is_user: bool, rng: np.random.Generator
) -> None:
    chance = float(rng.random())
    if chance < _SIDE or history.tokens > _CONTEXT_TOKENS_MAX:
        _begin(sink, history, prompt, rng)
    elif chance < _SIDE + _COMPACTS:
        rest = history.tokens // 4
        history.set_ids(prompt.ids(), prompt.tokens)
        history.keep(sink, prompt.count)
        history.grow(sink, max(200, rest))
    else:
        history.grow(sink, round((_USER_TOKENS if is_user else _TOOL_TOKENS).draw(rng)))
