"""Speed of the store, as ratios to a raw baseline interleaved with it in the same loop.

    python tools/bench_store.py [--quick] [--json FILE] [--check] [--rows host,cold,...]
                                [--directory DIR] [--peer lmcache]

Every figure is ``raw / tierkv`` (1.00 is as fast as raw, more is faster): the median over batches
of the ratio of two adjacent batches, whose order alternates. CPU is ours / raw, process time over
the same batches. Raw is numpy `copyto` of whole blocks in memory, and on disk one file per 2 MiB
chunk by O_DIRECT with 4 threads. `--check` exits 1 and names the rows below their reach.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
from measuring import (
    Bytes,
    Pairs,
    RawFiles,
    Row,
    aligned,
    best_of,
    copy_each,
    options_of,
    report,
    scratch,
)
from peer_lmcache import peer_rows

from tierkv.assembly import assemble
from tierkv.config import Config
from tierkv.core.geometry import MIB, KVGeometry, Layout
from tierkv.core.keys import BlockKey
from tierkv.core.tier import BlockLabel, PageLabel, TierId
from tierkv.core.transfer import Move, Outcome, Transfer, Urgency
from tierkv.store import Store

LLAMA_8B = KVGeometry(layers=32, kv_heads=8, head_dim=128)  # 16 tokens are a block of 2 MiB
FALCON_7B = KVGeometry(layers=32, kv_heads=1, head_dim=64)  # 8 tokens are a block of 64 KiB


def main() -> int:
    """Run the chosen rows; see the module."""
    parser = options_of(__doc__.splitlines()[0], "host,latency,lookup,packing,cold")
    parser.add_argument("--peer", choices=["lmcache"], help="measure a peer, in its own venv")
    options = parser.parse_args()
    scale = 0.1 if options.quick else 1.0
    gc.collect()
    gc.freeze()  # a collection of what is loaded would count as CPU of whoever runs then
    rows: list[Row] = []
    wanted: list[str] = options.rows
    if "host" in wanted:
        rows += host_rows("2 MiB pages", LLAMA_8B, 16, 16, scale, (0.97, 0.97), 1.05)
        rows += host_rows("64 KiB blocks", FALCON_7B, 8, 64, scale, (0.85, 0.85))
    if "latency" in wanted:
        rows += latency_rows(scale)
    if "lookup" in wanted:
        rows += lookup_rows()
    if "packing" in wanted:
        rows += packing_rows()
    if "cold" in wanted:
        with scratch(options.directory) as directory:
            rows += cold_rows(Path(directory), scale)
    if options.peer:
        with scratch(options.directory) as directory:
            rows += peer_rows(scale, Path(directory))
    return report(rows, options, "tierkv store, against raw in the same run")


# ---- memory


def host_rows(
    name: str,
    geometry: KVGeometry,
    block_tokens: int,
    batch: int,
    scale: float,
    reach: tuple[float, float],
    cpu_reach: float | None = None,
) -> list[Row]:
    """Put and get in batches, in an arena that is full (each put evicts), against memcpy."""
    layout = layout_of(geometry, block_tokens)
    block_bytes = layout.pages.block_bytes
    capacity = int(1024 * MIB * max(scale, 0.25))
    batches = capacity // block_bytes // batch
    raw_source, source = rows_array(layout, batch * 4)
    raw_target, target = rows_array(layout, batch * 4)
    arena = aligned(batches * batch * block_bytes).reshape(-1, block_bytes)
    put, get = Pairs(), Pairs()
    with open_store(layout, host=capacity) as store:
        for turn in range(4):
            chains: list[list[BlockKey]] = []
            for n in range(batches):
                # As in an engine, which has just looked these keys up and missed.
                keys = keys_of(store, turn * batches + n, batch)
                assert not store.match_keys(keys).blocks
                chains.append(keys)
                at = n % 4 * batch
                data = source[:, at : at + batch]
                pair = (
                    partial(store.put_keys, keys, data),
                    partial(copy_each, arena[n * batch :], raw_source[at:], batch),
                )
                (put if turn else Pairs()).time(*pair)
            for n in np.random.default_rng(turn).permutation(batches):
                at = int(n) % 4 * batch
                match = store.match_keys(chains[n])
                if match.blocks < batch:
                    continue
                out = target[:, at : at + batch]
                pair = (
                    partial(store.get, match, out),
                    partial(copy_each, raw_target[at:], arena[n * batch :], batch),
                )
                (get if turn else Pairs()).time(*pair)
    note = f"{batch * block_bytes / np.median(put.raw) / 1e9:.1f} GB/s raw"
    return [
        Row(f"host put, {name}", put.ratio, reach[0], note=note),
        Row(f"host get, {name}", get.ratio, reach[1]),
        Row(f"host put, {name}, CPU", put.cpu, cpu_reach, False),
        Row(f"host get, {name}, CPU", get.cpu, cpu_reach, False),
    ]


def latency_rows(scale: float) -> list[Row]:
    """Getting one block from host memory, over copying it."""
    layout = layout_of(FALCON_7B, 8)
    count = 512
    flat, source = rows_array(layout, count)
    goal, out = rows_array(layout, 1)
    over: list[float] = []
    with open_store(layout, host=128 * MIB) as store:
        tokens = np.arange(count * 8)
        store.put(tokens, source)
        match = store.match(tokens)
        clock = time.perf_counter_ns
        for n in np.random.default_rng(0).integers(0, count, int(20_000 * max(scale, 0.25))):
            block = int(n)
            start = clock()
            store.get(match, out, first_block=block)
            middle = clock()
            np.copyto(goal[0], flat[block])
            over.append((middle - start) - (clock() - middle))
    p50, p99 = np.percentile(np.array(over) / 1e3, [50, 99])
    return [
        Row("host get, 1 block of 64 KiB, p50 over memcpy", float(p50), 10, False, "us"),
        Row("host get, 1 block of 64 KiB, p99 over memcpy", float(p99), 30, False, "us"),
    ]


def lookup_rows() -> list[Row]:
    """Finding a prefix of 1,000 present blocks of 16 tokens."""
    layout = layout_of(FALCON_7B, 16)
    blocks = 1000
    tokens = np.random.default_rng(0).integers(0, 50_000, blocks * 16)
    with open_store(layout, host=512 * MIB) as store:
        store.put(tokens, rows_array(layout, blocks)[1])
        keys = store.keys(tokens)
        by_keys = best_of(lambda: store.match_keys(keys), 30)
        by_tokens = best_of(lambda: store.match(tokens), 30)
        assert store.match(tokens).blocks == blocks
    unit = "M blocks/s"
    return [
        Row("prefix lookup by keys", blocks / by_keys / 1e6, 5, unit=unit),
        Row("match(tokens) with hashing", blocks / by_tokens / 1e6, 1, unit=unit),
    ]


def packing_rows() -> list[Row]:
    """Payload per byte of host memory, when prompts of real lengths have filled it."""
    lengths, origin = prompt_lengths()
    rows = []
    for name, geometry in (("falcon-7b", FALCON_7B), ("llama-3-8b, 2 heads", SMALL_8B)):
        layout = layout_of(geometry, 16)
        zeros = np.zeros((layout.pages.layers, 1, layout.pages.block_layer_bytes), np.uint8)
        with open_store(layout, host=768 * MIB) as store:
            arena = 768 * MIB
            shared: list[int] = []
            for number, length in enumerate(lengths):
                blocks = length // 16
                tokens = np.full(blocks * 16, number + 1)
                data = np.broadcast_to(zeros, (zeros.shape[0], blocks, zeros.shape[2]))
                before = store.snapshot()["tiers"]["host,used_bytes"]
                store.put(tokens, data)
                after = store.snapshot()["tiers"]["host,used_bytes"]
                shared.append(after)
                if after <= before and blocks:
                    break  # full: from here on every put evicts
            churn = []
            for number in range(len(shared), min(len(lengths), len(shared) * 3)):
                blocks = lengths[number] // 16
                data = np.broadcast_to(zeros, (zeros.shape[0], blocks, zeros.shape[2]))
                store.put(np.full(blocks * 16, number + 1), data)
                churn.append(store.snapshot()["tiers"]["host,used_bytes"])
        share = float(np.mean([shared[-1], *churn])) / arena
        note = f"{origin}, {len(shared) + len(churn)} prompts"
        rows.append(Row(f"host payload share, {name}", share * 100, 95, unit="%", note=note))
    return rows


SMALL_8B = KVGeometry(layers=32, kv_heads=8, head_dim=128, tp_size=4)  # 512 KiB a block


# ---- disk


def cold_rows(directory: Path, scale: float) -> list[Row]:
    """Durable puts and verified gets of the cold tier, against files of 2 MiB."""
    rows: list[Row] = []
    layout = layout_of(LLAMA_8B, 16)
    total = max(8, int(16 * scale)) * 64 * MIB // (2 if scale < 1 else 1)
    blocks = total // layout.pages.block_bytes
    cold, through = (Pairs(), Pairs()), (Pairs(), Pairs())
    small, whole = Pairs(), Pairs()
    disk = 0.0
    for turn in range(3):
        place = directory / f"turn{turn}"
        raw = RawFiles(place / "raw", blocks)
        write_back(layout, place / "pages", blocks, cold)
        disk = put_cold(layout, place, blocks, through, raw)
        get_cold(layout, place, blocks, 16, small, raw)
        get_cold(layout, place, blocks, 64, whole, raw)
        shutil.rmtree(place)
    for name, put in zip(("fresh files", "a full tier"), cold, strict=True):
        speed = f"{32 * layout.pages.block_bytes / np.median(put.raw) / 1e9:.1f} GB/s raw"
        rows.append(Row(f"cold put, durable, {name}", put.ratio, 1.05, note=speed))
        rows.append(Row(f"cold put, durable, {name}, CPU", put.cpu, 1.2, False))
    for name, put in zip(("fresh files", "a full tier"), through, strict=True):
        note = "copied to host memory first"
        rows.append(Row(f"Store.put and flush, durable, {name}", put.ratio, 1.05, note=note))
        rows.append(Row(f"Store.put and flush, durable, {name}, CPU", put.cpu, 1.2, False))
    speed = f"{64 * layout.pages.block_bytes / np.median(whole.raw) / 1e9:.1f} GB/s raw"
    rows.append(Row("cold put, bytes on disk", disk, 1.02, False, "x payload"))
    rows.append(Row("cold get, verified, 2 MiB pages (batches of 16)", small.ratio, 0.95))
    rows.append(Row("cold get, verified, 2 MiB pages, CPU", small.cpu, 1.5, False))
    rows.append(
        Row("cold get, verified, 64 MiB pages (batches of 2)", whole.ratio, 0.95, note=speed)
    )
    rows.append(Row("cold get, verified, 64 MiB pages, CPU", whole.cpu, 1.5, False))
    return rows


def write_back(layout: Layout, place: Path, blocks: int, pairs: tuple[Pairs, Pairs]) -> None:
    """Write pages that are in host memory, 64 MiB at a time, and sync; `pairs` as in `put_cold`."""
    batch = 32
    raw = RawFiles(place / "raw", blocks)
    chunks, _ = rows_array(layout, batch)
    config = config_of(layout, host=64 * MIB, cold=blocks * (2 * MIB + 8192), directory=place)
    parts = assemble(config, layout)
    assert parts.cold is not None
    parts.host.pages[:] = 7
    engine, cold = parts.engine, parts.cold
    numbers = itertools.count()

    def ours(first: int) -> None:
        moves = [Move(n, first + n, page_label(first + n)) for n in range(batch)]
        engine.submit(Transfer(next(numbers), TierId.HOST, TierId.COLD, moves, Urgency.DEMOTE))
        while not engine.has_results:
            engine.wait(60, until=lambda: False)
        assert set(engine.poll()[0].outcomes) == {Outcome.ARRIVED}
        cold.sync()

    for turn in (0, 1, 1):
        for first in range(0, blocks, batch):
            pairs[turn].time(
                partial(ours, first), partial(raw.write, range(first, first + batch), chunks)
            )
    parts.close()


def page_label(number: int) -> PageLabel:
    """The label of a page of one block."""
    key = number.to_bytes(32, "little")
    return PageLabel("default", (BlockLabel(0, key, bytes(32)),))


def put_cold(
    layout: Layout, place: Path, blocks: int, pairs: tuple[Pairs, Pairs], raw: RawFiles
) -> float:
    """Put in batches of 64 MiB, each flushed; gives bytes on disk per byte of payload.

    `pairs`: until the tier is full, and from then on, when each put evicts as much and raw writes
    over its own files.
    """
    batch = 32
    chunks, source = rows_array(layout, batch)
    with open_store(
        layout, host=512 * MIB, cold=blocks * (2 * MIB + 8192), directory=place / "ours"
    ) as store:
        empty = store.snapshot()["tiers"]["cold,disk_bytes"]
        count = blocks // batch
        # What is stored at the end is what `get_cold` reads: each chain goes and comes back.
        for turn, n in [(0, n) for n in range(count)] + [(1, n) for n in range(2 * count)]:
            keys = keys_of(store, n + count if turn and n < count else n % count, batch)

            def ours(keys: list[BlockKey] = keys) -> None:
                assert store.put_keys(keys, source) == batch
                assert store.flush()

            first = n % count * batch
            pairs[turn].time(ours, partial(raw.write, range(first, first + batch), chunks))
        used = store.snapshot()["tiers"]["cold,disk_bytes"] - empty
    return used / (blocks * layout.pages.block_bytes)


def get_cold(
    layout: Layout, place: Path, blocks: int, batch: int, pairs: Pairs, raw: RawFiles
) -> None:
    """Lease batches in random order from a store that was just opened."""
    chain = 32
    target = aligned(batch * 2 * MIB).reshape(batch, -1)
    host = 320 * MIB
    with open_store(
        layout, host=host, cold=blocks * (2 * MIB + 8192), directory=place / "ours"
    ) as store:
        order = np.random.default_rng(batch).permutation(blocks // max(batch, chain))
        for n in order:
            for part in range(max(1, chain // batch)):
                first = int(n) * max(batch, chain) + part * batch
                keys = [
                    key
                    for c in range(first // chain, (first + batch - 1) // chain + 1)
                    for key in keys_of(store, c, chain)
                ]
                begin = first % chain if batch < chain else 0

                def ours(keys: list[BlockKey] = keys, begin: int = begin) -> None:
                    take(store, keys, begin, batch, chain)

                pairs.time(ours, partial(raw.read, range(first, first + batch), target))


def take(store: Store, keys: list[BlockKey], begin: int, batch: int, chain: int) -> None:
    """Bring `batch` blocks into pinned host memory, verified."""
    count = min(chain, batch)
    matches = [
        store.match_keys(keys[start : start + begin + count])
        for start in range(0, len(keys), chain)
    ]
    for match in matches:
        with store.lease(match, first_block=begin) as lease:
            assert lease.blocks == count


def rows_array(layout: Layout, blocks: int) -> tuple[Bytes, Bytes]:
    """The same memory as raw blocks, (blocks, block_bytes), and as KV bytes of an engine.

    Where a warm page is one block, blocks lie whole one after the other, which is what memcpy
    likes best; else they are layer-major, as engines keep them.
    """
    plan = layout.pages
    flat = aligned(blocks * plan.block_bytes).reshape(blocks, plan.block_bytes)
    if plan.warm_page_blocks == 1:
        rows = flat.reshape(blocks, plan.layers, plan.block_layer_bytes).transpose(1, 0, 2)
        return flat, rows
    return flat, flat.reshape(plan.layers, blocks, plan.block_layer_bytes)


def layout_of(geometry: KVGeometry, block_tokens: int) -> Layout:
    """A layout with the default pages."""
    return Layout(geometry, block_tokens=block_tokens, model="bench")


def open_store(layout: Layout, *, host: int, cold: int = 0, directory: Path | None = None) -> Store:
    """A store with the default settings but for its sizes."""
    return Store.open(config_of(layout, host=host, cold=cold, directory=directory), layout)


def config_of(layout: Layout, *, host: int, cold: int, directory: Path | None) -> Config:
    """The default settings but for the sizes."""
    tiers: dict[str, dict[str, object]] = {"host": {"capacity": host}}
    if directory is not None:
        tiers["cold"] = {"capacity": cold, "directory": str(directory)}
    return Config.model_validate({"block_tokens": layout.block_tokens, "tiers": tiers})


def keys_of(store: Store, number: int, blocks: int) -> list[BlockKey]:
    """The keys of a chain of its own."""
    tokens = np.full(blocks * store.plan.block_tokens, 1)
    tokens[0] = number + 2
    return store.keys(tokens)


def prompt_lengths() -> tuple[list[int], str]:
    """Prompt lengths in tokens: from real traces beside the checkout, else a log-normal mix."""
    place = Path(__file__).resolve().parents[2] / "shared" / "traces" / "azure2023"
    lengths: list[int] = []
    for file in sorted(place.glob("*.csv.zst")):
        try:
            import zstandard
        except ImportError:
            break
        with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as text:
            lines = text.read().decode().splitlines()[1:]
        lengths += [int(line.split(",")[1]) for line in lines]
    rng = np.random.default_rng(0)
    if lengths:
        return [int(n) for n in rng.permutation(lengths)[:20_000]], "Azure 2023 code and conv"
    mix = np.concatenate([rng.lognormal(6.5, 1.1, 10_000), rng.lognormal(7.4, 0.7, 10_000)])
    return [int(n) for n in rng.permutation(np.clip(mix, 16, 14_000))], "log-normal mix"


if __name__ == "__main__":
    raise SystemExit(main())
