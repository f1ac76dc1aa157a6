"""RAGPulse: a week of a university's question service, prompts by their components.

A directory: `0_trace.jsonl` has `timestamp` (s), `input_length`, `output_length`, `hash_ids` by
component and `session_id`; five files more map each component's ids to `token_length`
(github.com/flashserve/RAGPulse, data/). Ids name content. Blocks are made here of the components
in the order system prompt, passages, history, web search, question; their lengths, summed, are the
input's length, which the trace's own differs from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Final, cast

import msgspec

from tierkv.core.errors import ConfigError
from tierkv.sim.chaining import chained_ids
from tierkv.sim.formats.base import TraceFormat, TraceSource
from tierkv.sim.settings import Settings
from tierkv.sim.source import BAD_LINE, COMPRESSED, lines
from tierkv.sim.trace import SECOND_NS, TOKENS_MAX, Stop, Trace, TraceBuilder

#: Component of `hash_ids`, file of its lengths, field of its id there; in the prompt's order.
COMPONENTS: Final = (
    ("sys_prompt", "1_sys_prompt.jsonl", "sys_prompt_id"),
    ("passages_ids", "2_passages.jsonl", "passage_id"),
    ("history", "3_history.jsonl", "history_id"),
    ("web_search", "5_web_search.jsonl", "web_search_id"),
    ("user_input", "4_user_input.jsonl", "user_input_id"),
)
_REQUESTS: Final = "0_trace.jsonl"
_IDS_MAX: Final = 20_000_000
_NUMBER: Final = re.compile(r"\d{1,12}(\.\d{1,9})?")

Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62) - 1)]


class RagPulseSettings(Settings, frozen=True):
    """block_tokens: of the blocks that are made."""

    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 16


class _Line(msgspec.Struct):
    timestamp: str | float
    hash_ids: dict[str, list[Id]]
    output_length: Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)] = 0
    session_id: str = ""


class RagPulse(TraceFormat):
    """Reads RAGPulse's directory of files."""

    name = "ragpulse"
    settings: ClassVar[type[Settings]] = RagPulseSettings

    @staticmethod
    def matches(path: Path, head: bytes) -> bool:
        if path.is_dir():
            return _file(path, _REQUESTS) is not None
        return b'"passages_ids"' in head.split(b"\n", 1)[0]

    @staticmethod
    def whole(path: Path) -> Path:
        return path if path.is_dir() else path.parent

    def read(self, source: TraceSource, settings: Settings) -> Trace:
        size = cast("RagPulseSettings", settings).block_tokens
        requests = _file(source.path, _REQUESTS)
        if requests is None:
            raise ConfigError(f"{source.path}: no {_REQUESTS} in it")
        source.files = [requests.name]
        lengths = {part: _lengths(source, file, key) for part, file, key in COMPONENTS}
        builder = TraceBuilder(source.path.name, size)
        decode = msgspec.json.Decoder(_Line).decode
        sessions: dict[str, int] = {}
        for number, line in lines(requests, source.problems):
            try:
                entry = decode(line)
                pieces = _pieces(entry, lengths)
                builder.add(
                    _seconds_ns(entry.timestamp),
                    chained_ids(pieces, size),
                    input_tokens=sum(tokens for _, tokens in pieces),
                    output_tokens=entry.output_length,
                    session=sessions.setdefault(entry.session_id, len(sessions)),
                    stop=Stop.END,
                )
            except BAD_LINE as error:
                source.problems.add(requests.name, number, str(error))
        if not len(builder):
            raise ConfigError(f"{requests}: no request in it that {self.name} can be")
        order = ", ".join(part for part, _, _ in COMPONENTS)
        made = f"blocks: components chained in the order {order}, cut into {size} tokens; their "
        made += "lengths summed are the input's"
        return builder.build(source.facts(self.name, settings.words(), synthesised=(made,)))


def _pieces(entry: _Line, lengths: dict[str, dict[int, int]]) -> list[tuple[int, int]]:
    pieces: list[tuple[int, int]] = []
    for part, known in lengths.items():
        for content in entry.hash_ids.get(part, ()):
            if content not in known:
                raise ValueError(f"{part} {content} has no length")
            pieces.append((content, known[content]))
    return pieces


def _lengths(source: TraceSource, name: str, key: str) -> dict[int, int]:
    file = _file(source.path, name)
    if file is None:
        raise ConfigError(f"{source.path}: no {name} in it")
    source.files.append(file.name)
    found: dict[int, int] = {}
    for number, line in lines(file, source.problems):
        try:
            row = msgspec.json.decode(line, type=dict[str, int])
            tokens = row["token_length"]
            if not 0 <= tokens <= TOKENS_MAX or not 0 <= row[key] < 1 << 62:
                raise ValueError("an id or a length out of range")
            found[row[key]] = tokens
        except KeyError as error:
            source.problems.add(file.name, number, f"no {error}")
        except BAD_LINE as error:
            source.problems.add(file.name, number, str(error))
        if len(found) > _IDS_MAX:
            raise ConfigError(f"{file}: more than {_IDS_MAX} ids")
    return found


def _file(folder: Path, name: str) -> Path | None:
    for suffix in ("", *COMPRESSED):
        if (file := folder / f"{name}{suffix}").is_file():
            return file
    return None


def _seconds_ns(value: str | float) -> int:
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            raise ValueError(f"timestamp {value[:40]!r}")
        value = float(value)
    if not 0 <= value <= 1e12:
        raise ValueError(f"timestamp {value}")
    return round(value * SECOND_NS)
