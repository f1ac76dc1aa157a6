from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.core.units import (
    BINARY_UNITS,
    DECIMAL_UNITS,
    PERCENT_PATTERN,
    SIZE_BYTES_MAX,
    SIZE_PATTERN,
    format_bytes,
    is_decimal_size,
    parse_percent,
    parse_size,
)

UNITS = {"B": 1, **BINARY_UNITS, **DECIMAL_UNITS}


@given(st.integers(0, 999), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_a_whole_number_with_a_unit_is_exact(number: int, unit: str, gap: str) -> None:
    text = f"{number}{gap}{unit}"
    assert parse_size(text) == number * UNITS[unit]
    assert re.match(SIZE_PATTERN, text)
    assert is_decimal_size(text) == (unit in DECIMAL_UNITS)


@given(st.integers(0, SIZE_BYTES_MAX))
def test_a_whole_number_is_bytes(size: int) -> None:
    assert parse_size(size) == size


@given(st.integers(0, SIZE_BYTES_MAX // 2))
def test_what_is_shown_is_within_a_thousandth_and_can_be_read_back(size: int) -> None:
    shown = format_bytes(size).replace(",", "")
    assert abs(parse_size(shown) - size) <= size / 1000


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("64G", "GiB (2^30) or GB (10^9)"),
        ("64gb", "GiB (2^30) or GB (10^9)"),
        ("64Mi", "MiB (2^20) or MB (10^6)"),
        ("64k", "KiB (2^10) or kB (10^3)"),
        ("64", "has no unit; write for example 64GiB"),
        ("64 bytes", "known: B, KiB"),
        ("-3GiB", "must not be negative"),
        ("lots", "is not a size"),
        ("0.1B", "less than one byte"),
        ("9000000000TiB", "more than any device holds"),
    ],
)
def test_an_unclear_size_is_refused_with_the_cure(text: str, cure: str) -> None:
    with pytest.raises(ValueError, match=re.escape(cure)):
        parse_size(text)


@given(st.one_of(st.text(max_size=30), st.floats(), st.booleans(), st.none(), st.binary()))
def test_anything_else_raises_valueerror_and_nothing_else(value: object) -> None:
    try:
        assert isinstance(value, str)
        assert parse_size(value) >= 0
    except (AssertionError, ValueError):
        pass
    if not isinstance(value, str):
        with pytest.raises(ValueError):
            parse_size(value)


@given(st.integers(1, 10_000))
def test_percentages_are_exact_shares(hundredths: int) -> None:
    text = f"{hundredths / 100:.2f} %"
    assert parse_percent(text) == Fraction(hundredths, 10_000)
    assert re.match(PERCENT_PATTERN, text)


@pytest.mark.parametrize("value", [7, 0.5, None, "5", "5GiB", ""])
def test_what_is_no_percentage_is_none(value: object) -> None:
    assert parse_percent(value) is None


@pytest.mark.parametrize("value", ["0%", "100.1%", "-1%", "%", "٣%", "1e1%"])
def test_a_wrong_percentage_raises(value: str) -> None:
    with pytest.raises(ValueError):
        parse_percent(value)
