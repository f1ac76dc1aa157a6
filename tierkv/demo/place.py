"""Where a demo's cold tier lives: a directory that is kept, or a temporary one that is not."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tierkv.core.errors import ConfigError
from tierkv.demo.model import cache_root


@contextmanager
def working_directory(kept: Path | None) -> Iterator[Path]:
    """`kept`, made if absent; or a fresh directory beneath the cache, removed afterwards.

    Temporary directories that a killed demo left are removed first: their lock is free.
    """
    if kept is not None:
        path = kept.expanduser().absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--directory {kept}: {error.strerror}") from error
        yield path
        return
    root = cache_root() / "demo"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in root.glob("run-*"):
        _remove_if_free(stale)
    path = Path(tempfile.mkdtemp(prefix="run-", dir=root))
    lock = _lock(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def require_space(path: Path, needed_bytes: int) -> None:
    """Raise ConfigError unless the file system of `path` has that much free."""
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise ConfigError(
            f"{path} has {free / 1e9:.1f} GB free and the demo needs {needed_bytes / 1e9:.1f} GB;"
            " choose another place with --directory, or set TIERKV_CACHE"
        )


def _lock(path: Path) -> int | None:
    """An exclusive lock on a directory, held until closed; None if another process has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_free(path: Path) -> None:
    lock = _lock(path)
    if lock is not None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
