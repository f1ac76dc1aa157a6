"""Opening what lies beneath a directory, so that no link leads out of it, at any moment.

`open_beneath` asks the kernel to resolve no link at all (openat2(2), Linux 5.6); where there is no
such call, or a sandbox forbids it, O_NOFOLLOW on a plain name says the same. `open_directory` is
for the directory itself: every entry is first held by a descriptor that follows nothing, and judged
and opened through that, so what is swapped in between is never what is opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Final

#: Links in a row that lead to one directory; as the kernel's own limit.
_LINKS_MAX: Final = 40
_HOLD: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_OPENAT2: Final = 437
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08
#: The call is absent, or forbidden, or had a race that it could not judge: ask the other way.
_ASK_AGAIN: Final = (errno.ENOSYS, errno.EPERM, errno.EAGAIN)


class _How(ctypes.Structure):
    """`struct open_how` of openat2(2)."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_beneath(name: str, flags: int, at: int) -> int:
    """A descriptor of the plain name `name` in the directory `at`, no link followed.

    A file that `flags` create has mode 0600. Raises OSError without a name.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    openat2 = _openat2()
    if openat2 is not None:
        code = openat2(at, os.fsencode(name), flags)
        if code >= 0:
            return code
        if -code not in _ASK_AGAIN:
            raise OSError(-code, os.strerror(-code))
    return os.open(name, flags, 0o600, dir_fd=at)


def open_directory(path: str, refusal: Callable[[os.stat_result], str | None]) -> int:
    """A descriptor of the directory at `path`, to read its names.

    A link in its place is followed if `refusal` of the link itself is None, else OSError(EPERM)
    with what it said; links on the way to it are the parents' owners' affair.
    """
    try:
        with ExitStack() as undo:
            return _follow(path, refusal, undo)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _follow(path: str, refusal: Callable[[os.stat_result], str | None], undo: ExitStack) -> int:
    at = None
    for _ in range(_LINKS_MAX):
        parent, name = os.path.split(path.rstrip("/") or "/")
        # Relative to where the link stands; an absolute path starts anew.
        at = os.open(parent or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        undo.callback(os.close, at)
        entry = os.open(name or ".", _HOLD, dir_fd=at)
        undo.callback(os.close, entry)
        status = os.fstat(entry)
        if not stat.S_ISLNK(status.st_mode):
            return os.open(".", _READ, dir_fd=entry)
        reason = refusal(status)
        if reason is not None:
            raise OSError(errno.EPERM, reason)
        path = os.readlink("", dir_fd=entry)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


@lru_cache(maxsize=1)
def _openat2() -> Callable[[int, bytes, int], int] | None:
    """The system call, giving a descriptor or -errno; None where there is none."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    syscall.argtypes = (
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.POINTER(_How),
        ctypes.c_size_t,
    )

    def call(at: int, name: bytes, flags: int) -> int:
        mode = 0o600 if flags & os.O_CREAT else 0  # it refuses a mode that means nothing
        how = _How(flags, mode, _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH)
        while True:
            code = int(syscall(_OPENAT2, at, name, ctypes.byref(how), ctypes.sizeof(how)))
            if code >= 0 or ctypes.get_errno() != errno.EINTR:
                return code if code >= 0 else -ctypes.get_errno()

    return call
