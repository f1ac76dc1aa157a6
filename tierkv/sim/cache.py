"""Traces kept as arrays beside what they were read from, so that a second look takes no reading.

File: ``magic (8) | header bytes (u32) | xxh3-64 of the header (u64) | header | arrays``, all
little-endian. The header is JSON: key, name, block_tokens, facts, and for each array its offset
(a multiple of 64), its bytes and its xxh3-64. The key is a hash of the content that was read, of
the format with its version and of its settings; it is in the file's name. Written to a temporary
name and renamed. A damaged file is not used, and replaced: it only saves time.

Small traces are read as fast as this, and nothing is kept of them.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from tierkv.sim.trace import ARRAYS, Trace, TraceFacts

logger = logging.getLogger(__name__)

KEPT_REFERENCES_MIN: Final = 100_000
#: Readings of one path, each with other settings, of which the arrays are kept; the oldest go.
KEPT_FILES_MAX: Final = 8

_MAGIC: Final = b"tierkvT\x01"
_HEAD: Final = struct.Struct("<8sIQ")
_HEADER_BYTES_MAX: Final = 1 << 20
_ALIGN: Final = 64
_KEY_CHARS: Final = 16


class _Place(msgspec.Struct, frozen=True):
    offset: int
    bytes: int
    digest: int


class _Header(msgspec.Struct, frozen=True):
    key: str
    name: str
    block_tokens: int
    facts: TraceFacts
    arrays: dict[str, _Place]


class TraceCache:
    """Where the arrays of one reading of one path are kept. Single owner."""

    def __init__(self, path: Path, key: str) -> None:
        self._key = key
        name = f".{path.name}.{key[:_KEY_CHARS]}.arrays"
        shared = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        self._places = [Path(shared) / "tierkv" / "traces" / name]
        if _is_for_writing(path.parent):
            self._places.insert(0, path.parent / name)

    def load(self) -> Trace | None:
        """The trace as it was kept; None if it was not, or if what is there is damaged."""
        for place in self._places:
            try:
                with place.open("rb") as stream:
                    return self._read(stream)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                logger.warning("trace cache not used path=%s error=%s", place, error)
        return None

    def save(self, trace: Trace) -> Path | None:
        """Keep a trace; the file, or None where neither place can be written."""
        for place in self._places:
            partial = place.with_name(f"{place.name}.{os.getpid()}.tmp")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as stream:
                    for part in self._parts(trace):
                        stream.write(part)
                partial.replace(place)
            except OSError as error:
                logger.info("trace cache not written path=%s error=%s", place, error)
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
            else:
                _drop_oldest(place)
                return place
        return None

    def _parts(self, trace: Trace) -> Iterator[bytes | memoryview]:
        arrays = {name: np.ascontiguousarray(getattr(trace, name)) for name in ARRAYS}
        places: dict[str, _Place] = {}
        offset = 0
        for name, array in arrays.items():
            places[name] = _Place(offset, array.nbytes, xxhash.xxh3_64_intdigest(array.data))
            offset += -(-array.nbytes // _ALIGN) * _ALIGN
        header = msgspec.json.encode(
            _Header(self._key, trace.name, trace.block_tokens, trace.facts, places)
        )
        yield _HEAD.pack(_MAGIC, len(header), xxhash.xxh3_64_intdigest(header))
        yield header
        yield bytes(-(_HEAD.size + len(header)) % _ALIGN)
        for array in arrays.values():
            yield array.data.cast("B") if array.nbytes else b""
            yield bytes(-array.nbytes % _ALIGN)

    def _read(self, stream: IO[bytes]) -> Trace:
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise ValueError("too short")
        magic, length, digest = _HEAD.unpack(head)
        if magic != _MAGIC or length > _HEADER_BYTES_MAX:
            raise ValueError("not a cached trace of this version")
        raw = stream.read(length)
        if xxhash.xxh3_64_intdigest(raw) != digest:
            raise ValueError("the header is damaged")
        header = msgspec.json.decode(raw, type=_Header)
        if header.key != self._key or set(header.arrays) != set(ARRAYS):
            raise ValueError("of another trace")
        start = -(-(_HEAD.size + length) // _ALIGN) * _ALIGN
        size = stream.seek(0, os.SEEK_END)
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, kind in ARRAYS.items():
            place = header.arrays[name]
            if not 0 <= place.offset <= place.offset + place.bytes <= size - start:
                raise ValueError(f"{name} is cut off")
            stream.seek(start + place.offset)
            array = np.fromfile(stream, dtype="u1", count=place.bytes)
            if xxhash.xxh3_64_intdigest(array.data) != place.digest:
                raise ValueError(f"{name} is damaged")
            arrays[name] = array.view(kind)
        trace = Trace(
            header.name,
            header.block_tokens,
            **arrays,  # type: ignore[arg-type]
            facts=header.facts,
        )
        trace.check()
        return trace


def _drop_oldest(place: Path) -> None:
    """Keep only the newest files of the path that `place` is of."""
    stem = place.name.removesuffix(".arrays")[: -(_KEY_CHARS + 1)]
    ours = re.compile(re.escape(stem) + rf"\.[0-9a-f]{{{_KEY_CHARS}}}\.arrays")
    with suppress(OSError):
        files = [file for file in place.parent.iterdir() if ours.fullmatch(file.name)]
        files.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for file in files[KEPT_FILES_MAX:]:
            file.unlink(missing_ok=True)


def _is_for_writing(folder: Path) -> bool:
    # A folder that its owner made read-only is left as it is, also by root.
    try:
        return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)
    except OSError:
        return False


def cache_key(*words: str) -> str:
    """One hash of all that decides what a reading gives."""
    return xxhash.xxh3_128_hexdigest("\0".join(words).encode())
