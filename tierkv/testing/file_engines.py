"""The contract suite of file engines.

Inherit and give `make`; pytest runs the rest::

    class TestMyFiles(FileEngineTests):
        def make(self, root):
            return MyFiles(root)
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from tierkv.tiers.files.base import FileEngine, aligned_array

PAGE_BYTES: Final = 16 << 10


def page_bytes(seed: int, *, size: int = PAGE_BYTES) -> npt.NDArray[np.uint8]:
    """An aligned array of bytes that only this seed gives."""
    array = aligned_array(size, 4096)
    array[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return array


class FileEngineTests(ABC):
    """What `FileEngine` promises."""

    @abstractmethod
    def make(self, root: Path) -> FileEngine:
        """The engine under test on an empty directory, which it may have to create."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> Iterator[FileEngine]:
        engine = self.make(tmp_path / "root")
        yield engine
        engine.shutdown()

    def test_bytes_written_are_read_back_across_other_cuts(self, files: FileEngine) -> None:
        handle = files.open("a", create=True)
        data = page_bytes(1, size=8 * 4096)
        files.write(handle, 4096, [data[:4096].data, data[4096 : 5 * 4096].data])
        files.write(handle, 6 * 4096, [data[5 * 4096 :].data])
        found = aligned_array(8 * 4096, 4096)
        files.read(handle, 4096, [found[: 7 * 4096].data, found[7 * 4096 :].data])
        assert bytes(found) == bytes(data)
        assert files.size(handle) == 9 * 4096

    def test_more_buffers_than_one_system_call_takes_are_moved(self, files: FileEngine) -> None:
        handle = files.open("a", create=True)
        data = page_bytes(2, size=1100 * 4096)
        files.write(handle, 0, [row.data for row in data.reshape(1100, 4096)])
        found = aligned_array(len(data), 4096)
        files.read(handle, 0, [row.data for row in found.reshape(1100, 4096)])
        assert bytes(found) == bytes(data)

    def test_parallel_transfers_of_one_file_do_not_mix(self, files: FileEngine) -> None:
        handle = files.open("a", create=True)

        def write_and_read(index: int) -> bool:
            data = page_bytes(index)
            found = aligned_array(PAGE_BYTES, 4096)
            files.write(handle, index * PAGE_BYTES, [data.data])
            files.read(handle, index * PAGE_BYTES, [found.data])
            return bytes(found) == bytes(data)

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(write_and_read, range(48)))

    @pytest.mark.parametrize("size", [0, 4096, 5 * 4096])
    def test_reading_past_the_end_is_an_error(self, files: FileEngine, size: int) -> None:
        handle = files.open("a", create=True)
        files.write(handle, 0, [page_bytes(3, size=size).data])
        with pytest.raises(OSError, match=r".") as caught:
            files.read(handle, 0, [aligned_array(6 * 4096, 4096).data])
        assert caught.value.errno == errno.EIO

    def test_preallocated_bytes_are_zero_and_length_never_shrinks(self, files: FileEngine) -> None:
        handle = files.open("a", create=True)
        files.preallocate(handle, 4 * 4096)
        files.preallocate(handle, 4096)
        found = page_bytes(4, size=4 * 4096)
        files.read(handle, 0, [found.data])
        assert not found.any()
        assert files.size(handle) == 4 * 4096
        assert files.allocated(handle) >= 4 * 4096
        assert files.allocated(handle) % 512 == 0

    def test_preallocating_keeps_what_was_written(self, files: FileEngine) -> None:
        handle = files.open("a", create=True)
        data = page_bytes(5)
        files.write(handle, 0, [data.data])
        files.preallocate(handle, 4 * PAGE_BYTES)
        found = aligned_array(PAGE_BYTES, 4096)
        files.read(handle, 0, [found.data])
        assert bytes(found) == bytes(data)

    def test_names_are_listed_renamed_and_removed(self, files: FileEngine) -> None:
        for name in ("b", "a", "c"):
            files.close(files.open(name, create=True))
        files.rename("a", "c")
        files.sync_root()
        assert files.names() == ["b", "c"]
        files.unlink("b")
        assert files.names() == ["c"]

    def test_an_absent_file_is_made_only_if_asked(self, files: FileEngine) -> None:
        with pytest.raises(FileNotFoundError):
            files.open("a")
        with pytest.raises(FileNotFoundError):
            files.unlink("a")
        files.close(files.open("a", create=True))
        files.close(files.open("a"))

    def test_a_handle_follows_its_file_through_a_rename(self, files: FileEngine) -> None:
        handle = files.open("a.tmp", create=True)
        data = page_bytes(6)
        files.write(handle, 0, [data.data])
        files.rename("a.tmp", "a")
        files.close(files.open("a.tmp", create=True))
        files.write(handle, PAGE_BYTES, [data.data])
        files.sync(handle)
        with ThreadPoolExecutor(4) as threads:
            founds = [aligned_array(2 * PAGE_BYTES, 4096) for _ in range(8)]
            list(threads.map(lambda found: files.read(handle, 0, [found.data]), founds))
        assert all(bytes(found) == 2 * bytes(data) for found in founds)

    def test_a_closed_handle_is_refused(self, files: FileEngine) -> None:
        handle = files.open("a", create=True)
        files.close(handle)
        files.open("b", create=True)
        for use in (files.size, files.sync, files.close):
            with pytest.raises(OSError, match=r".") as caught:
                use(handle)
            assert caught.value.errno == errno.EBADF
        with pytest.raises(OSError, match="not open"):
            files.write(handle, 0, [page_bytes(7).data])

    def test_a_lock_is_held_by_one_until_closed(self, files: FileEngine) -> None:
        handle = files.lock("lock")
        with pytest.raises(BlockingIOError):
            files.lock("lock")
        files.close(handle)
        files.close(files.lock("lock"))

    @pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/b", "a\0b"])
    def test_a_name_that_is_a_path_is_refused(self, files: FileEngine, name: str) -> None:
        with pytest.raises(ValueError):
            files.open(name, create=True)
        with pytest.raises(ValueError):
            files.unlink(name)
