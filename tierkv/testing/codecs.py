"""The contract suite of codecs.

Inherit and give `make`; pytest runs the rest::

    class TestMyCodec(CodecTests):
        def make(self):
            return MyCodec()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.codecs.base import Codec

DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def values_of(seed: int, rows: int, elements: int, dtype: torch.dtype, power: int) -> torch.Tensor:
    """Rows as caches hold them, and worse.

    Normal values around ``2**power``, channels of 30 times that, rows of zeros, and single values
    at the edges of the dtype.
    """
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, elements, generator=draw) * 2.0**power
    values[:, :: max(2, elements // 3)] *= 30
    values[torch.rand(rows, generator=draw) < 0.2] = 0.0
    edges = torch.rand(rows, elements, generator=draw)
    info = torch.finfo(dtype)
    values[edges < 0.01] = info.smallest_normal
    values[edges > 0.998] = info.max * (1 if seed % 2 else -1)
    return values.clamp(info.min, info.max).to(dtype)


class CodecTests(ABC):
    """What `Codec` promises."""

    @abstractmethod
    def make(self) -> Codec:
        """The codec under test."""

    def test_no_value_comes_back_further_than_the_bound(self) -> None:
        codec = self.make()

        @settings(deadline=None, max_examples=60)
        @given(
            seed=st.integers(0, 2**16),
            rows=st.integers(1, 9),
            groups=st.integers(1, 5),
            dtype=st.sampled_from(DTYPES),
            power=st.integers(-20, 12),
        )
        def holds(seed: int, rows: int, groups: int, dtype: torch.dtype, power: int) -> None:
            values = values_of(seed, rows, groups * codec.group, dtype, power)
            codes = codec.encode(values)
            found = codec.decode(codes, values.shape[1], dtype)

            assert codes.dtype == torch.uint8
            assert codes.shape == (rows, codec.encoded_bytes(values.shape[1], dtype))
            assert (found.dtype, found.shape) == (dtype, values.shape)
            error = (found.double() - values.double()).abs()
            assert bool((error <= codec.error_bound(values).double()).all()), error.max()

        holds()

    def test_the_bound_is_no_more_than_the_largest_value(self) -> None:
        codec = self.make()
        values = torch.randn(20, 8 * codec.group, generator=torch.Generator().manual_seed(1))

        assert float(codec.error_bound(values).max()) < float(values.abs().max()) / 8

    def test_a_row_is_encoded_alone_and_always_the_same(self) -> None:
        codec = self.make()
        values = values_of(3, 12, 4 * codec.group, torch.bfloat16, 0)
        together = codec.encode(values)

        assert torch.equal(together, codec.encode(values.clone()))
        for number, row in enumerate(values):
            assert torch.equal(together[number], codec.encode(row[None])[0])

    def test_rows_and_codes_may_be_strided(self) -> None:
        codec = self.make()
        elements = 2 * codec.group
        wide = values_of(4, 8, 2 * elements, torch.float16, 0)
        part = wide.view(8, 2, elements)[::2, 1]
        codes = codec.encode(part)
        held = torch.zeros(4, codes.shape[1] + 5, dtype=torch.uint8)
        held[:, : codes.shape[1]] = codes

        assert torch.equal(codes, codec.encode(part.contiguous()))
        found = codec.decode(held[:, : codes.shape[1]], elements, torch.float16)
        assert torch.equal(found, codec.decode(codes, elements, torch.float16))

    def test_zeros_come_back_as_zeros(self) -> None:
        codec = self.make()
        zeros = torch.zeros(3, codec.group, dtype=torch.bfloat16)

        assert torch.equal(codec.decode(codec.encode(zeros), codec.group, torch.bfloat16), zeros)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_what_is_not_finite_is_kept_or_refused(self, bad: float) -> None:
        codec = self.make()
        values = torch.ones(2, codec.group)
        values[1, -1] = bad
        try:
            codes = codec.encode(values)
        except ValueError:
            return
        found = codec.decode(codes, codec.group, torch.float32)
        assert torch.equal(found.view(torch.int32), values.view(torch.int32))

    def test_a_row_of_another_length_is_refused(self) -> None:
        codec = self.make()
        if codec.group > 1:
            with pytest.raises(ValueError, match=str(codec.group + 1)):
                codec.encode(torch.ones(1, codec.group + 1))
            with pytest.raises(ValueError, match=str(codec.group + 1)):
                codec.encoded_bytes(codec.group + 1, torch.float32)
