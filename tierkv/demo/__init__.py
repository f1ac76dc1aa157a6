"""The demo: a long document, a real model, and what each tier saves."""

from __future__ import annotations

from pathlib import Path


def run(*, json_path: Path | None, quick: bool, directory: Path | None) -> int:
    """Play the demo on this machine; 0 if every promise was kept, 1 if not.

    `json_path` gets every figure; `quick` takes a shorter document; `directory` keeps the cold
    tier for the next run. Raises ConfigError where the demo cannot start, naming the cure.
    """
    from tierkv.demo.play import play

    return play(json_path=json_path, quick=quick, directory=directory)
