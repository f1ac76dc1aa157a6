"""Hostile entries in the cold directory: what somebody put there is met on a real file system.

The first cases put each kind of entry in the place of each kind of file, then odd names, content
that is not ours, and the root itself as something else; the cases after those put one to three of
them together. All run on a directory of their own, beside an `outside` that nobody may touch.

What must hold. Within `LIMIT_S`, the store opens, gives every prompt the bytes that were put under
it or fewer blocks (all of them, where the entry took nobody's place), takes new ones and closes; or
it refuses with `TierFailed`, which names what it refuses and the cure. Nothing outside the root is
made, changed, moved or emptied, and no descriptor stays open.
"""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec
import xxhash

from tierkv.config import Config
from tierkv.core.errors import TierFailed
from tierkv.store import Store
from tierkv.testing.drills import base, flips
from tierkv.testing.drills.base import Tally, Wrong

NAME: Final = "hostile"
#: A case that takes longer hangs.
LIMIT_S: Final = 10.0

_NOBODY: Final = 65534
_IS_ROOT: Final = os.geteuid() == 0
_PIB: Final = 1 << 50
_SIZE_READ_MAX: Final = 1 << 20


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

    @property
    def root(self) -> Path:
        """The directory that holds the segments."""
        return self.top / "cold" / flips.LAYOUT.fingerprint.hex()[:16]

    @property
    def outside(self) -> Path:
        """A directory of ours, with a file in it, that is none of the store's business."""
        return self.top / "outside"

    @property
    def witness(self) -> Path:
        """A file that no case may change."""
        return self.outside / "witness"

    def take(self, name: str) -> Path:
        """The place of a file, emptied; what it held may be missed."""
        self.names.append(name)
        path = self.root / name
        path.unlink(missing_ok=True)
        pages = flips.images()[0].pages_in(name.replace(".tmp", ".tkv"))
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


def run(cases: int, seed: int) -> Tally:
    """All entries of `entries()` one by one, then together."""
    return base.run_cases(NAME, _case, cases, seed)


def replay(seed: int, case: int) -> None:
    """One case again; raises what was wrong with it."""
    _case(base.case_random(NAME, seed, case), case)


def _case(rng: random.Random, number: int) -> None:
    known = entries()
    chosen = [known[number]] if number < len(known) else rng.sample(known, rng.randint(1, 3))
    words = " and ".join(entry.name for entry in chosen)
    with tempfile.TemporaryDirectory(prefix="tierkv-hostile-") as top, ExitStack() as undo:
        scene = Scene(Path(top), undo, rng.choice(("auto", "portable")))
        _furnish(scene)
        for entry in chosen:
            # An entry that cannot be put there beside the others is left out.
            with suppress(OSError):
                entry.put(scene)
        before = _outside_of(scene)
        try:
            _within_limit(scene)
            changed = {path for path, _ in before.items() ^ _outside_of(scene).items()}
            if changed:
                raise Wrong(base.BROKEN, f"outside of the root was changed: {sorted(changed)}")
        except Wrong as wrong:
            raise Wrong(wrong.kind, f"{words}: {wrong.words}") from wrong
        except Exception as error:
            raise Wrong(base.BROKEN, f"{words}: {error!r}") from error


def _furnish(scene: Scene) -> None:
    scene.outside.mkdir(mode=0o700)
    scene.witness.write_bytes(b"mine" * 2048)
    scene.witness.chmod(0o600)
    scene.root.mkdir(mode=0o700, parents=True)
    for name, data in flips.images()[0].files.items():
        (scene.root / name).write_bytes(data)
        (scene.root / name).chmod(0o600)


def _outside_of(scene: Scene) -> dict[str, object]:
    """Everything but the root's contents: kind, size, content, time of the last change."""
    found: dict[str, object] = {}
    for path in sorted(scene.top.rglob("*")):
        if {scene.root, scene.leads_to} & {*path.parents} and path != scene.witness:
            continue
        status = path.lstat()
        # A file that none may read, or that is endless, is known by its size and time alone.
        is_read = stat.S_ISREG(status.st_mode) and status.st_mode & 0o400
        is_read = is_read and status.st_size < _SIZE_READ_MAX
        what: tuple[object, ...] = (status.st_mode, status.st_uid, status.st_ino)
        # Files inside of it come and go, so a directory that holds the root has its own times.
        if path not in (scene.root, scene.root.parent, scene.leads_to):
            what += (status.st_size, status.st_mtime_ns)
        found[str(path.relative_to(scene.top))] = what, path.read_bytes() if is_read else b""
    return found


def _within_limit(scene: Scene) -> None:
    """Meet the scene on a thread of its own, so that one that hangs is told of."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            _meet(scene)
        except BaseException as error:  # noqa: BLE001 it is raised again by who waits
            raised.append(error)

    thread = threading.Thread(target=work, name="hostile", daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    if thread.is_alive():
        raise Wrong(base.BROKEN, f"it hung for {LIMIT_S:.0f} s")
    if raised:
        raise raised[0]


def _meet(scene: Scene) -> None:
    costs = None if scene.costs is None else frozenset(scene.costs)
    before = _descriptors()
    try:
        with Store.open(config_at(scene.top / "cold", scene.engine), flips.LAYOUT) as store:
            flips.ask(store, flips.images()[0], flips.Harm("", costs))
            store.flush(deadline_s=LIMIT_S / 2)
    except TierFailed as error:
        text = str(error)
        named = [*scene.names, str(scene.root), "the cold directory"]
        if not any(name in text or repr(name) in text for name in named):
            raise Wrong(base.BROKEN, f"refused, and not said what: {text}") from error
        if not any(word in text for word in ("cure:", "choose another directory")):
            raise Wrong(base.BROKEN, f"refused, and no cure said: {text}") from error
        if not scene.names:
            raise Wrong(base.LOST, f"refused for nothing: {text}") from error
    if _descriptors() != before:
        raise Wrong(base.LEAKED, f"{_descriptors() - before} descriptors are still open")


def config_at(directory: Path, engine: str = "auto") -> Config:
    """The configuration of `flips` with a real directory."""
    where = {"directory": directory, "engine": engine}
    cold = flips.CONFIG.tiers.cold.model_copy(update=where)
    tiers = flips.CONFIG.tiers.model_copy(update={"cold": cold})
    return flips.CONFIG.model_copy(update={"tiers": tiers})


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 names are all that is asked


# ---- entries


def entries() -> list[Entry]:
    """Every entry, always in this order."""
    made = [
        Entry(f"{name} is {kind}", partial(_place, name, make))
        for name in _PLACES
        for kind, make in _KINDS.items()
    ]
    made += [Entry(f"stranger {name[:40]!r}", partial(_stranger, name)) for name in _NAMES]
    made += [Entry(f"the root is {kind}", partial(_root, make)) for kind, make in _ROOTS.items()]
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
    path.write_bytes(random.Random(NAME).randbytes(20480))
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
    "a link to itself": partial(_link, flips.LAYOUT.fingerprint.hex()[:16]),
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


# ---- content that is not ours


def _manifest_says(said: dict[str, object], scene: Scene) -> None:
    """A manifest that is whole, and says something else."""
    path = scene.take("manifest")
    scene.costs = None
    line = flips.images()[0].files["manifest"].partition(b"\n")[0]
    line = msgspec.json.encode(msgspec.json.decode(line, type=dict[str, object]) | said)
    text = line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"
    path.write_bytes(text.ljust(4096))
    path.chmod(0o600)


def _segment_says(offset: int, said: bytes, scene: Scene) -> None:
    """A segment header that is whole, and says something else."""
    name = "segment-00000000.tkv"
    path = scene.take(name)
    scene.costs = None
    data = bytearray(flips.images()[0].files[name])
    data[offset : offset + len(said)] = said
    data[4080:4096] = xxhash.xxh3_128_digest(bytes(data[:4080]))
    path.write_bytes(data)
    path.chmod(0o600)


def _foreign_segments(scene: Scene) -> None:
    """No manifest, and segments that say they are of another layout."""
    scene.take("manifest")
    _segment_says(56, bytes(range(32)), scene)


def _held_lock(scene: Scene) -> None:
    """Another process holds the lock."""
    scene.names.append("lock")
    script = (
        "import fcntl,sys;f=open(sys.argv[1],'r+');fcntl.flock(f,2);print(1,flush=True);input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", script, str(scene.root / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    scene.undo.callback(holder.communicate)
    scene.undo.callback(holder.kill)
    assert holder.stdout is not None
    holder.stdout.readline()


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
    "a lock that another process holds": _held_lock,
}
