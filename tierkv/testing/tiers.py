"""The contract suite of the cold tier, on any file engine.

Inherit, give `make`, and for a simulated disk `restart`; pytest runs the rest::

    class TestSegmentsOnMyFiles(ColdTierTests):
        def make(self, root):
            return MyFiles(root)

Sizes are small: a warm page is 16 KiB, a segment eight of them.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tierkv.core.errors import GeometryMismatch, TierFailed
from tierkv.core.geometry import KVGeometry, PagePlan, PageTargets
from tierkv.core.tier import BlockLabel, PageLabel, RecoveredPage
from tierkv.testing.file_engines import page_bytes
from tierkv.tiers.files import base
from tierkv.tiers.files.base import FileEngine, aligned_array
from tierkv.tiers.seals.base import Seal
from tierkv.tiers.segments import SegmentTier

PLAN: Final = PagePlan.of(
    KVGeometry(layers=4, kv_heads=2, head_dim=16),
    block_tokens=4,
    targets=PageTargets(warm_bytes=16 << 10, cold_bytes=64 << 10),
)
PAGE_BYTES: Final = PLAN.warm_page_bytes
PAGES_PER_SEGMENT: Final = 2 * PLAN.cold_page_warm_pages
FINGERPRINT: Final = bytes(range(32))
#: 4096 bytes of segment header, then slots of 4096 bytes of page header and a page.
SLOT_BYTES: Final = 4096 + PAGE_BYTES


def page_label(seed: int, *, blocks: int = 2, namespace: str = "default") -> PageLabel:
    """A label whose keys only this seed gives."""
    rng = random.Random(seed)
    return PageLabel(
        namespace, tuple(BlockLabel(i, rng.randbytes(32), rng.randbytes(32)) for i in range(blocks))
    )


class ColdTierTests(ABC):
    """What `SegmentTier` promises, on the engine that `make` gives."""

    #: The protection of every tier that is opened.
    seal: Seal | None = None

    @abstractmethod
    def make(self, root: Path) -> FileEngine:
        """The engine to run on; called again with the same root by `restart`."""

    def restart(self, files: FileEngine, root: Path) -> FileEngine:
        """The engine after its process died: handles and locks gone, bytes as they were."""
        files.shutdown()
        return self.make(root)

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> Iterator[None]:
        self.root = tmp_path / "cold"
        self.files = self.make(self.root)
        yield
        self.files.shutdown()

    def open_tier(
        self, *, pages_max: int = 20, fingerprint: bytes = FINGERPRINT, plan: PagePlan = PLAN
    ) -> tuple[SegmentTier, list[RecoveredPage]]:
        tier = SegmentTier(
            self.files,
            plan,
            fingerprint,
            pages_max=pages_max,
            segment_cold_pages=2,
            seal=self.seal,
        )
        return tier, tier.open()

    def fill(self, tier: SegmentTier, pages: Sequence[int]) -> None:
        """Write every page with the bytes and the label that its number seeds."""
        tier.write_pages(pages, [page_bytes(p) for p in pages], [page_label(p) for p in pages])

    def verified(self, tier: SegmentTier, pages: Sequence[int]) -> list[int]:
        """The pages that read as stored; wrong bytes fail the test here."""
        outs = [aligned_array(PAGE_BYTES, 4096) for _ in pages]
        good = tier.read_pages(pages, outs)
        for page, out, is_good in zip(pages, outs, good, strict=True):
            assert not is_good or bytes(out) == bytes(page_bytes(page)), f"wrong bytes: {page}"
        return [page for page, is_good in zip(pages, good, strict=True) if is_good]

    def edit(self, page: int, offset: int, data: bytes | None = None) -> None:
        """Overwrite bytes of a page's slot behind the tier's back; by default flip one bit."""
        handle = self.files.open(f"segment-{page // PAGES_PER_SEGMENT:08d}.tkv")
        at = 4096 + page % PAGES_PER_SEGMENT * SLOT_BYTES + offset
        size = len(data) if data else 1
        start = at // 4096 * 4096
        raw = aligned_array(-(-(at + size - start) // 4096) * 4096, 4096)
        self.files.read(handle, start, [raw.data])
        wanted = data or bytes([int(raw[at - start]) ^ 1])
        raw[at - start : at - start + size] = np.frombuffer(wanted, dtype=np.uint8)
        self.files.write(handle, start, [raw.data])
        self.files.close(handle)

    def slot(self, page: int) -> bytes:
        """A page's slot as it is on disk, header and payload."""
        handle = self.files.open(f"segment-{page // PAGES_PER_SEGMENT:08d}.tkv")
        raw = aligned_array(SLOT_BYTES, 4096)
        self.files.read(handle, 4096 + page % PAGES_PER_SEGMENT * SLOT_BYTES, [raw.data])
        self.files.close(handle)
        return bytes(raw)

    def test_pages_read_back_in_any_order_and_company(self) -> None:
        tier, found = self.open_tier()
        assert found == []
        order = list(range(20))
        random.Random(1).shuffle(order)
        self.fill(tier, order)
        random.Random(2).shuffle(order)
        assert self.verified(tier, order) == order
        assert self.verified(tier, [3]) == [3]
        assert self.verified(tier, [7, 7, 8]) == [7, 7, 8]
        tier.close()

    def test_unaligned_arrays_are_taken_all_the_same(self) -> None:
        tier, _ = self.open_tier()
        shifted = [aligned_array(PAGE_BYTES + 4096, 4096)[1 : PAGE_BYTES + 1] for _ in range(2)]
        for page, array in enumerate(shifted):
            array[:] = page_bytes(page)
        tier.write_pages([0, 1], shifted, [page_label(0), page_label(1)])
        assert self.verified(tier, [0, 1]) == [0, 1]
        for array in shifted:
            array[:] = 0
        assert tier.read_pages([0, 1], shifted) == [True, True]
        assert [bytes(array) for array in shifted] == [bytes(page_bytes(p)) for p in (0, 1)]
        tier.close()

    def test_a_write_that_gives_way_is_small_requests_and_the_same_bytes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "TURN_BYTES", 4096)
        tier, _ = self.open_tier()
        asked: list[int] = []
        real = tier._files.write

        def write(handle: int, offset: int, buffers: Sequence[base.Buffer]) -> None:
            asked.append(sum(map(len, buffers)))
            real(handle, offset, buffers)

        monkeypatch.setattr(tier._files, "write", write)
        pages = [3, 4, 5, 9, 17]
        payloads, labels = [page_bytes(p) for p in pages], [page_label(p) for p in pages]
        tier.write_pages(pages, payloads, labels, gives_way=True)
        assert max(asked) < PAGE_BYTES
        assert sum(asked) >= len(pages) * SLOT_BYTES
        assert self.verified(tier, pages) == pages
        tier.close()
        tier, found = self.open_tier()
        assert sorted(one.page for one in found) == pages
        assert self.verified(tier, pages) == pages
        tier.close()

    def test_a_page_never_written_is_a_miss_and_no_fault(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0])
        assert self.verified(tier, [0, 1, 19]) == [0]
        assert tier.quarantined == frozenset()
        tier.close()

    def test_a_restart_finds_pages_labels_and_generations(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0, 9, 4])
        tier.close()
        tier, found = self.open_tier()
        assert {p.page: p.label for p in found} == {p: page_label(p) for p in (0, 9, 4)}
        assert self.verified(tier, [0, 4, 9]) == [0, 4, 9]
        self.fill(tier, [1])
        tier.close()
        tier, later = self.open_tier()
        generations = {p.page: p.generation for p in later}
        assert generations[1] > max(p.generation for p in found)
        assert tier.check(deep=True) == []
        tier.close()

    def test_an_unclean_stop_keeps_whole_pages_and_drops_torn_ones(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0, 1, 2])
        tier.sync()
        self.edit(1, 4096 + PAGE_BYTES - 100)
        self.files = self.restart(self.files, self.root)
        tier, found = self.open_tier()
        assert sorted(p.page for p in found) == [0, 2]
        assert self.verified(tier, [0, 1, 2]) == [0, 2]
        assert tier.usage().pages_torn == 1
        tier.close()
        tier, found = self.open_tier()
        assert sorted(p.page for p in found) == [0, 2]
        tier.close()

    @pytest.mark.parametrize("seed", range(24))
    def test_a_flipped_bit_anywhere_in_a_slot_is_a_miss(self, seed: int) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0, 1, 2])
        # Half in the header, where every field is, half in the payload.
        in_header = random.Random(seed).randrange(4096)
        in_payload = 4096 + random.Random(seed).randrange(PAGE_BYTES)
        self.edit(1, in_header if seed % 2 else in_payload)
        assert self.verified(tier, [0, 1, 2]) == [0, 2]
        assert tier.quarantined == {1}
        assert tier.usage().pages_corrupt == 1
        tier.close()

    def test_a_quarantined_page_is_good_again_once_rewritten(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [1])
        self.edit(1, 5000)
        assert self.verified(tier, [1]) == []
        self.fill(tier, [1])
        assert self.verified(tier, [1]) == [1]
        assert tier.quarantined == frozenset()
        tier.close()

    @pytest.mark.parametrize("target", [1, 9])
    def test_a_page_in_another_ones_place_is_a_miss(self, target: int) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0, target])
        self.edit(target, 0, self.slot(0))
        assert self.verified(tier, [0, target]) == [0]
        tier.close()

    def test_a_page_in_another_ones_place_is_not_recovered(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0, 1])
        tier.close()
        self.edit(5, 0, self.slot(0))
        tier, found = self.open_tier()
        assert sorted(p.page for p in found) == [0, 1]
        assert any("page 5" in finding for finding in tier.check())
        tier.close()

    def test_an_earlier_write_of_the_same_page_is_a_miss(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [3])
        before = self.slot(3)
        tier.write_pages([3], [page_bytes(77)], [page_label(3)])
        self.edit(3, 0, before)
        assert self.verified(tier, [3]) == []
        tier.close()

    def test_another_layout_is_refused_and_nothing_changes(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0])
        tier.close()
        with pytest.raises(TierFailed, match="another layout"):
            self.open_tier(fingerprint=bytes(32))
        bigger = PagePlan.of(
            KVGeometry(layers=4, kv_heads=2, head_dim=16),
            block_tokens=4,
            targets=PageTargets(warm_bytes=32 << 10),
        )
        with pytest.raises(TierFailed, match="warm_page_blocks"):
            self.open_tier(plan=bigger)
        tier, found = self.open_tier()
        assert [p.page for p in found] == [0]
        tier.close()

    def test_a_lower_capacity_removes_segments_and_ignores_pages_beyond(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, range(20))
        tier.close()
        tier, found = self.open_tier(pages_max=10)
        assert sorted(p.page for p in found) == list(range(10))
        assert "segment-00000002.tkv" not in self.files.names()
        with pytest.raises(ValueError, match=r"outside 0\.\.9"):
            tier.read_pages([10], [aligned_array(PAGE_BYTES, 4096)])
        tier.close()

    def test_a_higher_capacity_grows_the_last_segment(self) -> None:
        tier, _ = self.open_tier(pages_max=3)
        self.fill(tier, [0, 2])
        assert tier.usage().disk_bytes < 5 * SLOT_BYTES
        tier.close()
        tier, found = self.open_tier(pages_max=20)
        assert sorted(p.page for p in found) == [0, 2]
        self.fill(tier, [7, 19])
        assert self.verified(tier, [0, 2, 7, 19]) == [0, 2, 7, 19]
        tier.close()

    def test_an_erased_page_stays_gone_over_a_restart(self) -> None:
        tier, _ = self.open_tier()
        self.fill(tier, [0, 1, 12])
        tier.erase([1, 12, 19])
        assert self.verified(tier, [0, 1, 12]) == [0]
        tier.sync()
        self.files = self.restart(self.files, self.root)
        tier, found = self.open_tier()
        assert [p.page for p in found] == [0]
        tier.close()

    def test_a_directory_has_one_user(self) -> None:
        tier, _ = self.open_tier()
        with pytest.raises(TierFailed, match=r"in use by pid \d+; cure"):
            self.open_tier()
        tier.close()
        tier, _ = self.open_tier()
        tier.close()

    def test_pieces_are_runs_that_cover_the_batch(self) -> None:
        tier, _ = self.open_tier(pages_max=20)
        pages = [19, 3, 4, 2, 9, 8, 7, 15, 0]
        pieces = tier.pieces(pages, 2 * PAGE_BYTES)
        assert sorted(index for piece in pieces for index in piece) == list(range(len(pages)))
        assert all(len(piece) <= 2 for piece in pieces)
        assert tier.pieces([], 1) == []
        assert tier.pieces([5, 6], 1) == [[0], [1]]
        tier.close()

    def test_what_cannot_be_stored_is_refused(self) -> None:
        tier, _ = self.open_tier()
        good = page_bytes(0)
        with pytest.raises(GeometryMismatch):
            tier.write_pages([0], [good[:-1]], [page_label(0)])
        with pytest.raises(ValueError, match="distinct"):
            tier.write_pages([0, 0], [good, good], [page_label(0)] * 2)
        with pytest.raises(ValueError, match="outside"):
            tier.write_pages([-1], [good], [page_label(0)])
        with pytest.raises(ValueError, match="namespace"):
            tier.write_pages([0], [good], [page_label(0, namespace="n" * 64)])
        tier.close()
        with pytest.raises(TierFailed, match="not open"):
            tier.read_pages([0], [good])

    def test_parallel_writers_and_readers_keep_their_pages(self) -> None:
        tier, _ = self.open_tier()
        shares = [list(range(first, 20, 4)) for first in range(4)]

        def work(share: list[int]) -> bool:
            for _ in range(5):
                self.fill(tier, share)
                if self.verified(tier, share) != share:
                    return False
                tier.sync()
            return True

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, shares))
        assert tier.check(deep=True) == []
        tier.close()

    def test_stale_half_made_files_are_removed(self) -> None:
        for name in ("segment-00000001.tmp", "manifest.tmp"):
            self.files.close(self.files.open(name, create=True))
        self.files.close(self.files.open("notes", create=True))
        tier, _ = self.open_tier()
        self.fill(tier, [8])
        assert self.files.names() == ["lock", "manifest", "notes", "segment-00000001.tkv"]
        assert tier.check() == ["unknown file 'notes'"]
        tier.close()
