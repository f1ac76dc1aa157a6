"""Hostile entries in the cold directory: what somebody put there is met on a real file system.

The first cases put each entry of `hostile_entries` there alone; the cases after those put one to
three of them together. All run on a directory of their own, beside an `outside` that nobody may
touch. So that many are quick, most of the latter are in memory (tmpfs) where there is such a place.

What must hold. Within `LIMIT_S`, the store opens, gives every prompt the bytes that were put under
it or fewer blocks (all of them, where the entry took nobody's place), takes new ones and closes; or
it refuses with `TierFailed`, which names what it refuses and the cure. Nothing outside the root is
made, changed, moved or emptied, and no descriptor stays open.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

from tierkv.config import Config
from tierkv.core.errors import TierFailed
from tierkv.store import Store
from tierkv.testing.drills import base, flips, flips_site
from tierkv.testing.drills.base import Tally, Wrong
from tierkv.testing.drills.hostile_entries import Scene, entries
from tierkv.testing.drills.limits import within
from tierkv.tiers.files.direct import DirectFiles

NAME: Final = "hostile"
#: A case that takes longer hangs.
LIMIT_S: Final = 10.0
#: One of so many cases of several entries is on the disk of temporary files, not in memory.
DISK_EVERY: Final = 8
#: The engines, by weight: direct is quick, and most of both is the same code.
ENGINES: Final = ("auto", "auto", "direct", "direct", "direct", "direct", "direct", "portable")

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 each case makes a directory of its own there
_SIZE_READ_MAX: Final = 1 << 20


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
    is_quick = number >= len(known) and number % DISK_EVERY
    with ExitStack() as undo:
        top = tempfile.mkdtemp(prefix="tierkv-hostile-", dir=_memory() if is_quick else None)
        undo.callback(shutil.rmtree, top)
        scene = Scene(Path(top), undo, rng.choice(ENGINES))
        _furnish(scene)
        for entry in chosen:
            # An entry that cannot be put there beside the others is left out.
            with suppress(OSError):
                entry.put(scene)
        before = _outside_of(scene)
        try:
            with ExitStack() as meanwhile:
                for going_on in scene.meanwhile:
                    meanwhile.enter_context(going_on)
                within(LIMIT_S, partial(_meet, scene))
            changed = {path for path, _ in before.items() ^ _outside_of(scene).items()}
            if changed:
                raise Wrong(base.BROKEN, f"outside of the root was changed: {sorted(changed)}")
        except Wrong as wrong:
            raise Wrong(wrong.kind, f"{words}: {wrong.words}") from wrong
        except Exception as error:
            raise Wrong(base.BROKEN, f"{words}: {error!r}") from error


@lru_cache(maxsize=1)
def _memory() -> str | None:
    """A place in memory for directories where all engines work; None where there is none."""
    if not os.access(_MEMORY, os.W_OK):
        return None
    with tempfile.TemporaryDirectory(dir=_MEMORY) as place:
        return None if DirectFiles.probe(Path(place)) else str(_MEMORY)


def _furnish(scene: Scene) -> None:
    scene.outside.mkdir(mode=0o700)
    _write(f"{scene.witness}", b"mine" * 2048)
    scene.root.mkdir(mode=0o700, parents=True)
    for name, data in flips_site.images()[0].files.items():
        _write(f"{scene.root}/{name}", data)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    os.close(fd)


def _outside_of(scene: Scene) -> dict[str, object]:
    """Everything but the root's contents: kind, size, content, time of the last change."""
    roots = {str(scene.root), str(scene.leads_to)}
    # Files inside of it come and go, so a directory that holds the root has its own times.
    restless = roots | {str(scene.root.parent)}
    found: dict[str, object] = {"witness": _state(str(scene.witness), scene.witness.lstat())}
    folders = [str(scene.top)]
    while folders:
        with os.scandir(folders.pop()) as entries_there:
            for entry in entries_there:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode) and entry.path not in roots:
                    folders.append(entry.path)
                state = _state(entry.path, status)
                found[entry.path] = state[:1] if entry.path in restless else state
    return found


def _state(path: str, status: os.stat_result) -> tuple[object, ...]:
    """What is to stay as it was: what it is, then what it holds and since when."""
    # A file that none may read, or that is endless, is known by its size and time alone.
    is_read = stat.S_ISREG(status.st_mode) and status.st_mode & 0o400
    data = Path(path).read_bytes() if is_read and status.st_size < _SIZE_READ_MAX else b""
    what = status.st_mode, status.st_uid, status.st_ino
    return what, status.st_size, status.st_mtime_ns, data


def _meet(scene: Scene) -> None:
    costs = None if scene.costs is None else frozenset(scene.costs)
    before = _descriptors()
    try:
        with Store.open(config_at(scene.top / "cold", scene.engine), flips_site.LAYOUT) as store:
            flips.ask(store, flips_site.images()[0], flips.Harm("", costs))
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
    cold = flips_site.CONFIG.tiers.cold.model_copy(update=where)
    tiers = flips_site.CONFIG.tiers.model_copy(update={"cold": cold})
    return flips_site.CONFIG.model_copy(update={"tiers": tiers})


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 names are all that is asked
