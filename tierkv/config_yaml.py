"""YAML files into pydantic models, with ``file:line:col: path: message`` for all that is wrong.

`config_text` reads the text and says what is wrong with its form; pydantic says what is wrong
with its values; here both become one `ConfigFileError`, sorted by place.
"""

from __future__ import annotations

import difflib
import stat
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tierkv.config_text import Document, Keys, Place, Problem, Source, path_text, read_document
from tierkv.core.errors import ConfigError

FILE_BYTES_MAX: Final = 1 << 20
PROBLEMS_MAX: Final = 100
START: Final = Place(1, 1)

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[M]):
    """A checked file: the model, and the source of every scalar that the file sets."""

    value: M
    file: Path
    sources: Mapping[Keys, Source]


class ConfigFileError(ConfigError):
    """A file that cannot be used, with every problem found in it.

    `str()` is one line a problem; `report()` adds each source line with a caret. At most
    `PROBLEMS_MAX` are written out; the rest are counted.
    """

    def __init__(self, file: str, problems: list[Problem], lines: list[str]) -> None:
        self.file = file
        self.problems = sorted(problems, key=lambda problem: problem.place)
        self._lines = lines
        shown = self.problems[:PROBLEMS_MAX]
        self._heads = [
            f"{file}:{p.place.line}:{p.place.column}: {p.path + ': ' if p.path else ''}{p.message}"
            for p in shown
        ]
        if more := len(self.problems) - len(shown):
            place = self.problems[len(shown)].place
            self._heads.append(f"{file}:{place.line}:{place.column}: and {more} more problems")
        super().__init__("\n".join(self._heads))

    def report(self) -> str:
        """Each problem with its source line and a caret."""
        parts = []
        for head, problem in zip(self._heads, self.problems, strict=False):
            parts.append(head)
            if problem.place.line <= len(self._lines):
                parts.append(_excerpt(self._lines[problem.place.line - 1], problem.place))
        return "\n".join(parts)


def load_yaml(path: Path, model: type[M], *, context: dict[str, Any] | None = None) -> Loaded[M]:
    """Read `path` into `model`. Raises ConfigFileError with all problems, and nothing else."""
    text = _read_text(path)
    document = read_document(text)
    problems = list(document.problems)
    value: M | None = None
    if document.root is not None:
        try:
            value = model.model_validate(document.root, context=context)
        except ValidationError as error:
            problems += _value_problems(error, model, document)
    if problems or value is None:
        raise ConfigFileError(str(path), problems, text.splitlines())
    return Loaded(value, path, document.sources)


def _read_text(path: Path) -> str:
    try:
        # A pipe or a device would block or never end: look before opening.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _refusal(path, "is a directory; name the YAML file itself")
        if not stat.S_ISREG(mode):
            raise _refusal(path, "is not a regular file")
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise _refusal(path, "no such file; start from configs/reference.yaml") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _refusal(path, f"cannot be read: {reason}") from None
    if len(data) > FILE_BYTES_MAX:
        raise _refusal(path, f"is larger than {FILE_BYTES_MAX >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        start = data.rfind(b"\n", 0, error.start) + 1
        column = len(data[start : error.start].decode("utf-8", "replace")) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _refusal(path, message, Place(line, column)) from None


def _refusal(path: Path, message: str, place: Place = START) -> ConfigFileError:
    return ConfigFileError(str(path), [Problem(place, "", message)], [])


def _value_problems(
    error: ValidationError, model: type[BaseModel], document: Document
) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        path = detail["loc"]
        is_key = detail["type"] == "extra_forbidden"
        if path and path[-1] == "[key]":
            path, is_key = path[:-1], True
        if any(path[:end] in document.refused for end in range(1, len(path) + 1)):
            continue
        yield Problem(
            document.place_of(path, is_key=is_key), path_text(path), _message(detail, model)
        )


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """What pydantic found, in our words."""
    kind, value, limits = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(detail["loc"][-1]), _keys_at(model, detail["loc"][:-1]))
    if kind == "value_error":
        return str(limits["error"])
    if kind == "literal_error":
        return _not_among(value, str(limits["expected"]))
    got = _shown(value)
    wanted = {
        "bool_type": "true or false",
        "dict_type": "a mapping (key: value)",
        "float_type": "a number",
        "int_type": "a whole number without unit",
        "model_type": "a mapping (key: value)",
        "string_type": "text (put it in quotes)",
        "finite_number": "a finite number",
        "greater_than": f"more than {limits.get('gt')}",
        "greater_than_equal": f"at least {limits.get('ge')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "too_long": f"at most {limits.get('max_length')} items",
    }.get(kind)
    return f"must be {wanted}, got {got}" if wanted else f"{detail['msg']}, got {got}"


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key[:64], known, n=1)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    return f"unknown key; known here: {', '.join(known)}"


def _not_among(value: object, expected: str) -> str:
    names = expected.replace("' or '", "', '").strip("'").split("', '")
    cure = ""
    if isinstance(value, str):
        close = difflib.get_close_matches(value[:64].lower(), names, n=1)
        cure = f"; did you mean {close[0]!r}?" if close else ""
    if (value is False or str(value).lower() == "no") and "off" in names:
        cure = "; did you mean 'off'?"
    return f"must be {' or '.join(names)}, got {_shown(value)}{cure}"


def _keys_at(model: type[BaseModel], path: Keys) -> list[str]:
    """The keys that a mapping at `path` may have."""
    current: object = model
    for key in path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[str(key)].annotation
        else:
            current = typing.get_args(current)[-1]
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _excerpt(line: str, place: Place) -> str:
    """The source line and a caret; control characters cannot reach the terminal."""
    first = max(0, place.column - 60)
    visible = "".join(c if c.isprintable() else " " for c in line[first : first + 80])
    number = f"{place.line:>5} | "
    caret = " " * (place.column - 1 - first) + "^"
    return f"{number}{visible}\n{'':>5} | {caret}"
