"""The file with the master key: 32 random bytes as 64 hexadecimal digits, for nobody else to read.

A key is used as it is, so it must be random: a pass phrase is none. Losing the file loses all that
was written with it, which is also how all of it is erased.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

from tierkv.core.errors import ConfigError
from tierkv.tiers.seals.base import MASTER_BYTES

_FILE_BYTES_MAX: Final = 256
_DIGITS: Final = re.compile(rb"[0-9a-fA-F]{%d}" % (2 * MASTER_BYTES))


def read_key(path: Path) -> bytes:
    """The key in `path`. Raises ConfigError, with the cure, for anything that is no key of ours."""
    try:
        # O_NONBLOCK keeps a pipe from blocking the open.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags)
    except OSError as error:
        cure = f"make one with: tierkv keygen {path}"
        if not isinstance(error, FileNotFoundError):
            cure = "name a plain file of yours, mode 0600; links are not followed"
        raise ConfigError(f"key file {path}: {error.strerror}; cure: {cure}") from None
    try:
        reason = _refusal(os.fstat(descriptor))
        if reason is not None:
            raise ConfigError(f"key file {path}: {reason}")
        text = os.read(descriptor, _FILE_BYTES_MAX).strip()
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if not _DIGITS.fullmatch(text):
        # What is in it is not shown: it may be a key all the same.
        raise ConfigError(
            f"key file {path}: it must hold {2 * MASTER_BYTES} hexadecimal digits and nothing "
            f"else; cure: make one with: tierkv keygen {path}.new"
        )
    return bytes.fromhex(text.decode("ascii"))


def make_key(path: Path) -> None:
    """Write a new random key to `path`, mode 0600. Raises ConfigError if anything is there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path}: something is there, and a key that is overwritten loses all that was "
            "written with it; cure: another name"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_hex(MASTER_BYTES).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _refusal(status: os.stat_result) -> str | None:
    """Why a file may not hold a key, or None."""
    if not stat.S_ISREG(status.st_mode):
        return "it is no plain file; cure: name a file"
    if status.st_uid != os.geteuid():
        return f"it belongs to uid {status.st_uid}, not to us (uid {os.geteuid()}); cure: chown"
    if status.st_mode & 0o077:
        return f"others may use it (mode {status.st_mode & 0o777:04o}); cure: chmod 600"
    return None
