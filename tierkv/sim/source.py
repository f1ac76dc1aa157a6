"""Reading files that others wrote: plain or compressed, a line or a file at a time, with bounds.

A bad line is left out, counted, and named as `file:line: reason`; the first ones are kept. With
`strict` the first one raises ConfigError.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Final

import msgspec
import xxhash

from tierkv.core.errors import ConfigError

LINE_BYTES_MAX: Final = 64 << 20
MEMBER_BYTES_MAX: Final = 256 << 20
MEMBERS_MAX: Final = 100_000
PROBLEMS_KEPT: Final = 20
_WINDOW_BYTES_MAX: Final = 1 << 27
_CHUNK_BYTES: Final = 1 << 20

#: What a line that cannot be used raises while it is decoded or taken.
BAD_LINE: Final = (ValueError, OverflowError, RecursionError, msgspec.MsgspecError)

COMPRESSED: Final = (".zst", ".gz")


class Problems:
    """Bad lines: how many, and the first of them. Single owner."""

    def __init__(self, *, strict: bool = False) -> None:
        self._is_strict = strict
        self.count = 0
        self.first: list[str] = []

    def add(self, place: str, line: int, reason: str) -> None:
        """One line that is left out. Raises ConfigError if that is not wanted."""
        text = f"{place}:{line}: {reason}"
        if self._is_strict:
            raise ConfigError(text)
        self.count += 1
        if len(self.first) < PROBLEMS_KEPT:
            self.first.append(text)


def plain_name(path: Path) -> str:
    """The file's name without what says how it is compressed."""
    return path.stem if path.suffix in COMPRESSED else path.name


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed by what its name says.

    Raises ConfigError for what cannot be read, also while it is read in the `with`.
    """
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield stream  # type: ignore[misc]
            elif path.suffix == ".zst":
                zstandard = needed("zstandard")
                reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
                with reader.stream_reader(raw, read_across_frames=True) as frames:
                    yield io.BufferedReader(frames, _CHUNK_BYTES)
            else:
                yield raw
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # its module may not be there
            raise
        raise ConfigError(f"{path}: {error}") from None


def lines(path: Path, problems: Problems) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, each with its number from 1 and without its end."""
    with opened(path) as stream:
        number = 0
        while line := stream.readline(LINE_BYTES_MAX + 1):
            number += 1
            if len(line) > LINE_BYTES_MAX:
                problems.add(path.name, number, f"longer than {LINE_BYTES_MAX} bytes")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LINE_BYTES_MAX)
                continue
            line = line.strip()
            if line:
                yield number, line


def documents(path: Path, suffix: str, problems: Problems) -> Iterator[tuple[str, bytes]]:
    """Whole files by name: of a directory, of a tar archive, or the one file itself."""
    if path.is_dir():
        for file in sorted(path.rglob(f"*{suffix}*")):
            if file.is_file() and plain_name(file).endswith(suffix):
                yield from _document(file, problems)
    elif plain_name(path).endswith(".tar"):
        with opened(path) as stream:
            yield from _members(path, stream, suffix, problems)
    else:
        yield from _document(path, problems)


def _document(file: Path, problems: Problems) -> Iterator[tuple[str, bytes]]:
    with opened(file) as stream:
        data = stream.read(MEMBER_BYTES_MAX + 1)
    if len(data) > MEMBER_BYTES_MAX:
        problems.add(file.name, 1, f"more than {MEMBER_BYTES_MAX} bytes")
    else:
        yield file.name, data


def _members(
    path: Path, stream: IO[bytes], suffix: str, problems: Problems
) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for count, member in enumerate(archive):
            if count >= MEMBERS_MAX:
                raise ConfigError(f"{path}: more than {MEMBERS_MAX} files")
            name = Path(member.name).name
            if not member.isreg() or not name.endswith(suffix):
                continue
            if member.size > MEMBER_BYTES_MAX:
                problems.add(name, 1, f"more than {MEMBER_BYTES_MAX} bytes")
            elif (file := archive.extractfile(member)) is not None:
                yield name, file.read()


def digest_of(path: Path) -> str:
    """xxh3-128 of a file as it lies there, or of all files of a directory with their names."""
    digest = xxhash.xxh3_128()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    try:
        for file in files:
            if path.is_dir():
                if file.name.startswith("."):
                    continue
                digest.update(file.relative_to(path).as_posix().encode() + b"\0")
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None
    return digest.hexdigest()


def needed(module: str) -> ModuleType:
    """A module of the extra `sim`. Raises ConfigError with the cure where it is absent."""
    try:
        if module == "zstandard":
            import zstandard

            return zstandard
        import polars as pl

        return pl
    except ImportError:
        cure = "pip install 'tierkv-offload[sim]'"
        raise ConfigError(f"this needs the package {module}: {cure}") from None
