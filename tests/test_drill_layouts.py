"""Layouts and tenants do not see each other's bytes, and the drill finds it where they would."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest

from tierkv.core.geometry import KVGeometry, Layout
from tierkv.core.keys import BlockKey, KeyChain
from tierkv.testing.drills import layouts
from tierkv.testing.drills.base import Wrong, case_random
from tierkv.testing.drills.layouts import FIELDS, User, difference, draw, systematic
from tierkv.tiers.segment_directory import SegmentDirectory

SEED = 1
CASES = 140

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("part", range(2))
def test_what_one_layout_or_tenant_put_another_never_gets(part: int) -> None:
    tally = layouts.run(CASES, SEED + part)

    assert tally.cases == CASES
    assert tally.holds, "\n".join(line for lines in tally.wrong.values() for line in lines[:20])


def test_the_first_cases_differ_in_each_field_and_each_pair_of_fields() -> None:
    drawn = [
        difference(*draw(case_random(layouts.NAME, SEED, number), number))
        for number in range(len(systematic()))
    ]

    assert drawn == systematic()
    assert len(drawn) < CASES
    assert drawn[0] == frozenset()
    assert {frozenset([name]) for name in FIELDS} <= set(drawn)
    assert {frozenset(pair) for pair in combinations(FIELDS, 2)} <= set(drawn)


def test_the_drill_varies_every_field_that_identifies_a_layout() -> None:
    named = {field.name for kind in (KVGeometry, Layout) for field in fields(kind)}

    assert named - {"geometry", "targets"} <= set(FIELDS)
    assert {field.name for field in fields(User)} == set(FIELDS)


def test_random_cases_are_often_equal_and_often_joined_alike() -> None:
    drawn = [draw(case_random(layouts.NAME, SEED, number), number) for number in range(200, 400)]
    equal = [a for a, b in drawn if a == b]
    joined = [
        (a, b) for a, b in drawn if a != b and a.model + a.revision == b.model + b.revision != ""
    ]

    assert len(equal) > 15
    assert len(joined) > 5
    assert max(len(difference(a, b)) for a, b in drawn) > 10


def test_a_fingerprint_without_a_field_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(layout: Layout) -> bytes:
        said = (layout.geometry, layout.block_tokens, layout.model, layout.codec)
        return hashlib.sha256(repr((*said, layout.engine_layout)).encode()).digest()

    monkeypatch.setattr(Layout, "fingerprint", property(careless))
    tally = layouts.run(20, SEED)

    assert tally.wrong.keys() == {"wrong bytes"}
    assert any("revision='" in line for line in tally.wrong["wrong bytes"])


def test_a_fingerprint_of_joined_names_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(layout: Layout) -> bytes:
        names = layout.model + layout.revision + layout.codec + layout.engine_layout
        text = f"{layout.geometry}/{layout.block_tokens}/{names}"
        return hashlib.sha256(text.encode()).digest()

    monkeypatch.setattr(Layout, "fingerprint", property(careless))
    tally = layouts.run(3, SEED)

    assert len(tally.wrong["wrong bytes"]) == 3


def test_keys_without_the_salt_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = KeyChain.__init__

    def careless(
        chain: KeyChain, fingerprint: bytes, *, block_tokens: int = 16, **_: object
    ) -> None:
        made(chain, fingerprint, block_tokens=block_tokens)

    monkeypatch.setattr(KeyChain, "__init__", careless)
    number = systematic().index(frozenset({"namespace", "salt"}))
    with pytest.raises(Wrong, match="have one key"):
        layouts.replay(SEED, number)


def test_keys_without_the_layout_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = KeyChain.__init__

    def careless(
        chain: KeyChain, _fingerprint: bytes, *, block_tokens: int = 16, **_: object
    ) -> None:
        made(chain, bytes(32), block_tokens=block_tokens)
        chain.root = BlockKey(bytes(32))

    monkeypatch.setattr(KeyChain, "__init__", careless)
    assert layouts.run(3, SEED).wrong.keys() == {"wrong bytes"}


def test_a_directory_that_refuses_no_other_layout_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SegmentDirectory, "_expect_ours", lambda _self, _manifest: None)
    number = systematic().index(frozenset({"model"}))
    with pytest.raises(Wrong, match="opened the files of"):
        layouts.replay(SEED, number)


def test_a_second_tenant_without_a_salt_costs_the_first_nothing_over_a_restart() -> None:
    tokens = list(range(64))
    a, b = User(namespace="a"), User(namespace="b")
    data = a.bytes_of(tokens, SEED)
    disk = layouts._Disk(Path("disk"), is_real=False)
    with layouts._open(disk, b, a) as store:
        layouts._put(store, a, tokens, data)
    with layouts._open(disk, b, a) as store:
        layouts._expect_whole(store, a, tokens, data)
