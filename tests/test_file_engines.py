"""The file engines keep the contract, and the real ones trust nothing in their directory."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tierkv.core.errors import ConfigError, TierFailed
from tierkv.testing.file_engines import FileEngineTests, page_bytes
from tierkv.testing.files import Fault, FaultyFiles, MemoryFiles, at_rates, from_then_on, once
from tierkv.tiers.files import beneath, choose_engine, probe_engines
from tierkv.tiers.files.base import aligned_array
from tierkv.tiers.files.direct import DirectFiles
from tierkv.tiers.files.portable import PortableFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tierkv.tiers.files.base import FileEngine
    from tierkv.tiers.files.root import RootedFiles

    Mover = Callable[[int, Sequence[memoryview], int], int]


def direct_or_skip(root: Path) -> DirectFiles:
    reason = DirectFiles.probe(root)
    if reason is not None:
        pytest.skip(reason)
    return DirectFiles(root)


class TestDirectFiles(FileEngineTests):
    def make(self, root: Path) -> FileEngine:
        return direct_or_skip(root)

    @pytest.mark.parametrize("step", [4096, 3 * 4096 + 512, 1 << 20])
    def test_short_transfers_are_continued(
        self, files: FileEngine, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        # The kernel's own limit and signals make transfers short; here every one is, and the
        # count may end inside a sector.
        def short(move: Mover) -> Mover:
            def moved(fd: int, views: Sequence[memoryview], offset: int) -> int:
                taken, left = [], step - step % 4096
                for view in views:
                    taken.append(view[:left])
                    left -= len(taken[-1])
                return min(step, move(fd, taken, offset) + step % 4096)

            return moved

        monkeypatch.setattr(os, "pwritev", short(os.pwritev))
        monkeypatch.setattr(os, "preadv", short(os.preadv))
        handle = files.open("a", create=True)
        data = page_bytes(1, size=16 * 4096)
        files.write(handle, 0, [data[:4096].data, data[4096:].data])
        found = aligned_array(16 * 4096, 4096)
        files.read(handle, 0, [found[: 7 * 4096].data, found[7 * 4096 :].data])
        assert bytes(found) == bytes(data)

    def test_a_write_that_makes_no_progress_is_an_error(
        self, files: FileEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "pwritev", lambda _fd, _views, _offset: 100)
        handle = files.open("a", create=True)
        with pytest.raises(OSError, match="no progress"):
            files.write(handle, 0, [page_bytes(1).data])

    def test_the_page_cache_is_not_used(self, files: FileEngine, tmp_path: Path) -> None:
        handle = files.open("a", create=True)
        files.write(handle, 0, [page_bytes(1).data])
        fd = os.open(tmp_path / "root" / "a", os.O_RDONLY)
        with pytest.raises(OSError, match=r".") as caught:
            # Only a page-cache read can answer without waiting for the device.
            os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT)
        os.close(fd)
        assert caught.value.errno == errno.EAGAIN


class TestPortableFiles(FileEngineTests):
    def make(self, root: Path) -> FileEngine:
        return PortableFiles(root)

    def test_its_threads_end_with_it(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())
        files = PortableFiles(tmp_path / "other")
        handle = files.open("a", create=True)
        files.write(handle, 0, [page_bytes(1).data])
        assert set(threading.enumerate()) > before
        files.shutdown()
        files.shutdown()
        assert set(threading.enumerate()) == before
        with pytest.raises(OSError, match="shut down"):
            files.read(handle, 0, [page_bytes(1).data])

    def test_any_length_and_address_will_do(self, files: FileEngine) -> None:
        handle = files.open("a", create=True)
        files.write(handle, 3, [memoryview(b"hello"), memoryview(b" world")])
        found = bytearray(11)
        files.read(handle, 3, [memoryview(found)])
        assert found == b"hello world"


class TestMemoryFiles(FileEngineTests):
    def make(self, root: Path) -> FileEngine:
        return MemoryFiles(root)


class TestFaultyFilesWithoutFaults(FileEngineTests):
    def make(self, root: Path) -> FileEngine:
        return FaultyFiles(MemoryFiles(root))


@pytest.fixture(params=[DirectFiles, PortableFiles])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileEngine]:
    engine = request.param(tmp_path / "root")
    yield engine
    engine.shutdown()


def _link(path: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(bytes(4096))
    path.symlink_to(elsewhere)


def _hard_link(path: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(bytes(4096))
    elsewhere.chmod(0o600)
    path.hardlink_to(elsewhere)


def _writable(path: Path, _elsewhere: Path) -> None:
    path.write_bytes(bytes(4096))
    path.chmod(0o666)


def _foreign(path: Path, _elsewhere: Path) -> None:
    path.write_bytes(bytes(4096))
    path.chmod(0o600)
    try:
        os.chown(path, 65534, 65534)
    except PermissionError:
        pytest.skip("only root can make another user's file")


@pytest.mark.parametrize(
    "place",
    [
        _link,
        _hard_link,
        _writable,
        _foreign,
        lambda path, _: os.mkfifo(path, 0o600),
        lambda path, _: path.mkdir(),
    ],
    ids=["symlink", "hard link", "mode 666", "foreign uid", "fifo", "directory"],
)
def test_what_is_not_a_file_of_ours_is_refused_by_name(
    real: FileEngine, tmp_path: Path, place: Callable[[Path, Path], None]
) -> None:
    place(tmp_path / "root" / "segment", tmp_path / "elsewhere")
    for opened in (real.open, real.lock):
        with pytest.raises(OSError, match="segment") as caught:
            opened("segment")
        assert not isinstance(caught.value, BlockingIOError)


def test_files_and_root_are_private(real: FileEngine, tmp_path: Path) -> None:
    real.close(real.open("a", create=True))
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "root" / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("engine", [DirectFiles, PortableFiles])
def test_a_root_that_others_may_write_to_is_refused(
    tmp_path: Path, engine: type[RootedFiles]
) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(OSError, match="chmod 700"):
        engine(tmp_path)
    assert "chmod 700" in engine.probe(tmp_path)


@pytest.mark.parametrize("has_openat2", [True, False])
def test_a_link_beneath_the_root_is_not_followed_with_or_without_openat2(
    real: FileEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_openat2: bool
) -> None:
    if has_openat2:
        assert beneath._openat2() is not None
    else:
        monkeypatch.setattr(beneath, "_openat2", lambda: lambda *_asked: -errno.ENOSYS)
    real.close(real.open("a", create=True))
    assert (tmp_path / "root" / "a").stat().st_mode & 0o777 == 0o600
    (tmp_path / "root" / "b").symlink_to("a")
    for name in ("b", "c"):
        with pytest.raises(OSError, match=f"root/{name}") as caught:
            real.open(name)
        assert caught.value.errno == (errno.ELOOP if name == "b" else errno.ENOENT)


def test_what_is_no_plain_name_is_not_opened_beneath_a_directory(tmp_path: Path) -> None:
    (tmp_path / "root" / "within").mkdir(parents=True)
    (tmp_path / "root" / "within" / "up").symlink_to("..")
    (tmp_path / "elsewhere").write_bytes(b"x")
    at = os.open(tmp_path / "root" / "within", os.O_RDONLY)
    for name in ("../../elsewhere", str(tmp_path / "elsewhere"), "up/../elsewhere"):
        with pytest.raises(OSError, match=r"cross-device|symbolic links") as caught:
            beneath.open_beneath(name, os.O_RDONLY, at)
        assert caught.value.errno in (errno.EXDEV, errno.ELOOP)
    os.close(at)


@pytest.mark.parametrize("chain", [["far"], ["TOP/far"], ["../TOPNAME/far"], ["other", "far/"]])
def test_links_of_ours_to_the_root_are_followed_one_by_one(
    tmp_path: Path, chain: list[str]
) -> None:
    (tmp_path / "far").mkdir(mode=0o700)
    for name, target in zip(("near", "other"), chain, strict=False):
        path = target.replace("TOPNAME", tmp_path.name).replace("TOP", str(tmp_path))
        (tmp_path / name).symlink_to(path)
    files = PortableFiles(tmp_path / "near")
    files.close(files.open("x", create=True))
    files.shutdown()
    assert (tmp_path / "far" / "x").is_file()


def test_links_that_lead_to_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=r"cure: .*root/../a|cure: .*'.*/a'"):
        PortableFiles(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's link")
@pytest.mark.parametrize("way", ["the root becomes their link", "our link becomes theirs"])
def test_their_link_that_comes_between_any_two_steps_of_a_start_is_not_followed(
    tmp_path: Path, way: str
) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "victim").mkdir(mode=0o700)
    victim = (tmp_path / "victim").stat()
    refusals: list[str] = []
    for step in count(1):
        root = tmp_path / f"root-{step}"
        if way == "our link becomes theirs":
            root.symlink_to("real")
        else:
            root.mkdir(mode=0o700)
        with _before_open(step, partial(_make_theirs, root, "victim")) as reached:
            try:
                files = PortableFiles(root)
            except OSError as error:
                refusals.append(str(error))
            else:
                assert not os.path.samestat(os.fstat(files._root_fd), victim), step
                files.shutdown()
        if not reached():
            break
    assert len(refusals) >= 2, "before the parent and before the entry itself"
    assert all("cure: " in words for words in refusals), refusals
    assert step >= 4, "parent, entry, directory, and the end"
    assert list((tmp_path / "victim").iterdir()) == []


def _make_theirs(root: Path, target: str) -> None:
    """Put another user's link in the root's place."""
    root.rename(root.with_name(f"{root.name}-aside"))
    root.symlink_to(target)
    os.chown(root, 65534, 65534, follow_symlinks=False)


@contextmanager
def _before_open(step: int, act: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """`act` just before the interpreter's `step`-th open on this thread; says whether it came."""
    opens = iter(range(1, step + 1))
    me = threading.get_ident()
    came: list[int] = []

    def hear(event: str, _arguments: object) -> None:
        if event == "open" and threading.get_ident() == me and next(opens, 0) == step:
            came.append(step)
            act()

    sys.addaudithook(hear)  # it cannot be taken away, but once `opens` is empty it does nothing
    try:
        yield lambda: bool(came)
    finally:
        for _ in opens:
            pass


def test_an_error_names_the_file(real: FileEngine, tmp_path: Path) -> None:
    handle = real.open("a", create=True)
    with pytest.raises(OSError, match=str(tmp_path / "root" / "a")):
        real.read(handle, 0, [page_bytes(1).data])


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    assert set(probe_engines(tmp_path / "root")) == {"direct", "portable", "gds"}
    assert list((tmp_path / "root").iterdir()) == []


def test_auto_takes_the_first_engine_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirectFiles, "open_flags", 0)
    chosen = choose_engine(tmp_path / "root")
    assert chosen.name == "portable"
    chosen.shutdown()
    with pytest.raises(TierFailed, match="direct: this platform has no O_DIRECT"):
        choose_engine(tmp_path / "root", "direct")


def test_a_directory_that_cannot_be_is_refused_with_every_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierFailed, match=r"direct: .*portable: .*another directory"):
        choose_engine(tmp_path / "file")


def test_an_unknown_engine_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'direct'"):
        choose_engine(tmp_path, "dirct")


@pytest.mark.parametrize("seed", range(30))
def test_a_crash_keeps_what_was_synced_and_any_part_of_the_rest(seed: int) -> None:
    files = MemoryFiles(Path("disk"), seed=seed)
    handle = files.open("a", create=True)
    old, new = page_bytes(1), page_bytes(2)
    files.write(handle, 0, [old.data, old.data])
    files.sync(handle)
    files.sync_root()
    files.write(handle, 0, [new.data])
    files.rename("a", "b")
    files.crash()
    (name,) = files.names()
    found = aligned_array(2 * len(old), 4096)
    files.read(files.open(name), 0, [found.data])
    sectors = [found[: len(old)].reshape(-1, 512), old.reshape(-1, 512), new.reshape(-1, 512)]
    assert all(bytes(f) in (bytes(o), bytes(n)) for f, o, n in zip(*sectors, strict=True))
    assert bytes(found[len(old) :]) == bytes(old)


def test_crashes_of_many_seeds_keep_all_nothing_and_parts() -> None:
    kept = set()
    for seed in range(40):
        files = MemoryFiles(Path("disk"), seed=seed)
        handle = files.open("a", create=True)
        files.preallocate(handle, 16 * 4096)
        files.sync(handle)
        files.sync_root()
        files.write(handle, 0, [memoryview(page_bytes(1, size=16 * 4096))])
        files.crash()
        found = aligned_array(16 * 4096, 4096)
        files.read(files.open("a"), 0, [found.data])
        same = (found == page_bytes(1, size=16 * 4096)).mean()
        kept.add("all" if same == 1 else "nothing" if same < 0.01 else "parts")
    assert kept == {"all", "nothing", "parts"}


def test_faults_come_when_the_schedule_says() -> None:
    files = FaultyFiles(MemoryFiles(Path("disk")), once(2, Fault.EIO))
    handle = files.open("a", create=True)
    data = page_bytes(1)
    files.write(handle, 0, [data.data])
    with pytest.raises(OSError, match="injected into write"):
        files.write(handle, 0, [data.data])
    files.write(handle, 0, [data.data])
    files.schedule = from_then_on(files.calls, Fault.ENOSPC)
    for _ in range(3):
        with pytest.raises(OSError, match="injected") as caught:
            files.write(handle, 0, [data.data])
        assert caught.value.errno == errno.ENOSPC
    files.schedule = once(files.calls, Fault.FLIP)
    found = aligned_array(len(data), 4096)
    files.read(handle, 0, [found.data])
    assert sum((int(a) ^ int(b)).bit_count() for a, b in zip(found, data, strict=True)) == 1
    files.schedule = once(files.calls, Fault.LOST)
    files.write(handle, 0, [page_bytes(2).data])
    files.read(handle, 0, [found.data])
    assert bytes(found) == bytes(data)


def test_a_seed_replays_its_faults() -> None:
    def outcomes(seed: int) -> list[str]:
        rates = {Fault.EIO: 0.2, Fault.SHORT: 0.2, Fault.FLIP: 0.2, Fault.DELAY: 0.1}
        files = FaultyFiles(
            MemoryFiles(Path("disk"), seed=seed), at_rates(seed, rates), seed=seed, delay_s=0
        )
        said = []
        rng = random.Random(seed)
        for _ in range(60):
            found = aligned_array(4096, 4096)
            try:
                handle = files.open("a", create=True)
                files.write(handle, 0, [page_bytes(rng.randrange(9), size=4096).data])
                files.read(handle, 0, [found.data])
                said.append(bytes(found).hex())
            except OSError as error:
                said.append(str(error))
        return said

    assert outcomes(5) == outcomes(5)
    assert outcomes(5) != outcomes(6)


def test_only_a_simulated_disk_can_crash(tmp_path: Path) -> None:
    inner = PortableFiles(tmp_path / "root")
    with pytest.raises(TypeError, match="portable files cannot crash"):
        FaultyFiles(inner).crash()
    inner.shutdown()
