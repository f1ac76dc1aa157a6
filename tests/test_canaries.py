"""The mistakes that tools/canaries.py plants still have their places."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CANARIES = runpy.run_path(str(ROOT / "tools" / "canaries.py"))["CANARIES"]


@pytest.mark.parametrize("canary", CANARIES, ids=lambda one: one.mistake)
def test_the_words_that_a_mistake_replaces_are_there_once(canary: object) -> None:
    file, words, planted = canary.file, canary.words, canary.planted  # type: ignore[attr-defined]
    text = (ROOT / file).read_text()
    assert text.count(words) == 1
    compile(text.replace(words, planted), file, "exec")
