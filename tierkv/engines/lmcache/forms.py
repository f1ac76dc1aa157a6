"""Forms: what gives a chunk's bytes their meaning, and a shelf for each form.

LMCache's key does not say of what shape or type a chunk is, so a server that is started again for
the same model with another dtype or chunk size would be given bytes of the old one. Here the form
is part of the layout: another form is another store, in a directory of its own. A store is opened
when a form is first asked for; it then finds what an earlier process made durable.

Some questions name no form (a delete; a lookup of what LMCache's serde has made bytes of). For them
the forms are remembered in a small file beside the stores. Without it only those questions miss.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from tierkv.config import Config, PagesConfig
from tierkv.core.errors import ConfigError, TierKVError
from tierkv.core.geometry import Form, KVGeometry, Layout
from tierkv.engines.lmcache.shelf import Shelf
from tierkv.engines.options import config_of as options_config

logger = logging.getLogger(__name__)

#: Host memory where `adapter_params` names none.
_HOST: Final = "512MiB"

#: Stores that are open at once: each has host memory and a share of the disk of its own.
FORMS_MAX: Final = 8

#: A store that could not be opened is tried again after this.
_RETRY_S: Final = 30.0

_FILE: Final = "lmcache-forms.json"
_FILE_BYTES_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class ChunkForm:
    """Shapes and dtypes of a chunk's tensors, in order, and the bytes of all of them."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    size_bytes: int

    @property
    def is_serialized(self) -> bool:
        """Whether it is a row of bytes, which LMCache's serde makes of tensors."""
        return self.dtypes == ("uint8",) and [len(shape) for shape in self.shapes] == [1]

    def layout(self, config: Config, version: str) -> Layout:
        """One block of bytes that nothing here looks into. `version`: LMCache's."""
        kind = {"lmcache": version, "shapes": self.shapes, "dtypes": self.dtypes}
        geometry = KVGeometry(
            layers=1, kv_heads=1, head_dim=self.size_bytes, dtype="uint8", form=Form.LATENT
        )
        return Layout(
            geometry=geometry,
            block_tokens=config.block_tokens,
            engine_layout=json.dumps(kind, sort_keys=True),
            targets=config.pages.targets,
        )


class Forms:
    """The shelves by form. Any thread; opening a store is waited for."""

    def __init__(self, config: Config, version: str) -> None:
        self.config = config
        self._version = version
        self._mutex = threading.Lock()
        self._shelves: dict[ChunkForm, Shelf] = {}
        #: Forms without a store: why, and when to try again.
        self._refused: dict[ChunkForm, tuple[str, float]] = {}
        cold = config.tiers.cold
        self._memory = _Memory(cold.directory / _FILE, version) if cold.capacity else None
        self._remembered = self._memory.read() if self._memory else []
        self._is_closed = False

    def shelf(self, form: ChunkForm) -> Shelf | None:
        """The shelf for a form; None where its store cannot be opened, which is logged."""
        shelf = self._shelves.get(form)
        if shelf is not None:
            return shelf
        with self._mutex:
            if self._is_closed:
                return None
            shelf = self._shelves.get(form)
            if shelf is None and self._may_try(form):
                try:
                    shelf = self._shelves[form] = self._open(form)
                    self._refused.pop(form, None)
                except (TierKVError, OSError, MemoryError) as error:
                    self._refused[form] = (str(error), time.monotonic() + _RETRY_S)
                    logger.warning("chunks are not stored form=%s error=%s", form, error)
            return shelf

    def opened(self) -> dict[ChunkForm, Shelf]:
        """The shelves that are open."""
        return dict(self._shelves)

    def serialized(self) -> list[Shelf]:
        """The shelves of chunks that a serde has made bytes of."""
        return self._all([form for form in self._remembered if form.is_serialized])

    def all(self) -> list[Shelf]:
        """The shelves of every form that has ever been seen, as far as they can be opened."""
        self._all(self._remembered)
        return list(self._shelves.values())

    def refused(self) -> dict[ChunkForm, str]:
        """The forms that have no store, and why."""
        return {form: why for form, (why, _) in list(self._refused.items())}

    def close(self) -> None:
        """Close every store; each is made durable first."""
        with self._mutex:
            self._is_closed = True
            shelves = list(self._shelves.values())
            self._shelves.clear()
        for shelf in shelves:
            try:
                shelf.close()
            except TierKVError as error:
                logger.warning("close failed error=%s", error)

    def _all(self, forms: list[ChunkForm]) -> list[Shelf]:
        shelves = [self.shelf(form) for form in list(forms)]
        return [shelf for shelf in shelves if shelf is not None]

    def _may_try(self, form: ChunkForm) -> bool:
        refusal = self._refused.get(form)
        return refusal is None or time.monotonic() >= refusal[1]

    def _open(self, form: ChunkForm) -> Shelf:
        if len(self._shelves) >= FORMS_MAX:
            raise ConfigError(f"{FORMS_MAX} forms of chunk have a store already; no more are kept")
        layout = form.layout(self.config, self._version)
        shelf = Shelf(self.config, layout)
        name = layout.fingerprint.hex()[:16]
        logger.info("store opened form=%s directory=%s chunks=%d", form, name, shelf.chunks)
        if form not in self._remembered:
            self._remembered = [*self._remembered, form]
            if self._memory is not None:
                self._memory.write(self._remembered)
        return shelf


class _Remembered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lmcache: str
    forms: list[ChunkForm]


class _Memory:
    """The file of forms, mode 0600, written whole or not at all. It never raises."""

    def __init__(self, path: Path, version: str) -> None:
        self._path = path
        self._version = version

    def read(self) -> list[ChunkForm]:
        """The forms of this version of LMCache."""
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                found = msgspec.json.decode(file.read(_FILE_BYTES_MAX), type=_Remembered)
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("not read file=%s error=%s", self._path, error)
            return []
        return found.forms if found.lmcache == self._version else []

    def write(self, forms: list[ChunkForm]) -> None:
        """Replace the file."""
        fresh = self._path.with_suffix(".new")
        text = msgspec.json.encode(_Remembered(self._version, forms))
        try:
            with suppress(FileNotFoundError):
                fresh.unlink()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
                file.write(text)
            fresh.replace(self._path)
        except OSError as error:
            logger.warning("not written file=%s error=%s", self._path, error)


def config_of(options: Mapping[str, Any]) -> Config:
    """The configuration in `adapter_params`: a file's, or a few capacities.

    Blocks and pages are the chunks' own. LMCache keeps the first level itself, so little host
    memory is taken here, on the way to the disk. Raises ConfigError, with what is known.
    """
    config = options_config({"host": _HOST, **options}, place="adapter_params", block_tokens=1)
    if config.tiers.device.capacity:
        raise ConfigError("adapter_params: tiers.device.capacity: chunks lie in host memory; set 0")
    pages = PagesConfig(hot=1, warm=1, cold=config.pages.cold)  # a page is one chunk
    return config.model_copy(update={"pages": pages})
