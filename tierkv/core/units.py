"""Sizes as people write them: ``64GiB``, ``1.5 GiB``, ``64GB``, ``80%``.

Binary units (KiB, MiB, GiB, TiB) are powers of 1024, decimal ones (kB, MB, GB, TB) powers of
1000. Everything else (``64G``, ``64gb``, ``64Gb``) is refused with the spelling that was
probably meant, because the two readings of "G" differ by 7 %.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

BINARY_UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DECIMAL_UNITS: Final = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

SIZE_PATTERN: Final = r"^\s*[0-9]{1,15}(\.[0-9]{1,9})?\s*(B|KiB|MiB|GiB|TiB|kB|KB|MB|GB|TB)\s*$"
PERCENT_PATTERN: Final = r"^\s*[0-9]{1,3}(\.[0-9]{1,9})?\s*%\s*$"
SIZE_BYTES_MAX: Final = (1 << 63) - 1

_UNITS: Final = {"B": 1, **BINARY_UNITS, **DECIMAL_UNITS}
_SIZE: Final = re.compile(r"([+-]?)\s*([0-9]+(?:\.[0-9]+)?)\s*([^\W\d_]*)")


def parse_size(value: object) -> int:
    """Bytes of a whole number or of text such as ``1.5GiB``, rounded down to whole bytes.

    Raises ValueError, whose text says what to write instead.
    """
    if isinstance(value, bool) or value is None or not isinstance(value, int | float | str):
        raise ValueError(f"must be a size such as 64GiB, got {_shown(value)}")
    if isinstance(value, float):
        raise ValueError(f"{value} has no unit; write a size such as 1.5GiB")
    if isinstance(value, int):
        size = value
    else:
        size = _parse_text(value)
    if size < 0:
        raise ValueError(f"must not be negative, got {_shown(value)}")
    if size > SIZE_BYTES_MAX:
        raise ValueError(f"{_shown(value)} is more than any device holds")
    return size


def parse_percent(value: object) -> Fraction | None:
    """The share that ``80%`` stands for (4/5); None if `value` is not written as a percentage.

    Raises ValueError for a percentage that is not above 0 and at most 100.
    """
    if not isinstance(value, str) or not value.rstrip().endswith("%"):
        return None
    if not re.match(PERCENT_PATTERN, value, re.ASCII):
        raise ValueError(f"{_shown(value)} is not a percentage such as 80%")
    share = Fraction(value.strip().rstrip("%").strip()) / 100
    if not 0 < share <= 1:
        raise ValueError(f"a percentage must be above 0% and at most 100%, got {_shown(value)}")
    return share


def is_decimal_size(text: str) -> bool:
    """Whether `text` is a size in decimal units (powers of 1000)."""
    match = _SIZE.fullmatch(text.strip())
    return match is not None and match[3] in DECIMAL_UNITS


def format_bytes(size: int) -> str:
    """`size` in the largest binary unit that is not above it: ``1.5 GiB``, ``768 B``."""
    for unit, factor in reversed(BINARY_UNITS.items()):
        if abs(size) >= factor:
            amount = size / factor
            is_exact = size % factor == 0 or abs(amount) >= 1000
            return f"{amount:,.0f} {unit}" if is_exact else f"{amount:.4g} {unit}"
    return f"{size} B"


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > 64:
        raise ValueError(f"{_shown(text)} is not a size; write for example 64GiB")
    sign, number, unit = match.groups()
    if not unit:
        raise ValueError(f"{_shown(text)} has no unit; write for example {number}GiB")
    if unit not in _UNITS:
        raise ValueError(f"{_shown(text)}: unknown unit {unit!r}; {_unit_cure(unit)}")
    exact = Fraction(number) * _UNITS[unit]
    if exact and exact < 1:
        raise ValueError(f"{_shown(text)} is less than one byte")
    return int(-exact if sign == "-" else exact)


def _unit_cure(unit: str) -> str:
    letter = unit[0].upper()
    if letter in "KMGT" and len(unit) <= 3:
        decimal = "kB" if letter == "K" else f"{letter}B"
        power = "KMGT".index(letter) + 1
        return f"did you mean {letter}iB (2^{10 * power}) or {decimal} (10^{3 * power})?"
    return "known: " + ", ".join(name for name in _UNITS if name != "KB")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
