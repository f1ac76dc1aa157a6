"""What is put into a cold directory by the drill `hostile`, and how.

`entries()` lists each kind of entry in the place of each kind of file, odd names, the root itself
as something else, entries that are swapped for a link while the store starts, and content that is
not ours.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec
import xxhash

from tierkv.testing.drills import flips_site

_NOBODY: Final = 65534
_IS_ROOT: Final = os.geteuid() == 0
_PIB: Final = 1 << 50
#: AT_FDCWD, and RENAME_EXCHANGE of renameat2(2).
_HERE, _EXCHANGE = -100, 2
_FOLDER: Final = flips_site.LAYOUT.fingerprint.hex()[:16]


@dataclass(slots=True)
class Scene:
    """A cold directory as a clean stop left it, and what lies beside it."""

    top: Path
    undo: ExitStack
    engine: str
    #: Words that a refusal may use for what it refuses.
    names: list[str] = field(default_factory=list)
    #: Pages that the entries may cost; None: any.
    costs: set[int] | None = field(default_factory=set)
    #: Where a link of ours in the root's place leads: that is the root then.
    leads_to: Path | None = None
    #: What goes on while the store is there.
    meanwhile: list[AbstractContextManager[None]] = field(default_factory=list)
    #: The directory that holds the segments.
    root: Path = field(init=False)
    #: A directory of ours, with a file in it, that is none of the store's business.
    outside: Path = field(init=False)
    #: A file that no case may change.
    witness: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.top / "cold" / _FOLDER
        self.outside = self.top / "outside"
        self.witness = self.outside / "witness"

    def take(self, name: str) -> Path:
        """The place of a file, emptied; what it held may be missed."""
        self.names.append(name)
        path = self.root / name
        path.unlink(missing_ok=True)
        pages = flips_site.images()[0].pages_in(name.replace(".tmp", ".tkv"))
        if name.endswith(".tmp") and pages:  # so that the store has that segment to make
            path.with_suffix(".tkv").unlink(missing_ok=True)
        if self.costs is not None:
            self.costs |= pages
        return path


class Entry(NamedTuple):
    """Something hostile, and how to put it there."""

    name: str
    put: Callable[[Scene], None]


Make: TypeAlias = Callable[[Scene, Path], None]


@lru_cache(maxsize=1)
def entries() -> list[Entry]:
    """Every entry, always in this order."""
    made = [
        Entry(f"{name} is {kind}", partial(_place, name, make))
        for name in _PLACES
        for kind, make in _KINDS.items()
    ]
    made += [Entry(f"stranger {name[:40]!r}", partial(_stranger, name)) for name in _NAMES]
    made += [Entry(f"the root is {kind}", partial(_root, make)) for kind, make in _ROOTS.items()]
    made += [Entry(f"{name} is swapped for a link", partial(_swap, name)) for name in _SWAPPED]
    made += [Entry(f"{kind} is swapped", put) for kind, put in _SWAPPED_ROOTS.items()]
    return made + [Entry(kind, put) for kind, put in _CONTENTS.items()]


def _place(name: str, make: Make, scene: Scene) -> None:
    path = scene.take(name)
    make(scene, path)


def _stranger(name: bytes, scene: Scene) -> None:
    """A file of ours under an odd name: it takes nobody's place and is no reason to refuse."""
    path = os.fsencode(scene.root) + b"/" + name
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def _root(make: Make, scene: Scene) -> None:
    scene.names.append(scene.root.name)
    scene.costs = None
    scene.root.rename(scene.top / "moved")
    make(scene, scene.root)


def _socket(scene: Scene, path: Path) -> None:
    # The path of a socket is limited to 108 bytes; a file's is not.
    server = scene.undo.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(str(scene.top / "s"))
    (scene.top / "s").rename(path)


def _hard_link(scene: Scene, path: Path) -> None:
    path.hardlink_to(scene.witness)


def _directory(_scene: Scene, path: Path) -> None:
    path.mkdir()
    (path / "within").write_bytes(b"x")


def _file(size: int, mode: int, owner: int, _scene: Scene, path: Path) -> None:
    """A file of that length, with a hole for content."""
    with path.open("xb") as file:
        try:
            os.truncate(file.fileno(), size)
        except OSError:  # more than this file system can count
            os.truncate(file.fileno(), size >> 7)
    path.chmod(mode)
    if owner >= 0:
        os.chown(path, owner, -1)


def _noise(_scene: Scene, path: Path) -> None:
    path.write_bytes(random.Random(_FOLDER).randbytes(20480))
    path.chmod(0o600)


def _device(kind: int, number: tuple[int, int], _scene: Scene, path: Path) -> None:
    os.mknod(path, 0o600 | kind, os.makedev(*number))


def _link(target: str, scene: Scene, path: Path) -> None:
    path.symlink_to(target.replace("TOP", str(scene.top)))


#: Files that are read, files that are about to be made, and nothing of ours.
_PLACES: Final = (
    "segment-00000000.tkv",
    "manifest",
    "lock",
    "manifest.tmp",
    "segment-00000003.tmp",
    "segment-99999999.tkv",
    "unknown",
)
_KINDS: Final[dict[str, Make]] = {
    "a link to a file outside": partial(_link, "TOP/outside/witness"),
    "a link to a directory outside": partial(_link, "TOP/outside"),
    "a link by .. to a file outside": partial(_link, "../../outside/witness"),
    "a link to nothing outside": partial(_link, "TOP/outside/absent"),
    "a link to /dev/zero": partial(_link, "/dev/zero"),
    "a hard link to a file outside": _hard_link,
    "a pipe": lambda _scene, path: os.mkfifo(path, 0o600),
    "a socket": _socket,
    "a directory": _directory,
    "a file of a pebibyte": partial(_file, _PIB, 0o600, -1),
    "an empty file": partial(_file, 0, 0o600, -1),
    "a file of 4097 bytes": partial(_file, 4097, 0o600, -1),
    "noise": _noise,
    "a file for all to write": partial(_file, 20480, 0o666, -1),
    "a file for none to read": partial(_file, 20480, 0, -1),
}
if _IS_ROOT:
    _KINDS["the device of zeros"] = partial(_device, stat.S_IFCHR, (1, 5))
    _KINDS["a block device"] = partial(_device, stat.S_IFBLK, (7, 250))
    _KINDS["somebody's file"] = partial(_file, 20480, 0o600, _NOBODY)

_NAMES: Final = (
    b"..still-here",
    b"line\nbreak",
    b"segment-00000001.tkv\n",
    b"segment-1.tkv",
    b"segment-0000000a.tkv",
    b"SEGMENT-00000001.TKV",
    b"manifest\t",
    b"-rf",
    b"n" * 255,
    b"segment-0000000\xef\xbc\x91.tkv",  # a digit, but not ASCII's
    "Überraschung\N{RIGHT-TO-LEFT OVERRIDE}vkt".encode(),
    b"\xff\xfe not text",
    b"a\\..\\b",
    b"%s{0}$(id)",
)


def _shut(mode: int, owner: int, scene: Scene, path: Path) -> None:
    """The root itself, contents and all, with another mode or owner."""
    (scene.top / "moved").rename(path)
    path.chmod(mode)
    if owner >= 0:
        os.chown(path, owner, -1)


def _our_link(target: str, scene: Scene, path: Path) -> None:
    """How a user moves a directory to another disk."""
    scene.leads_to = scene.top / target
    path.symlink_to(scene.leads_to)


def _their_link(scene: Scene, path: Path) -> None:
    """How another user would have us write to a directory of ours."""
    path.symlink_to(scene.outside)
    os.chown(path, _NOBODY, -1, follow_symlinks=False)


_ROOTS: Final[dict[str, Make]] = {
    "a link of ours to a directory with other files": partial(_our_link, "outside"),
    "a link of ours to a store moved elsewhere": partial(_our_link, "moved"),
    "a link to nothing": partial(_link, "TOP/absent"),
    "a link to itself": partial(_link, _FOLDER),
    "a file": partial(_file, 4096, 0o600, -1),
    "a pipe": lambda _scene, path: os.mkfifo(path, 0o600),
    "a socket": _socket,
    "for all to write": partial(_shut, 0o777, -1),
    "for a group to write": partial(_shut, 0o770, -1),
    "for none to read": partial(_shut, 0, -1),
}
if _IS_ROOT:
    _ROOTS["somebody's link to a directory outside"] = _their_link
    _ROOTS["somebody's"] = partial(_shut, 0o700, _NOBODY)
    _ROOTS["the device of zeros"] = partial(_device, stat.S_IFCHR, (1, 5))


# ---- what changes while the store starts


def _swap(name: str, scene: Scene) -> None:
    """A file, and every other moment a link to one outside."""
    scene.names.append(name)
    if scene.costs is not None:
        scene.costs |= flips_site.images()[0].pages_in(name)
    link = scene.root / "swapped"
    link.symlink_to(scene.witness)
    scene.meanwhile.append(_swapping(scene.root / name, link))


def _swap_root(scene: Scene) -> None:
    """The root, and every other moment somebody's link to a directory of ours."""
    scene.names.append(scene.root.name)
    scene.costs = None
    link = scene.root.with_name("swapped")
    _their_link(scene, link)
    scene.meanwhile.append(_swapping(scene.root, link))


def _swap_our_link(scene: Scene) -> None:
    """A link of ours to the root, and every other moment somebody's to another directory."""
    _root(partial(_our_link, "moved"), scene)
    _swap_root(scene)


@contextmanager
def _swapping(one: Path, two: Path) -> Iterator[None]:
    """Two entries change places again and again; they are as they were at the end."""
    is_over = threading.Event()

    def work() -> None:
        # Another entry may stand above or in one's place; then nothing changes places.
        with suppress(OSError):
            while not is_over.is_set():
                _exchange(one, two)
                time.sleep(1e-4)
                _exchange(two, one)
                time.sleep(1e-4)

    thread = threading.Thread(target=work, name="hostile-swaps")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _exchange(one: Path, two: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE: at no moment is one of them missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE):
        code = ctypes.get_errno()
        # What the store has just removed may be there the next time.
        if code != errno.ENOENT:
            raise OSError(code, os.strerror(code), str(one))


_SWAPPED: Final = ("segment-00000000.tkv", "manifest", "lock")
_SWAPPED_ROOTS: Final[dict[str, Callable[[Scene], None]]] = {}
if _IS_ROOT:
    _SWAPPED_ROOTS["the root"] = _swap_root
    _SWAPPED_ROOTS["a link of ours in the root's place"] = _swap_our_link


# ---- content that is not ours


def _manifest_says(said: dict[str, object], scene: Scene) -> None:
    """A manifest that is whole, and says something else."""
    path = scene.take("manifest")
    scene.costs = None
    line = flips_site.images()[0].files["manifest"].partition(b"\n")[0]
    line = msgspec.json.encode(msgspec.json.decode(line, type=dict[str, object]) | said)
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"
    path.write_bytes(text.ljust(4096))
    path.chmod(0o600)


def _segment_says(offset: int, said: bytes, scene: Scene) -> None:
    """A segment header that is whole, and says something else."""
    name = "segment-00000000.tkv"
    path = scene.take(name)
    scene.costs = None
    data = bytearray(flips_site.images()[0].files[name])
    data[offset : offset + len(said)] = said
    data[4080:4096] = xxhash.xxh3_128_digest(bytes(data[:4080]))
    path.write_bytes(data)
    path.chmod(0o600)


def _foreign_segments(scene: Scene) -> None:
    """No manifest, and segments that say they are of another layout."""
    scene.take("manifest")
    _segment_says(56, bytes(range(32)), scene)


def _held_lock(scene: Scene) -> None:
    """Somebody else holds the lock: it belongs to an open file, not to a process."""
    scene.names.append("lock")
    holder = scene.undo.enter_context((scene.root / "lock").open("r+b"))
    fcntl.flock(holder, fcntl.LOCK_EX)


_CONTENTS: Final[dict[str, Callable[[Scene], None]]] = {
    "a manifest of format 2": partial(_manifest_says, {"format": 2}),
    "a manifest of another layout": partial(_manifest_says, {"fingerprint": "00" * 32}),
    "a manifest of other pages": partial(_manifest_says, {"warm_page_bytes": 8192}),
    "a manifest of larger segments": partial(_manifest_says, {"pages_per_segment": 1 << 31}),
    "a manifest of another store": partial(_manifest_says, {"store_id": "ab" * 16}),
    "a manifest of the last epoch": partial(_manifest_says, {"epoch": (1 << 24) - 1}),
    "a manifest of many segments": partial(_manifest_says, {"segments": [-1, 3, 1 << 62]}),
    "a segment of format 2": partial(_segment_says, 8, b"\2"),
    "a segment of another number": partial(_segment_says, 32, b"\1"),
    "a segment of another store": partial(_segment_says, 40, bytes(16)),
    "a segment of another layout": partial(_segment_says, 56, bytes(range(32))),
    "segments of another layout, no manifest": _foreign_segments,
    "a lock that somebody holds": _held_lock,
}
