"""Bad configurations: whatever a file holds, it loads or is refused with a place and a reason.

The first cases are `bad_configs.catalogue`, one by one. The cases after those change
`configs/reference.yaml`, or a configuration for a tiny model, at the level of bytes, tokens and
lines.

What must hold. Within `LIMIT_S` and `MEMORY_BYTES_MAX` more memory, loading gives a `Config` that
is the same again from its own dump, or raises `ConfigError`, each line of which names file, line
and column, and says something. Nothing is run, no file is written. Where a file is so small that
it can be tried, a `Store` opens on what loads and serves a prompt, or refuses with `ConfigError` or
`TierFailed`. In one of `COMMAND_EVERY` cases the real command is run, which ends with 0 or 2 and
shows no traceback.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import numpy as np

from tierkv.config import Config, load_config
from tierkv.config_yaml import ConfigFileError
from tierkv.core.errors import ConfigError, TierFailed
from tierkv.core.geometry import MIB, KVGeometry, Layout
from tierkv.store import Store
from tierkv.testing.drills import base
from tierkv.testing.drills.bad_configs import SMALL, catalogue, furnish
from tierkv.testing.drills.base import Tally, Wrong
from tierkv.testing.drills.config_changes import changed
from tierkv.testing.drills.limits import within

NAME: Final = "configs"
#: A file that takes longer hangs; one of the largest accepted size takes a second or two.
LIMIT_S: Final = 20.0
MEMORY_BYTES_MAX: Final = 512 << 20
#: One of so many cases runs the command, which takes a second to start.
COMMAND_EVERY: Final = 500

_COMMAND_LIMIT_S: Final = 60
_PROBLEM: Final = re.compile(r"(.+?):([1-9]\d*):([1-9]\d*): (.{8,})")
_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_REPORT_CHARS_MAX: Final = 1 << 16
#: A configuration with more is not opened: this machine is shared.
_TRIED_BYTES_MAX: Final = 16 * MIB
_TRIED_THREADS_MAX: Final = 16
_GEOMETRY: Final = KVGeometry(layers=2, kv_heads=1, head_dim=16, dtype="float16")


def run(cases: int, seed: int) -> Tally:
    """The whole catalogue, then changed files, `cases` in all."""
    return base.run_cases(NAME, _case, cases, seed)


def replay(seed: int, case: int) -> None:
    """One case again; raises what was wrong with it."""
    _case(base.case_random(NAME, seed, case), case)


def _case(rng: random.Random, number: int) -> None:
    known = catalogue()
    with ExitStack() as undo:
        top = tempfile.mkdtemp(prefix="tierkv-configs-")
        undo.callback(_remove, top)
        folder = Path(top) / "in"
        folder.mkdir(mode=0o700)
        path = folder / "c.yaml"
        if number < len(known):
            bad = known[number]
            what, words = bad.name, bad.words
            bad.put(path)
            if words is None:
                furnish(folder)
        else:
            text, what = changed(_bases()[bool(rng.randrange(4))], rng)
            words = ""
            path.write_bytes(text)
        try:
            config = _expect_words(path, words) if number < len(known) else _loaded(path)
            if config is not None and _can_be_tried(config, Path(top), is_known=words is None):
                within(LIMIT_S, partial(_try, config))
            if number % COMMAND_EVERY == COMMAND_EVERY - 1:
                run_command(path, is_good=config is not None)
        except Wrong as wrong:
            raise Wrong(wrong.kind, f"{what}: {wrong.words}") from wrong
        except Exception as error:
            raise Wrong(base.BROKEN, f"{what}: {error!r:.300}") from error


def _remove(top: str) -> None:
    try:
        shutil.rmtree(top)
    except RecursionError:  # very deep directories were made
        subprocess.run(["rm", "-rf", top], check=True)


@lru_cache(maxsize=1)
def _bases() -> tuple[str, str]:
    """What is changed: the reference file of the checkout, and `SMALL`."""
    reference = Path(__file__).parents[3] / "configs" / "reference.yaml"
    return reference.read_text(encoding="utf-8"), SMALL


def _expect_words(path: Path, words: str | None) -> Config | None:
    """Load a file of the catalogue: refused with these words in the message, or, None, loaded."""
    try:
        config = _load(path)
    except ConfigFileError as error:
        if words is None:
            raise Wrong(base.BROKEN, f"refused: {error!s:.200}") from error
        if words not in str(error):
            raise Wrong(base.BROKEN, f"refused without {words!r}: {error!s:.200}") from error
        return None
    if words is not None:
        raise Wrong(base.BROKEN, "it was accepted")
    return config


def _loaded(path: Path) -> Config | None:
    try:
        return _load(path)
    except ConfigFileError:
        return None


def _load(path: Path) -> Config:
    """Load a file within the limits, and look at what came of it. Raises ConfigFileError."""
    before, done = _memory("VmRSS"), list[str]()
    _CLEAR_REFS.write_text("5")  # begins to measure VmHWM anew
    try:
        with _hearing(done):
            config = within(LIMIT_S, partial(load_config, path))
    except ConfigFileError as error:
        _expect_report(error, path)
        raise
    finally:
        if done:
            raise Wrong(base.BROKEN, f"it did more than to read: {done}")
        taken = _memory("VmHWM") - before
        if taken > MEMORY_BYTES_MAX:
            raise Wrong(base.BROKEN, f"it took {taken >> 20} MiB of memory")
    for dump in (config.model_dump(), config.model_dump(mode="json")):
        if Config.model_validate(dump) != config:
            raise Wrong(base.BROKEN, f"it is another from its own dump: {dump}")
    return config


def _expect_report(error: ConfigFileError, path: Path) -> None:
    """Every line names file, line and column and says something; no control character is shown."""
    text, report = str(error), error.report()
    if len(text) > _REPORT_CHARS_MAX or len(report) > 2 * _REPORT_CHARS_MAX:
        raise Wrong(base.BROKEN, f"a refusal of {len(text)} characters")
    for line in text.split("\n"):
        match = _PROBLEM.fullmatch(line)
        if match is None or match[1] != str(path):
            raise Wrong(base.BROKEN, f"a refusal without place or reason: {line!r:.200}")
    odd = [char for char in report if not char.isprintable() and char != "\n"]
    if odd or "Traceback" in report:
        raise Wrong(base.BROKEN, f"a report that is not for people: {odd[:5]} {report!r:.200}")


#: What loading a configuration never does, by the interpreter's audit events.
_NEVER: Final = frozenset(
    (
        *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen"),
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link"),
        *("os.symlink", "os.truncate", "shutil.rmtree", "pty.spawn", "socket.connect"),
        *("ctypes.dlopen", "pickle.find_class"),
    )
)
_heard: list[str] | None = None


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _heard is None:
        return
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
    if (event in _NEVER or is_write) and threading.current_thread().name == "drill":
        _heard.append(f"{event} {arguments!r:.100}")


@lru_cache(maxsize=1)
def _listen() -> None:
    sys.addaudithook(_hear)  # once in a process: a hook cannot be taken away again


@contextmanager
def _hearing(heard: list[str]) -> Iterator[None]:
    """Lists what the drill's thread does that loading never does."""
    global _heard  # noqa: PLW0603 a hook lasts as long as its process, and so do its ears
    _listen()
    _heard = heard
    try:
        yield
    finally:
        _heard = None


def _memory(name: str) -> int:
    """Bytes of memory that this process has (VmRSS), or had at most (VmHWM)."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


# ---- what loads is tried


def _can_be_tried(config: Config, top: Path, *, is_known: bool) -> bool:
    """Whether a store of this configuration stays small and beneath `top`."""
    if is_known:  # the catalogue says where, and what is large is far too large
        return True
    tiers, transfer = config.tiers, config.transfer
    sizes = (tiers.host.capacity, tiers.device.capacity, tiers.cold.capacity)
    threads = (tiers.cold.threads, tiers.host.prefault_threads, tiers.host.register_threads)
    paths = [tiers.cold.directory, config.event_log, transfer.link_profiles]
    return (
        max(sizes) <= _TRIED_BYTES_MAX
        and max(threads) <= _TRIED_THREADS_MAX
        and all(path is None or path.is_relative_to(top) for path in paths)
    )


def _try(config: Config) -> None:
    """Open a store and use it: it works, or says why not."""
    layout = Layout(_GEOMETRY, targets=config.pages.targets, block_tokens=config.block_tokens)
    before = threading.active_count()
    try:
        store = Store.open(config, layout)
    except (ConfigError, TierFailed) as error:
        if len(str(error)) < 20:
            raise Wrong(base.BROKEN, f"refused, and not said why: {error}") from error
    else:
        with store:
            _serve(store, config)
    if threading.active_count() > before:
        raise Wrong(base.LEAKED, f"threads: {threading.enumerate()}")


def _serve(store: Store, config: Config) -> None:
    tokens = list(range(3 * config.block_tokens))
    shape = store.plan.layers, 3, store.plan.block_layer_bytes
    rows = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for name in config.namespaces:
        store.put(tokens, rows, namespace=name)
        match = store.match(tokens, namespace=name)
        found = np.zeros((shape[0], match.blocks, shape[2]), np.uint8)
        count = store.get(match, found)
        if not np.array_equal(found[:, :count], rows[:, :count]):
            raise Wrong(base.WRONG_BYTES, f"in the first {count} blocks")
    store.flush(deadline_s=1)
    store.check()


def run_command(path: Path, *, is_good: bool) -> None:
    """`tierkv config check` and `show`: 0 or 2 as the file is, and no traceback."""
    for command in (["check"], ["show", "--effective", "--json"]):
        words = [sys.executable, "-m", "tierkv.cli", "config", *command, str(path)]
        done = subprocess.run(words, capture_output=True, timeout=_COMMAND_LIMIT_S, check=False)
        told = done.stdout if is_good else done.stderr
        if done.returncode != (0 if is_good else 2) or b"Traceback" in done.stderr or not told:
            raise Wrong(base.BROKEN, f"{command}: {done.returncode} {done.stderr!r:.300}")
