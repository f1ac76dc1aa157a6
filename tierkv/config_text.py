"""YAML text as plain Python, with the place of every key and value.

The reader accepts the part of YAML 1.2 that people write by hand: mappings, lists and scalars
of one document. What makes YAML files surprising or dangerous is refused with the place and the
cure: duplicate keys, anchors and aliases (a few lines can stand for billions of nodes), tags,
directives, merge keys, numbers that YAML versions read differently (017, 0x1F, 1_000, 1:30),
more than 32 levels, and more than `EVENTS_MAX` keys and values, so that no file of the largest
accepted size takes more than a few seconds. `no` and `on` are text, as YAML 1.2 says.

Lines and columns are counted from 1, columns in characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.reader import ReaderError

DEPTH_MAX: Final = 32
#: Keys, values, beginnings and ends of mappings and lists. 1024 tenants with all keys: 11,264.
EVENTS_MAX: Final = 32_768

Keys: TypeAlias = tuple[str | int, ...]
Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"


class Place(NamedTuple):
    """Where something stands in a text."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    place: Place
    path: str
    message: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a setting was written, and how."""

    line: int
    text: str


@dataclass(slots=True)
class Document:
    """What a text says, and all that is wrong with how it says it.

    `root` is None unless the text parsed to its end and is a mapping. `refused` holds the paths
    of settings that already have a problem.
    """

    root: dict[str, Plain] | None = None
    problems: list[Problem] = field(default_factory=list)
    values: dict[Keys, Place] = field(default_factory=dict)
    keys: dict[Keys, Place] = field(default_factory=dict)
    sources: dict[Keys, Source] = field(default_factory=dict)
    refused: set[Keys] = field(default_factory=set)

    def problem(self, place: Place, path: Keys, message: str) -> None:
        """Note a problem; what is found wrong at the same path later is not news."""
        self.problems.append(Problem(place, path_text(path), message))
        self.refused.add(path)

    def place_of(self, path: Keys, *, is_key: bool) -> Place:
        """The place of the key or value at `path`, or of the nearest setting around it."""
        first, second = (self.keys, self.values) if is_key else (self.values, self.keys)
        while path:
            place = first.get(path) or second.get(path)
            if place is not None:
                return place
            path = path[:-1]
        return self.values.get((), Place(1, 1))


def read_document(text: str) -> Document:
    """Read a YAML text. Raises nothing: what is wrong stands in `Document.problems`."""
    document = Document()
    if found := _LONG_TAG.search(text):  # the parser takes time by the square of its length
        place = _place_at(text, found.start())
        document.problem(place, (), f"tags are not accepted; remove {found[0][:60]!r}")
        return document
    try:
        # pure: the C parser does not decode and its marks count differently.
        _Reader(_bounded(YAML(typ="safe", pure=True).parse(text)), document).run()
    except _Stop as stop:
        document.problem(stop.place, (), stop.message)
        document.root = None
    except ReaderError as error:
        place = _place_at(text, error.position)
        document.problem(place, (), "a control character stands here; remove it")
        document.root = None
    except YAMLError as error:
        document.problem(*_syntax_problem(error))
        document.root = None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # The parser's own failures on hostile text, such as an escape beyond Unicode.
        place = max(document.values.values(), default=Place(1, 1))
        document.problem(place, (), f"is not YAML from here on: {error}")
        document.root = None
    return document


def path_text(path: Keys) -> str:
    """A path as people write it: ``tiers.host.capacity``; odd keys are quoted and shortened."""
    return ".".join(
        str(key) if isinstance(key, int) or re.fullmatch(r"[\w\-]{1,64}", key) else f"{key!r:.40}"
        for key in path
    )


class _Stop(Exception):
    """The text is not read further."""

    def __init__(self, place: Place, message: str) -> None:
        self.place = place
        self.message = message
        super().__init__(message)


class _Reader:
    """A recursive descent over the parser's events; `DEPTH_MAX` bounds the recursion."""

    def __init__(self, events: Iterator[Event], document: Document) -> None:
        self._events = events
        self._document = document

    def run(self) -> None:
        """Read the one document of the stream."""
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                self._document_start(event)
                self._root(next(self._events))
            elif isinstance(event, StreamEndEvent) and () not in self._document.values:
                raise _Stop(Place(1, 1), "holds no settings; start from configs/reference.yaml")

    def _document_start(self, event: DocumentStartEvent) -> None:
        place = _place(event)
        if () in self._document.values:
            raise _Stop(place, "a second document begins; a configuration is one document")
        if event.version is not None or event.tags:
            message = "directives (%YAML, %TAG) are not accepted; remove them"
            self._document.problem(place, (), message)

    def _root(self, event: Event) -> None:
        root = self._node(event, ())
        if root is None:
            raise _Stop(_place(event), "holds no settings; start from configs/reference.yaml")
        if not isinstance(root, dict):
            kind = "a list" if isinstance(root, list) else "a single value"
            raise _Stop(_place(event), f"must be a mapping (key: value), not {kind}")
        self._document.root = root

    def _node(self, event: Event, path: Keys, depth: int = 0) -> Plain:
        """The value that starts with `event`."""
        place = _place(event)
        self._document.values.setdefault(path, place)
        if isinstance(event, AliasEvent):
            message = "aliases (*name) are not accepted; write the value out"
            self._document.problem(place, path, message)
            return None
        self._refuse_marks(event, path)
        if isinstance(event, ScalarEvent):
            self._document.sources.setdefault(path, Source(place.line, event.value))
            return self._scalar(event, path)
        if depth >= DEPTH_MAX:
            raise _Stop(place, f"is nested deeper than {DEPTH_MAX} levels")
        if isinstance(event, SequenceStartEvent):
            items: list[Plain] = []
            while not isinstance(event := next(self._events), SequenceEndEvent):
                items.append(self._node(event, (*path, len(items)), depth + 1))
            return items
        assert isinstance(event, MappingStartEvent), event
        return self._mapping(path, depth)

    def _mapping(self, path: Keys, depth: int) -> dict[str, Plain]:
        mapping: dict[str, Plain] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                self._document.problem(_place(event), path, "a key must be plain text")
                self._node(event, (*path, "?"), depth + 1)
                self._node(next(self._events), (*path, "?"), depth + 1)
                continue
            key = str(event.value)
            is_accepted = self._key(event, path, is_new=key not in mapping)
            following = next(self._events)
            if _is_left_out(following):
                # Its mark is where the next token stands; the key is the better place.
                self._document.values.setdefault((*path, key), _place(event))
            value = self._node(following, (*path, key), depth + 1)
            if is_accepted:
                mapping[key] = value
        return mapping

    def _key(self, event: ScalarEvent, parent: Keys, *, is_new: bool) -> bool:
        """Note a key and its place; False if it is refused."""
        key, place, path = event.value, _place(event), (*parent, event.value)
        known = len(self._document.problems)
        self._refuse_marks(event, path)
        if not is_new:
            first = self._document.keys[path].line
            message = f"is set twice; the first time in line {first}"
            self._document.problem(place, path, message)
        elif event.style is None and key == "<<":
            message = "merge keys (<<) are not accepted; write the settings out"
            self._document.problem(place, path, message)
        elif event.style is None and not isinstance(_resolve(key), str):
            self._document.problem(place, path, "a key must be text; put it in quotes")
        self._document.keys.setdefault(path, place)
        return len(self._document.problems) == known

    def _refuse_marks(self, event: Event, path: Keys) -> None:
        if isinstance(event, NodeEvent) and event.anchor is not None:
            message = "anchors (&name) are not accepted; write the value where it is used"
            self._document.problem(_place(event), path, message)
        tag = getattr(event, "tag", None)
        if tag is not None:
            message = f"tags are not accepted; remove {str(tag)[:60]!r}"
            self._document.problem(_place(event), path, message)
        if isinstance(event, ScalarEvent) and _SURROGATE.search(event.value):
            message = "an escape stands for half a character (a surrogate); write the character"
            self._document.problem(_place(event), path, message)

    def _scalar(self, event: ScalarEvent, path: Keys) -> Plain:
        value = event.value if event.style is not None else _resolve(event.value)
        if isinstance(value, _Ambiguous):
            shown = f"{event.value[:40]!r}"
            self._document.problem(_place(event), path, f"{shown}: {value.message}")
            return None
        return value


class _Ambiguous(NamedTuple):
    """A plain scalar that is refused."""

    message: str


_NULL: Final = re.compile(r"~|null|Null|NULL|")
_TRUE: Final = re.compile(r"true|True|TRUE")
_FALSE: Final = re.compile(r"false|False|FALSE")
_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_SPECIAL: Final = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_ODD: Final = re.compile(
    r"[-+]?(0[0-9_]+|0[oO][0-7_]+|0[xX][0-9a-fA-F_]+|0[bB][01_]+|[0-9]+(_[0-9]+)+|[0-9]+(:[0-9]+)+)"
)
_LONG_TAG: Final = re.compile(r"![\w!%#&'()*+./:;=?@$~-]{4096}")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_DIGITS_MAX: Final = 40


def _resolve(text: str) -> Plain | _Ambiguous:
    """A plain scalar as the core schema of YAML 1.2 (section 10.3) reads it."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return _TRUE.fullmatch(text) is not None
    is_number = _INT.fullmatch(text) or _FLOAT.fullmatch(text)
    if is_number and len(text) > _DIGITS_MAX:
        return _Ambiguous("too many digits for a number; quote it if it is text")
    if _INT.fullmatch(text):
        return int(text)
    if is_number:
        return float(text)
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + "inf") if special[2] else float("nan")
    if _ODD.fullmatch(text):
        return _Ambiguous(
            "YAML versions read this number differently; write it plainly in decimal, or quote it"
        )
    return text


def _bounded(events: Iterator[Event]) -> Iterator[Event]:
    """`events`; ends with `_Stop` where there are more than a configuration can need."""
    for number, event in enumerate(events):
        if number == EVENTS_MAX:
            raise _Stop(_place(event), f"holds more than {EVENTS_MAX} keys and values")
        yield event


def _is_left_out(event: Event) -> bool:
    return isinstance(event, ScalarEvent) and event.style is None and not event.value


def _place(event: Event) -> Place:
    return Place(event.start_mark.line + 1, event.start_mark.column + 1)


def _place_at(text: str, position: int) -> Place:
    lines = text[:position].splitlines(keepends=True)
    if not lines or lines[-1].endswith(("\n", "\r")):
        return Place(len(lines) + 1, 1)
    return Place(len(lines), len(lines[-1]) + 1)


def _syntax_problem(error: YAMLError) -> tuple[Place, Keys, str]:
    start = getattr(error, "context_mark", None)
    mark = getattr(error, "problem_mark", None) or start
    place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
    message = str(getattr(error, "problem", None) or error).strip().partition("\n")[0]
    context = str(getattr(error, "context", None) or "").strip().partition("\n")[0]
    if "'\\t'" in message:
        return place, (), "a tab cannot indent or separate; use spaces"
    if context and start is not None and start.line + 1 != place.line:
        message += f" ({context}, begun in line {start.line + 1})"
    return place, (), message or "is not YAML"
