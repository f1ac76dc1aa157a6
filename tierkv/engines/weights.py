"""Weights: what tells a checkpoint from another of the same name and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import xxhash

#: Weights up to this size are read whole to know them; of larger files parts are.
_WHOLE_BYTES: Final = 1 << 30
_PART_BYTES: Final = 1 << 20
_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
_CONFIGS: Final = ("config.json", "adapter_config.json")


def weights_identity(place: Path, *, more: str = "") -> str:
    """A hash over a checkpoint's files: its weights and its configuration.

    `place` is the directory, or a single file; `more` goes into the hash, as how the engine
    quantises what it loads. Raises OSError for what cannot be read.
    """
    hasher = xxhash.xxh3_128(more.encode())
    files = [place] if place.is_file() else sorted(place.iterdir())
    for path in files:
        if path == place or path.suffix in _SUFFIXES or path.name in _CONFIGS:
            hasher.update(f"{path.name} {path.stat().st_size}\n".encode())
            for part in _parts(path):
                hasher.update(part)
    return hasher.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    """A file, or of a large one its time of change and pieces from all over."""
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= _WHOLE_BYTES:
            while part := file.read(16 * _PART_BYTES):
                yield part
            return
        yield str(status.st_mtime_ns).encode()
        for number in range(64):
            file.seek(number * (status.st_size - _PART_BYTES) // 63)
            yield file.read(_PART_BYTES)
