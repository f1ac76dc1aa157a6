"""`TierKVStorage` under SGLang's own controller, a life at a time: see `tools/sglang_life.py`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tierkv.testing.engines import EngineDriver, EngineTests, reused_of

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("TIERKV_SGLANG_PYTHON", str(ROOT / ".venv-sglang" / "bin" / "python"))


class OfSGLang(EngineDriver):
    """Lives of SGLang's controller."""

    small_host = "16MiB"

    @property
    def program(self) -> Sequence[str | Path]:
        return [PYTHON, ROOT / "tools" / "sglang_life.py"]


class TestSGLang(OfSGLang, EngineTests):
    """All promises, by pointers into a pool that has its pages one by one."""


class TestSGLangByTensors(OfSGLang):
    """The interface without pointers, and a pool that has its pages in layers."""

    settings = {"interface_v1": 0, "layout": "layer_first"}  # noqa: RUF012 as in the base class

    def test_documents_come_back_from_the_disk_in_one_life_and_the_next(self, place: Path) -> None:
        turns = [[self.ask(n, 0)] for n in range(3)] + [[self.ask(n, 1)] for n in range(3)]
        life = self.life(place, *turns, host=self.small_host)
        assert reused_of(self.check(place, life))[3:] == [[self.whole]] * 3
        assert reused_of(self.check(place, life)) == [[self.whole]] * 6
