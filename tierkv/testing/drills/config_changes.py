"""Changes of a configuration's text, as a slip of the hand or of a disk makes them.

One to four changes: of bytes (flipped, lost, inserted, repeated), of words (another value, another
key, a mark of YAML where none was) or of lines (lost, twice, swapped, shifted, nested).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Final, TypeAlias

Change: TypeAlias = Callable[[bytes, random.Random], bytes]

_WORD: Final = re.compile(rb"[^\s:{},\[\]#]+")
_NUMBER: Final = re.compile(rb"\d+")

#: What stands where a word stood.
_VALUES: Final = (
    b"0 1 -1 2 16 64 4096 4095 1e5 1e999 .inf -.inf .nan 017 0x1F 1_000 1:30 true no on off null ~ "
    b"auto cpu cuda cuda:999 lru none hmac direct portable gds advise flush always 5% 100% 0% 101% "
    b"4KiB 8KiB 64KiB 1MiB 64GiB 9000TiB 64G 64gb 1B 0.5KiB .. . / ~ ~nobody/x ../.. file a/../b "
    b"default tenant [] {} [1] {a: b} '' \"\" 'x !!int !x &x *x | > |- >+ @ ` % - ? : , # << = !"
).split(b" ")
#: What is put between two bytes.
_MARKS: Final = (
    *(b" ", b"  ", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\x07", b"\x1b[31m", b"\x7f", b"\x85"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\xe2\x80\xa8", b"\xe2\x80\xae", b"\xed\xa0\x80"),
    *(bytes([mark]) for mark in b"{}[]'\":,#!|>%@`\\"),
    *(b": ", b"- ", b"? ", b"&a ", b"*a", b"---\n", b"...\n", b"<<: *a\n", b"%YAML 1.1\n---\n"),
    *(b"!!python/object/apply:os.system ['touch executed']", b"!!binary ", b"\\x00", b"\\ud800"),
)


def changed(text: str, rng: random.Random) -> tuple[bytes, str]:
    """The text with one to four changes, and what they were."""
    data = text.encode()
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        change = rng.choice(_CHANGES)
        data = change(data, rng)
        names.append(change.__name__.strip("_"))
    return data, " and ".join(names)


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _lose(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 1, 2, 8, 64, 4096)) :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_MARKS) * rng.choice((1, 1, 1, 2, 40, 5000)) + data[at:]


def _noise(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 64))) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.choice((1, 2, 4, 16, 200))]
    return data[:at] + piece * rng.choice((2, 3, 50, 500)) + data[at:]


def _word(data: bytes, rng: random.Random) -> bytes:
    """Another value or key."""
    found = list(_WORD.finditer(data))
    if not found:
        return rng.choice(_VALUES)
    match = rng.choice(found)
    other = rng.choice(found)[0] if rng.random() < 0.3 else rng.choice(_VALUES)
    return data[: match.start()] + other + data[match.end() :]


def _spell(data: bytes, rng: random.Random) -> bytes:
    """A word with a letter lost, twice, in the other case, or two swapped."""
    found = list(_WORD.finditer(data))
    if not found:
        return data
    match = rng.choice(found)
    word, at = match[0], rng.randrange(len(match[0]))
    made = rng.choice((
        word[:at] + word[at + 1 :],
        word[: at + 1] + word[at:],
        word[:at] + word[at : at + 1].swapcase() + word[at + 1 :],
        word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
        word.replace(b"_", b"-"),
    ))  # fmt: skip
    return data[: match.start()] + made + data[match.end() :]


def _number(data: bytes, rng: random.Random) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    match = rng.choice(found)
    size = rng.choice((1, 3, 10, 19, 30, 60))
    made = rng.choice((b"-" + match[0], match[0] + b".5", b"%d" % rng.randrange(10**size), b""))
    return data[: match.start()] + made + data[match.end() :]


def _line(data: bytes, rng: random.Random) -> bytes:
    """A line lost, twice, moved, shifted, or with another's indent."""
    lines = data.split(b"\n")
    one, two = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[one]
    elif kind == 1:
        lines.insert(two, lines[one])
    elif kind == 2:
        lines[one], lines[two] = lines[two], lines[one]
    elif kind == 3:
        lines[one] = b" " * rng.randrange(1, 5) + lines[one]
    elif kind == 4:
        lines[one] = lines[one][rng.randrange(1, 5) :]
    else:
        lines[one] = b"# " + lines[one]
    return b"\n".join(lines)


def _nest(data: bytes, rng: random.Random) -> bytes:
    """A part of the file within itself."""
    lines = data.split(b"\n")
    first = rng.randrange(len(lines))
    part = lines[first : first + rng.choice((1, 3, 10, 100))]
    at = rng.randrange(len(lines) + 1)
    return b"\n".join(lines[:at] + [b"  " + line for line in part] + lines[at:])


def _encode(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))


_CHANGES: Final[list[Change]] = [
    *[_flip, _flip, _lose, _cut, _insert, _insert, _insert, _noise, _repeat],
    *[_word] * 6,
    *[_spell] * 2,
    *[_number] * 3,
    *[_line] * 4,
    _nest,
    _encode,
]
