"""transformers lives by the contract of every engine, on a small model of random weights.

A life begins as a fork of a process that has torch and transformers already, which take seconds to
import; it is a process of its own all the same, with its own model and store.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.forked_life import in_a_fork
from tierkv.testing.engines import EngineTests
from tierkv.testing.life import Life

ROOT = Path(__file__).parents[1]
IMPORTED = ["tierkv.engines.transformers", "transformers.models.llama.modeling_llama"]


@pytest.fixture(autouse=True, scope="module")
def _where_forks_begin() -> Iterator[None]:
    """One thread, and our modules to import, whatever directory the tests are run from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield


class Forked:
    """As much of `subprocess.Popen` as lives are driven with."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self._process.start()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a life", timeout or 0)
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()


class TestTransformers(EngineTests):
    """A token of this model takes 1 KiB, a document 640 KiB."""

    vocabulary = 1000
    small_host = "1MiB"

    @property
    def program(self) -> Sequence[str | Path]:
        return [sys.executable, ROOT / "tools" / "transformers_life.py"]

    def started(self, place: Path, life: Life) -> Forked:
        (place / "order.json").write_bytes(msgspec.json.encode(life))
        (place / "answer.json").unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        arguments = [str(place / name) for name in ("order.json", "answer.json")]
        return Forked(
            context.Process(
                target=in_a_fork, args=(str(self.program[1]), arguments, str(place / "log"))
            )
        )
