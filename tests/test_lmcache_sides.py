"""The parts of LMCache's adapter that need no LMCache: shelves, forms and lanes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tierkv.core.errors import ConfigError
from tierkv.engines.lmcache.forms import ChunkForm, Forms, config_of
from tierkv.engines.lmcache.lanes import Lane
from tierkv.engines.lmcache.shelf import Shelf
from tierkv.memory import Bytes

FORM = ChunkForm(((2, 3, 8, 64),), ("float32",), 12288)


@dataclass(frozen=True)
class Key:
    chunk_hash: bytes
    model_name: str = "org/model"
    kv_rank: int = 1 << 24
    object_group_id: int = 0
    cache_salt: str = ""


def data(seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, FORM.size_bytes, np.uint8)


@pytest.fixture
def forms(tmp_path: Path) -> Iterator[Forms]:
    found = opened(tmp_path)
    yield found
    found.close()


def opened(place: Path, *, version: str = "0.5.6", **more: str) -> Forms:
    options = {"host": "128KiB", "cold": "4MiB", "directory": str(place / "kv"), **more}
    return Forms(config_of(options), version)


def shelf_of(forms: Forms) -> Shelf:
    found = forms.shelf(FORM)
    assert found is not None
    return found


def got(shelf: Shelf, key: Key) -> bytes | None:
    out = np.zeros(FORM.size_bytes, np.uint8)
    return out.tobytes() if shelf.get(key, out) else None


def test_each_part_of_lmcache_s_key_tells_chunks_apart(forms: Forms) -> None:
    shelf, key = shelf_of(forms), Key(b"a" * 32)
    others = [
        replace(key, chunk_hash=b"b" * 32),
        replace(key, model_name="org/mode", kv_rank=10 * key.kv_rank),
        replace(key, kv_rank=2 << 24),
        replace(key, object_group_id=1),
        replace(key, cache_salt="alice"),
        replace(key, cache_salt="default"),
    ]
    assert shelf.put(key, data(1)) == FORM.size_bytes
    assert not any(shelf.holds(other) for other in others)
    for number, other in enumerate(others, 2):
        assert shelf.put(other, data(number)) == FORM.size_bytes
    assert [got(shelf, one) for one in [key, *others]] == [data(n).tobytes() for n in range(1, 8)]


def test_a_chunk_that_is_known_keeps_its_bytes_until_it_is_deleted(forms: Forms) -> None:
    shelf, key = shelf_of(forms), Key(b"a" * 32)
    assert shelf.put(key, data(1)) == FORM.size_bytes
    assert shelf.put(key, data(2)) == 0
    assert got(shelf, key) == data(1).tobytes()
    assert shelf.flush()
    assert shelf.delete(key)
    assert not shelf.delete(key)
    assert shelf.put(key, data(2)) == FORM.size_bytes
    assert got(shelf, key) == data(2).tobytes()


def test_forms_and_what_they_hold_are_found_again_and_another_version_s_are_not(
    tmp_path: Path,
) -> None:
    first = opened(tmp_path)
    shelf_of(first).put(Key(b"a" * 32), data(1))
    first.close()
    again = opened(tmp_path)
    assert [got(shelf, Key(b"a" * 32)) for shelf in again.all()] == [data(1).tobytes()]
    assert again.shelf(FORM) is again.all()[0]
    again.close()
    assert again.shelf(FORM) is None
    other = opened(tmp_path, version="0.5.7")
    assert other.all() == []
    assert not shelf_of(other).holds(Key(b"a" * 32))
    other.close()


@pytest.mark.parametrize("text", ["", "{}", '{"lmcache": 5, "forms": []}', '{"forms": [{}]}', "\0"])
def test_a_damaged_file_of_forms_costs_nothing_but_what_it_remembers(
    tmp_path: Path, text: str
) -> None:
    first = opened(tmp_path)
    shelf_of(first).put(Key(b"a" * 32), data(1))
    first.close()
    file = tmp_path / "kv" / "lmcache-forms.json"
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text(text)
    again = opened(tmp_path)
    assert again.all() == []
    assert shelf_of(again).holds(Key(b"a" * 32))
    again.close()
    assert len(opened(tmp_path).all()) == 1


def test_a_file_of_forms_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o700)
    (tmp_path / "mine").write_text("text")
    (tmp_path / "kv" / "lmcache-forms.json").symlink_to(tmp_path / "mine")
    forms = opened(tmp_path)
    assert shelf_of(forms).put(Key(b"a" * 32), data(1))
    forms.close()
    assert (tmp_path / "mine").read_text() == "text"


def test_without_a_directory_chunks_are_in_memory_only(tmp_path: Path) -> None:
    forms = Forms(config_of({"host": "128KiB"}), "0.5.6")
    shelf = shelf_of(forms)
    assert shelf.put(Key(b"a" * 32), data(1)) == FORM.size_bytes
    assert shelf.used_bytes == FORM.size_bytes
    forms.close()
    assert list(tmp_path.iterdir()) == []


def test_a_device_tier_and_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown hots; known: config, host, cold, directory"):
        config_of({"hots": 1})
    file = tmp_path / "tierkv.yaml"
    file.write_text("tiers: {device: {device: cpu, capacity: 1MiB}}\n")
    with pytest.raises(ConfigError, match="device"):
        config_of({"config": file})


class Pipe:
    """A notifier as LMCache's."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def fileno(self) -> int:
        return self._read

    def notify(self) -> None:
        os.write(self._write, b"1")

    def wait(self) -> None:
        os.read(self._read, 1)

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def test_a_task_that_raises_gives_the_result_that_says_so(quiet: None) -> None:
    pipe = Pipe()
    lane: Lane[str] = Lane("test", pipe)
    task = lane.submit(lambda: str(1 // 0), "failed")
    pipe.wait()
    assert lane.take(task) == "failed"
    assert lane.take(task) is None
    both = lane.submit_each([lambda: True, lambda: bool(1 // 0)], str)
    pipe.wait()
    assert lane.take_all() == {both: "[True, False]"}
    lane.close()


def test_what_has_not_begun_when_a_lane_stops_never_does() -> None:
    pipe, gate, begun = Pipe(), threading.Event(), threading.Event()
    lane: Lane[bool] = Lane("test", pipe)

    def first() -> bool:
        begun.set()
        return gate.wait(10)

    one, two = lane.submit(first, False), lane.submit(lambda: True, False)
    begun.wait(10)
    stopping = threading.Thread(target=lane.stop)
    stopping.start()
    gate.set()
    stopping.join()
    assert lane.take(one)
    late = lane.submit(lambda: True, False)
    assert lane.take(late) is None
    assert late > two
    lane.close()
