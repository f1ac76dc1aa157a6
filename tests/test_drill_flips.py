"""Damage at rest never gives wrong bytes, and costs no more than what it touched."""

from __future__ import annotations

import pytest
import xxhash

from tierkv.core.errors import CorruptData
from tierkv.core.tier import RecoveredPage
from tierkv.testing.drills import flips, flips_site
from tierkv.testing.drills.base import LOST, WRONG_BYTES, Wrong
from tierkv.tiers import segment_io
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.segment_format import SegmentShape
from tierkv.tiers.segment_io import Scan, SegmentIO

CASES = 20_000

pytestmark = pytest.mark.usefixtures("quiet")


def test_damage_costs_what_it_touches_and_never_gives_wrong_bytes() -> None:
    tally = flips.run(CASES, seed=1)

    assert tally.holds, tally.wrong


def test_the_flips_go_through_every_byte_of_the_manifest_and_of_every_header() -> None:
    flipped = {(id(site), place) for site, place in flips.systematic()}

    for site in flips_site.images():
        headers = {
            (name, at + offset)
            for name, at in map(flips_site.slot_of, site.stored)
            for offset in range(4096)
        }
        headers |= {(name, offset) for name in site.segments for offset in range(4096)}
        headers |= {("manifest", offset) for offset in range(len(site.files["manifest"]))}
        assert len(site.segments) > 1
        assert {(id(site), place) for place in headers} <= flipped


def test_the_images_hold_pages_that_were_written_again_since() -> None:
    for site in flips_site.images():
        names = [name for name in site.segments if name in site.earlier]
        assert any(site.files[name] != site.earlier[name] for name in names)


def test_the_drill_finds_a_reader_that_skips_the_payloads_checksum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trusting(
        _data: Buffer, _payload: Buffer, _shape: SegmentShape, *, page: int, generation: int
    ) -> None:
        del page, generation

    monkeypatch.setattr(segment_io, "verify_page", trusting)

    _expect_found(WRONG_BYTES)


def test_the_drill_finds_a_reader_that_takes_a_page_from_another_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = segment_io.verify_page

    def placeless(
        data: Buffer, payload: Buffer, shape: SegmentShape, *, page: int, generation: int
    ) -> None:
        del page, generation
        found = int.from_bytes(data[16:24], "little"), int.from_bytes(data[24:32], "little")
        real(data, payload, shape, page=found[0], generation=found[1])

    real_parse = segment_io.parse_page_header

    def half_blind(data: Buffer, shape: SegmentShape, page: int) -> object:
        # It looks at its slot once, and is told the label of whoever was there before.
        try:
            return real_parse(data, shape, page)
        except CorruptData:
            return labels[page]

    labels: dict[int, object] = {}
    for site in flips_site.images():
        tier = flips_site.tier_on(flips_site.disk_of(site.files))
        labels |= {one.page: _header(one) for one in tier.open()}
    monkeypatch.setattr(segment_io, "verify_page", placeless)
    monkeypatch.setattr(segment_io, "parse_page_header", half_blind)

    _expect_found(WRONG_BYTES)


def test_the_drill_finds_a_start_that_drops_a_whole_segment_for_one_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = SegmentIO.scan

    def hasty(self: SegmentIO, *, threads: int = 1) -> Scan:
        scan = real(self, threads=threads)
        if scan.rejected:
            scan.headers.clear()
        return scan

    monkeypatch.setattr(SegmentIO, "scan", hasty)

    _expect_found(LOST)


def test_a_manifest_nested_too_deep_to_parse_is_made_again() -> None:
    line = b'{"format":1,"x":' + b"[" * 200_000
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"
    site = flips_site.images()[0]
    manifest = text.ljust(-(-len(text) // 4096) * 4096)

    tier = flips_site.tier_on(flips_site.disk_of({**site.files, "manifest": manifest}))

    assert {one.page for one in tier.open()} == set(site.stored)
    assert any("manifest was made again" in finding for finding in tier.check())


def _header(one: RecoveredPage) -> object:
    return segment_io.PageHeader(one.page, one.generation, one.label)


def _expect_found(kind: str) -> None:
    """The drill tells the kind, and the case that it names goes wrong again."""
    tally = flips.run(600, seed=5)

    assert kind in tally.wrong
    words = tally.wrong[kind][0]
    assert words.startswith("seed 5, case ")
    with pytest.raises(Wrong, match=kind):
        flips.replay(5, int(words.split()[3].rstrip(":")))
