"""Every codec keeps its contract; the grouped ones give the bytes that their page describes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tierkv.codecs import CODECS  # noqa: E402
from tierkv.codecs.base import Codec  # noqa: E402
from tierkv.codecs.grouped import GROUP, Int4, Int8  # noqa: E402
from tierkv.codecs.raw import Raw  # noqa: E402
from tierkv.testing.codecs import CodecTests  # noqa: E402


class TestRaw(CodecTests):
    def make(self) -> Codec:
        return Raw()


class TestInt8(CodecTests):
    def make(self) -> Codec:
        return Int8()


class TestInt4(CodecTests):
    def make(self) -> Codec:
        return Int4()


def test_every_registered_codec_has_its_suite_here() -> None:
    tested = {type(case().make()) for case in (TestRaw, TestInt8, TestInt4)}

    assert {CODECS.load(name) for name in CODECS} == tested
    assert [CODECS.load(name)().name for name in CODECS] == list(CODECS)


def test_int8_gives_the_bytes_of_its_description() -> None:
    row = torch.zeros(1, GROUP)
    row[0, :3] = torch.tensor([254.0, -254.0, 3.0])  # scale 2: codes 127, -127, 1.5 to even 2
    expected = [127, 129, 2] + [0] * (GROUP - 3) + [0, 0, 0, 64]

    assert Int8().encode(row)[0].tolist() == expected


def test_int4_puts_the_first_code_into_the_low_half() -> None:
    row = torch.zeros(1, GROUP)
    row[0, :3] = torch.tensor([7.0, -7.0, 2.0])  # scale 1: halves 15, 1, 10, then 8 for zero
    expected = [0x1F, 0x8A] + [0x88] * (GROUP // 2 - 2) + [0, 0, 128, 63]

    assert Int4().encode(row)[0].tolist() == expected


def test_the_small_forms_are_as_small_as_they_say() -> None:
    bf16 = torch.bfloat16

    assert [codec.encoded_bytes(128, bf16) for codec in (Raw(), Int8(), Int4())] == [256, 136, 72]
