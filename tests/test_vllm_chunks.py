"""Chunks of vLLM's own offloading over a store, without vLLM. tests/test_vllm_hooks.py has it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tierkv.config import Config
from tierkv.core.geometry import KIB
from tierkv.engines.vllm.chunks import Chunks, Ended, Rows, chunk_layout
from tierkv.store import Store

BYTES = 12 * KIB


def opened(
    directory: Path,
    *,
    host: str = "64KiB",
    cold: str = "4MiB",
    revision: str = "1",
    demand_deadline_ms: int = 10_000,
) -> Chunks:
    config = Config.model_validate(
        {
            "block_tokens": 1,
            "transfer": {"demand_deadline_ms": demand_deadline_ms},
            "pages": {"hot": "4KiB", "warm": "16KiB", "cold": "64KiB"},
            "tiers": {
                "device": {"device": "cpu"},
                "host": {"capacity": host},
                "cold": {"capacity": cold, "directory": str(directory), "segment_cold_pages": 4},
            },
        }
    )
    layout = chunk_layout(BYTES, targets=config.pages.targets, model="m", revision=revision)
    return Chunks(Store.open(config, layout))


@pytest.fixture
def chunks(tmp_path: Path) -> Iterator[Chunks]:
    made = opened(tmp_path)
    yield made
    made.close()


def names(count: int, *, first: int = 0) -> list[bytes]:
    return [number.to_bytes(36, "big") for number in range(first, first + count)]


def rows(count: int, *, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).integers(0, 256, (count, BYTES), dtype=np.uint8)


def all_of(chunks: Chunks, count: int = 1) -> list[Ended]:
    """The next jobs to end."""
    found: list[Ended] = []
    ends = time.monotonic() + 30
    while len(found) < count:
        assert time.monotonic() < ends
        found += chunks.ended()
        chunks.step()
        time.sleep(0.001)
    return found


def stored(chunks: Chunks, data: Rows, *, first: int = 0) -> None:
    chunks.save(0, names(len(data), first=first), list(data))
    (ended,) = all_of(chunks)
    assert (ended.job, ended.is_load, ended.moved) == (0, False, [True] * len(data))


def test_chunks_come_back_in_any_order_and_number(chunks: Chunks) -> None:
    data = rows(20)
    stored(chunks, data)
    order = np.random.default_rng(1).permutation(20)
    out = np.zeros_like(data)
    chunks.load(1, [names(20)[n] for n in order], [out[n] for n in order])
    chunks.load(2, [names(20)[7]], [out[7]])
    assert sorted((one.job, all(one.moved)) for one in all_of(chunks, 2)) == [(1, True), (2, True)]
    assert np.array_equal(out, data)


def test_more_than_host_memory_holds_comes_from_the_disk_also_after_a_restart(
    tmp_path: Path,
) -> None:
    data = rows(40)
    first = opened(tmp_path)
    stored(first, data)
    first.close()
    again = opened(tmp_path)
    assert all(again.has(name) for name in names(40))
    out = np.zeros_like(data)
    again.load(1, names(40), list(out))
    assert all_of(again)[0].moved == [True] * 40
    assert np.array_equal(out, data)
    again.close()


def test_another_revision_shares_nothing(tmp_path: Path) -> None:
    first = opened(tmp_path)
    stored(first, rows(2))
    first.close()
    other = opened(tmp_path, revision="2")
    assert not other.has(names(1)[0])
    other.close()


def test_what_is_not_there_is_told_chunk_by_chunk(chunks: Chunks) -> None:
    data = rows(3)
    stored(chunks, data)
    out = np.zeros((4, BYTES), np.uint8)
    chunks.load(1, [*names(1), b"unknown", *names(2, first=1)], list(out))
    assert all_of(chunks)[0].moved == [True, False, True, True]
    assert np.array_equal(out[[0, 2, 3]], data)
    assert not chunks.has(b"unknown")


def test_a_stored_chunk_is_not_replaced(chunks: Chunks) -> None:
    data = rows(1)
    stored(chunks, data)
    stored(chunks, rows(1, seed=9))
    out = np.zeros_like(data)
    chunks.load(1, names(1), list(out))
    all_of(chunks)
    assert np.array_equal(out, data)


def test_a_full_tier_gives_up_old_chunks_and_never_the_wrong_bytes(tmp_path: Path) -> None:
    chunks = opened(tmp_path, cold="512KiB")
    data = rows(100)
    for first in range(0, 100, 10):
        chunks.save(first, names(10, first=first), list(data[first : first + 10]))
        all_of(chunks)
    kept = [number for number in range(100) if chunks.has(names(100)[number])]
    assert 0 < len(kept) < 100
    out = np.zeros_like(data)
    chunks.load(1, [names(100)[n] for n in kept], [out[n] for n in kept])
    moved = all_of(chunks)[0].moved
    for number, is_moved in zip(kept, moved, strict=True):
        assert not is_moved or np.array_equal(out[number], data[number])
    assert any(moved)
    chunks.close()


def slow(row: Rows, gate: threading.Event) -> Rows:
    """A row that is there when the gate is open: what is copied from it waits for that."""

    class Slow(np.ndarray):
        def __getitem__(self, key: object) -> object:
            assert gate.wait(30)
            return super().__getitem__(key)

    return row.view(Slow)


def test_the_caller_waits_for_nothing_but_drain(chunks: Chunks) -> None:
    data, gate = rows(2), threading.Event()
    chunks.save(1, names(2), [slow(row, gate) for row in data])
    assert chunks.ended() == []
    assert not chunks.has(names(1)[0])
    gate.set()
    chunks.drain()
    (ended,) = chunks.ended()
    assert ended.moved == [True, True]
    assert ended.seconds >= 0


def test_a_load_never_waits_for_a_store(chunks: Chunks) -> None:
    data, gate = rows(2), threading.Event()
    stored(chunks, data[:1])

    chunks.save(5, names(1, first=1), [slow(data[1], gate)])
    out = np.zeros_like(data)
    chunks.load(6, names(1), [out[0]])
    assert all_of(chunks)[0].job == 6
    gate.set()
    assert all_of(chunks)[0].job == 5


def test_a_row_of_the_wrong_size_is_a_chunk_less_and_no_exception(chunks: Chunks) -> None:
    chunks.save(1, names(1), [np.zeros(BYTES - 1, np.uint8)])
    assert all_of(chunks)[0].moved == [False]
    stored(chunks, rows(1))


def test_a_load_that_takes_too_long_brings_what_came_in_time(tmp_path: Path) -> None:
    made = opened(tmp_path, demand_deadline_ms=30)
    data, gate = rows(3), threading.Event()
    stored(made, data)
    out, late = np.zeros_like(data), threading.Timer(0.2, gate.set)
    late.start()
    made.load(1, names(3), [slow(out[0], gate), out[1], out[2]])
    assert all_of(made)[0].moved == [True, False, False]
    assert np.array_equal(out[0], data[0])
    late.join()
    made.close()
