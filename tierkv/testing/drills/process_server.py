"""The fork server of the drill `processes`: one thread, everything imported, a child for each life.

It is a program of its own, started once a run, as a process with other threads (a test's) must not
fork. It takes one order at a time from a socket, gives back the child's pidfd and, when the child
has ended, its status. Disks for a case are mounted in a mount namespace of its own: nobody else
sees them, and they go when it does.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from tierkv.core.errors import TierKVError
from tierkv.store import Store
from tierkv.testing.drills.process_child import (
    Book,
    Journal,
    Life,
    Task,
    config_of,
    layout_of,
    live,
)
from tierkv.testing.drills.process_look import look

_MESSAGE_BYTES_MAX: Final = 1 << 20
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_MNT_DETACH: Final = 2
_PR_SET_PTRACER, _PR_SET_PDEATHSIG, _ANY = 0x59616D61, 1, -1


class Order(msgspec.Struct, frozen=True):
    """What the server is to do: have a child live, or look at what a life left."""

    task: Task
    #: The file of the journal's book; None: a life.
    book: str | None = None
    #: Where stacks are written to when it hangs.
    stacks: str = os.devnull


class Mount(msgspec.Struct, frozen=True):
    """A memory disk of so many bytes on a directory; 0: away with it."""

    directory: str
    size_bytes: int


class Server:
    """The server's process, as the drill has it. A context manager; one thread."""

    def __init__(self, plant: str = "") -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = here
        with there:
            arguments = [sys.executable, "-m", __name__, str(there.fileno()), plant]
            self._runtime = tempfile.TemporaryDirectory(prefix="tierkv-runtime-")
            # Stores that are killed leave their status files there.
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where plants are found too
                "XDG_RUNTIME_DIR": self._runtime.name,
            }
            self._process = subprocess.Popen(
                arguments, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, env=environment
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._process.wait()
        self._runtime.cleanup()

    def begin(self, order: Order) -> tuple[int, int, socket.socket]:
        """Have a child begin; gives its pid, its pidfd, and the other end of its journal.

        It waits for a first message there, so that a tracer can take hold of it.
        """
        journal, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            socket.send_fds(self._socket, [msgspec.json.encode(order)], [its.fileno()])
        answer, fds, _, _ = socket.recv_fds(self._socket, 64, 1)
        if not fds:
            journal.close()
            raise RuntimeError("the fork server has ended")
        return msgspec.json.decode(answer, type=int), fds[0], journal

    def status(self, timeout_s: float) -> int:
        """How the child ended, as `os.waitstatus_to_exitcode`. TimeoutError."""
        self._socket.settimeout(timeout_s)
        try:
            return msgspec.json.decode(self._socket.recv(64), type=int)
        finally:
            self._socket.settimeout(None)

    def mount(self, directory: Path, size_bytes: int) -> str:
        """Mount a memory disk, with 0 bytes unmount it; gives why it cannot, or nothing."""
        self._socket.send(msgspec.json.encode(Mount(str(directory), size_bytes)))
        return self._socket.recv(_MESSAGE_BYTES_MAX).decode()


def main() -> None:
    """Serve until the drill hangs up."""
    control = socket.socket(fileno=int(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="tierkv-processes-") as top:
        _warm_up(Path(top))
    _plant(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    is_apart = False
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES_MAX, 1)
        except ConnectionResetError:  # it hung up on an answer
            return
        if not message:
            return
        if not fds:
            mount = msgspec.json.decode(message, type=Mount)
            reason = "" if is_apart else _leave(libc)
            is_apart = not reason
            control.send((reason or _mount(libc, mount)).encode())
            continue
        order = msgspec.json.decode(message, type=Order)
        pid = os.fork()
        if not pid:
            control.close()
            _child(libc, order, socket.socket(fileno=fds[0]))
        os.close(fds[0])
        fd = os.pidfd_open(pid)
        socket.send_fds(control, [msgspec.json.encode(pid)], [fd])
        os.close(fd)
        status = os.waitpid(pid, 0)[1]
        control.send(msgspec.json.encode(os.waitstatus_to_exitcode(status)))


def _plant(plant: str) -> None:
    """Make a mistake on purpose: `module:function`, for tests of the drill."""
    if plant:
        module, _, function = plant.partition(":")
        getattr(importlib.import_module(module), function)()


def _warm_up(top: Path) -> None:
    """Live a little, so that children have nothing left to import or to compile."""
    importlib.import_module("tierkv.testing.drills.process_memory")
    for engine in ("direct", "portable"):
        task = Task(str(top), 0, engine=engine)
        config = config_of(task)
        life = Life(task, Journal(lambda _word: None))
        try:
            life.store = Store.open(config, layout_of(config))
        except TierKVError:
            continue  # this engine does not work here
        life.put([1, 2, 3], "default")
        life.flush()
        life.get([1, 2, 3], "default")
        life.reopen()
        life.store.close()


def _child(libc: ctypes.CDLL, order: Order, journal: socket.socket) -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(_ANY))  # where only parents may trace
    stacks = os.open(order.stacks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(stacks, sys.stderr.fileno())  # where an interpreter that aborts says why
    os.close(stacks)
    faulthandler.register(signal.SIGUSR1)
    journal.recv(1)
    if order.book is None:
        live(order.task, journal.send)
    else:
        book = msgspec.json.decode(Path(order.book).read_bytes(), type=Book)
        look(order.task, book, journal.send)


def _leave(libc: ctypes.CDLL) -> str:
    """Go to a mount namespace of our own; gives why that is impossible, or nothing."""
    user, group = os.getuid(), os.getgid()
    flags = _CLONE_NEWNS | (0 if user == 0 else _CLONE_NEWUSER)
    if libc.unshare(flags):
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        return f"no private mounts: {os.strerror(ctypes.get_errno())}"
    return ""


def _mount(libc: ctypes.CDLL, mount: Mount) -> str:
    place = os.fsencode(mount.directory)
    if mount.size_bytes:
        options = f"size={mount.size_bytes},mode=0700".encode()
        failed = libc.mount(b"tmpfs", place, b"tmpfs", 0, options)
    else:
        failed = libc.umount2(place, _MNT_DETACH)
    return f"no memory disk: {os.strerror(ctypes.get_errno())}" if failed else ""


if __name__ == "__main__":
    main()
