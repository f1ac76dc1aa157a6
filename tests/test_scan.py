"""How headers are read when a tier opens, and how a scrub reads beside somebody else."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tierkv.testing.file_engines import page_bytes
from tierkv.testing.tiers import FINGERPRINT, PLAN, page_label
from tierkv.tiers.files.base import Buffer
from tierkv.tiers.files.portable import PortableFiles
from tierkv.tiers.segment_io import SegmentIO
from tierkv.tiers.segments import SegmentTier
from tierkv.upkeep.looking_files import LookingFiles

PAGES = 2000


class PartlyBroken(PortableFiles):
    """Some reads of headers fail; every thread that reads is noted."""

    broken: frozenset[int] = frozenset()

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.readers: set[str] = set()
        self.reads: list[int] = []

    def read(self, handle: int, offset: int, buffers: Sequence[Buffer]) -> None:
        self.readers.add(threading.current_thread().name)
        self.reads.append(sum(map(len, buffers)))
        if offset in self.broken:
            raise OSError(errno.EIO, "a bad sector")
        super().read(handle, offset, buffers)


def tier_of(files: PartlyBroken) -> SegmentTier:
    return SegmentTier(files, PLAN, FINGERPRINT, pages_max=PAGES, segment_cold_pages=8)


@pytest.fixture
def files(tmp_path: Path) -> PartlyBroken:
    """A tier that was closed: most pages written, some erased, some headers damaged."""
    files = PartlyBroken(tmp_path / "cold")
    tier = tier_of(files)
    tier.open()
    written = list(range(PAGES - 50))
    for first in range(0, len(written), 64):
        batch = written[first : first + 64]
        tier.write_pages(batch, [page_bytes(p) for p in batch], [page_label(p) for p in batch])
    rng = random.Random(0)
    tier.erase(rng.sample(written, 40))
    shape = tier._directory.shape
    for page in rng.sample(written, 40):
        handle = tier._directory.segments[shape.segment_of(page)].handle
        files.write(handle, shape.offset_of(page) + 8, [memoryview(b"damage")])
    files.broken = frozenset(shape.offset_of(page) for page in (3, 11))
    tier.close()
    return files


def test_several_threads_find_what_one_finds(files: PartlyBroken) -> None:
    directory = tier_of(files)._directory
    directory.open()
    io = SegmentIO(files, directory, PLAN)
    alone = io.scan()
    files.readers.clear()
    together = io.scan(threads=4)
    assert together == alone
    assert [h.page for h in together.headers] == sorted(h.page for h in together.headers)
    assert len(together.headers) > PAGES * 0.8
    assert together.rejected
    assert together.unreadable
    assert len(files.readers) > 1
    directory.release()
    assert not [t for t in threading.enumerate() if "scan" in t.name], "they are joined"


def test_a_tier_opens_with_several_threads_and_a_small_one_with_one(files: PartlyBroken) -> None:
    files.readers.clear()
    tier = tier_of(files)
    found = tier.open()
    assert len(found) > PAGES * 0.8
    assert [name for name in files.readers if name.startswith("tierkv-scan")]
    tier.close()
    files.readers.clear()
    small = SegmentTier(files, PLAN, FINGERPRINT, pages_max=500, segment_cold_pages=8)
    assert len(small.open()) > 350
    assert files.readers == {threading.current_thread().name}, "in an order that can be had again"
    small.close()


def test_reads_that_have_their_turn_are_cut_small_and_are_the_same_bytes(tmp_path: Path) -> None:
    inner = PartlyBroken(tmp_path)
    data = random.Random(1).randbytes(700_000)
    (tmp_path / "file").write_bytes(data)
    turns: list[int] = []
    for before_read in (None, turns.append):
        inner.reads.clear()
        files = LookingFiles(inner, before_read)
        handle = files.open("file")
        first, second = bytearray(4096), bytearray(500_000)
        files.read(handle, 1000, [memoryview(first), memoryview(second)])
        assert bytes(first + second) == data[1000 : 1000 + 504_096]
        files.close(handle)
        assert sum(inner.reads) == 504_096
        assert (max(inner.reads) <= 128 << 10) == (before_read is not None)
    assert turns == inner.reads
    inner.shutdown()
