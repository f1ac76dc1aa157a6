"""Relayout: the reference does what an arrangement says, and the kernel's text does the same."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from tierkv.core.errors import GeometryMismatch  # noqa: E402
from tierkv.core.geometry import Form, KVGeometry  # noqa: E402
from tierkv.kernels.relayout import (  # noqa: E402
    Arrangement,
    BlockShape,
    FixedMove,
    Loop,
    MovePlan,
    PagePool,
    Pool,
    Side,
    kernel_source,
    move_blocks,
    move_by_reference,
    plan_move,
    repack,
)

BLOCKS = 5
#: The same as `Arrangement`, as the order of axes of a whole tensor: blocks, planes, tokens, heads.
ORDERS = {
    "canonical": "bpth",
    "NHD": "pbth",
    "HND": "pbht",
    "packed NHD": "bpth",
    "packed HND": "bpht",
}


def arrangement_of(name: str, shape: BlockShape) -> Arrangement:
    if name == "canonical":
        return Arrangement.canonical(shape)
    return Arrangement.paged(
        shape,
        blocks=BLOCKS,
        heads_first=name.endswith("HND"),
        planes_first=not name.startswith("packed"),
    )


def memory_of(shape: BlockShape, layers: int, seed: int) -> list[torch.Tensor]:
    """Uint8 memory of each layer, on addresses that are multiples of 16."""
    size = BLOCKS * shape.planes * shape.tokens * shape.heads * shape.head_bytes
    draw = torch.Generator().manual_seed(seed)
    layers_made: list[torch.Tensor] = []
    for _ in range(layers):
        layer = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw)
        assert layer.data_ptr() % 16 == 0
        layers_made.append(layer)
    return layers_made


def by_axes(layer: torch.Tensor, name: str, shape: BlockShape) -> torch.Tensor:
    """A layer as (blocks, planes, tokens, heads, head_bytes), by the order of its axes alone."""
    counts = {"b": BLOCKS, "p": shape.planes, "t": shape.tokens, "h": shape.heads}
    order = ORDERS[name]
    whole = layer.view(*(counts[axis] for axis in order), shape.head_bytes)
    return whole.permute(*(order.index(axis) for axis in "bpth"), 4)


SHAPES = st.builds(
    BlockShape,
    planes=st.integers(1, 2),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 4),
    head_bytes=st.sampled_from([16, 32, 48, 128, 528]),
)
NAMES = st.sampled_from(sorted(ORDERS))
PICKS = st.permutations(range(BLOCKS))


@settings(deadline=None, max_examples=80)
@given(
    shape=SHAPES, names=st.tuples(NAMES, NAMES), picks=st.tuples(PICKS, PICKS), n=st.integers(1, 5)
)
def test_the_reference_moves_what_the_axes_say(
    shape: BlockShape, names: tuple[str, str], picks: tuple[list[int], list[int]], n: int
) -> None:
    source, target = memory_of(shape, 2, 1), memory_of(shape, 2, 2)
    expected = [layer.clone() for layer in target]
    for layer, goal in zip(source, expected, strict=True):
        read = by_axes(layer, names[0], shape)[picks[0][:n]]
        by_axes(goal, names[1], shape)[picks[1][:n]] = read
    move_by_reference(shape, *sides(shape, names, picks, n, source, target))

    assert all(map(torch.equal, target, expected))


def sides(
    shape: BlockShape,
    names: tuple[str, str],
    picks: tuple[list[int], list[int]],
    count: int,
    source: list[torch.Tensor],
    target: list[torch.Tensor],
) -> tuple[Side, Side]:
    made = []
    for name, pick, layers in zip(names, picks, (source, target), strict=True):
        at = arrangement_of(name, shape)
        made.append(Side(Pool(tuple(layers), at), at.offsets(torch.tensor(pick[:count]))))
    return made[0], made[1]


@pytest.fixture(scope="module")
def kernel_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("kernel") / "move.so"
    command = ["g++", "-x", "c++", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    command += ["-fsanitize=undefined", "-fno-sanitize-recover", "-o", str(library), "-"]
    subprocess.run(command, input=kernel_source(), text=True, check=True)
    return ctypes.CDLL(str(library))


@settings(deadline=None, max_examples=150)
@given(
    shape=SHAPES,
    names=st.tuples(NAMES, NAMES),
    picks=st.tuples(PICKS, PICKS),
    count=st.integers(0, 5),
    layers=st.integers(1, 3),
    grid=st.integers(1, 3),
)
def test_the_kernel_gives_the_bytes_of_the_reference(
    kernel_on_host: ctypes.CDLL,
    shape: BlockShape,
    names: tuple[str, str],
    picks: tuple[list[int], list[int]],
    count: int,
    layers: int,
    grid: int,
) -> None:
    source, target = memory_of(shape, layers, 3), memory_of(shape, layers, 4)
    expected = [layer.clone() for layer in target]
    move_by_reference(shape, *sides(shape, names, picks, count, source, expected))
    read, written = sides(shape, names, picks, count, source, target)
    plan = plan_move(shape, read.pool.arrangement, written.pool.arrangement)
    assert plan.is_aligned
    run_on_host(kernel_on_host, read, written, plan, grid)

    assert all(map(torch.equal, target, expected))


@settings(deadline=None, max_examples=60)
@given(
    names=st.tuples(NAMES, NAMES),
    picks=st.tuples(PICKS, PICKS),
    left_out=st.sets(st.integers(0, BLOCKS - 1)),
    side=st.booleans(),
)
def test_a_block_that_either_side_leaves_out_is_not_moved(
    kernel_on_host: ctypes.CDLL,
    names: tuple[str, str],
    picks: tuple[list[int], list[int]],
    left_out: set[int],
    side: bool,
) -> None:
    shape = BlockShape(planes=2, tokens=3, heads=2, head_bytes=32)
    source, target, by_kernel = (memory_of(shape, 2, seed) for seed in (1, 2, 2))
    expected = [layer.clone() for layer in target]
    kept = [n for n in range(BLOCKS) if n not in left_out]
    only = tuple([pick[n] for n in kept] for pick in picks)
    move_by_reference(shape, *sides(shape, names, (only[0], only[1]), len(kept), source, expected))

    for goal in (target, by_kernel):
        read, written = sides(shape, names, picks, BLOCKS, source, goal)
        for n in left_out:
            (read if side else written).offsets[n] = -1
        plan = plan_move(shape, read.pool.arrangement, written.pool.arrangement)
        if goal is target:
            move_by_reference(shape, read, written)
        else:
            run_on_host(kernel_on_host, read, written, plan, 2)
        assert all(map(torch.equal, goal, expected))


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    paddings=st.tuples(st.sampled_from([0, 16, 160]), st.sampled_from([0, 16, 160])),
    apart=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_blocks_are_repacked_between_pages_of_any_sizes(
    layers: int,
    sizes: tuple[int, int],
    paddings: tuple[int, int],
    apart: bool,
    seed: int,
) -> None:
    """Against an index of every byte, written down as a page is described."""
    shape = BlockShape(planes=1, tokens=2, heads=2, head_bytes=16)
    parts, blocks = (2 if apart else 1), 12
    width = 64 * parts
    pools, memories = [], []
    draw = np.random.default_rng(seed)
    for size, padding in zip(sizes, paddings, strict=True):
        page_bytes = layers * size * width + padding
        memory = torch.from_numpy(
            draw.integers(0, 256, page_bytes * -(-blocks // size), dtype=np.uint8)
        )
        memories.append(memory)
        pools.append(
            PagePool(
                memory, shape, layers=layers, page_blocks=size, page_bytes=page_bytes, apart=apart
            )
        )
    chosen, places = (draw.permutation(blocks)[:7] for _ in range(2))
    expected = memories[1].clone()
    for block, place in zip(chosen, places, strict=True):
        for layer in range(layers):
            starts = []
            for size, pool, number in zip(sizes, pools, (block, place), strict=True):
                page, within = divmod(int(number), size)
                starts.append(page * pool.page_bytes + (layer * size + within) * width)
            expected[starts[1] : starts[1] + width] = memories[0][starts[0] : starts[0] + width]
    repack(pools[0], chosen, pools[1], places)

    assert torch.equal(memories[1], expected)


def test_a_fixed_move_moves_what_was_chosen_and_nothing_else() -> None:
    shape = BlockShape(planes=2, tokens=2, heads=1, head_bytes=16)
    at = Arrangement.canonical(shape)
    source, target = memory_of(shape, 2, 1), memory_of(shape, 2, 2)
    move = FixedMove(shape, Pool(tuple(source), at), Pool(tuple(target), at), blocks=4)
    expected = [layer.clone() for layer in target]

    for pairs in ([(3, 0), (1, 4)], [], [(0, 2), (2, 1), (4, 3), (1, 0)]):
        reads, writes = (torch.tensor([pair[n] for pair in pairs]).long() for n in (0, 1))
        move.choose(at.offsets(reads), at.offsets(writes))
        for read, write in pairs:
            for layer, goal in zip(source, expected, strict=True):
                goal.view(BLOCKS, -1)[write] = layer.view(BLOCKS, -1)[read]
        move.launch()
        assert all(map(torch.equal, target, expected))
    with pytest.raises(ValueError, match="5 blocks for a fixed move of at most 4"):
        move.choose(torch.zeros(5).long(), torch.zeros(5).long())
    with pytest.raises(GeometryMismatch, match="leave a layer"):
        move.choose(torch.tensor([320]), torch.tensor([0]))


def run_on_host(
    library: ctypes.CDLL, source: Side, target: Side, plan: MovePlan, grid: int, threads: int = 64
) -> None:
    def vector(values: Iterable[int]) -> ctypes.Array[ctypes.c_longlong]:
        numbers = list(values)
        return (ctypes.c_longlong * len(numbers))(*numbers)

    long = ctypes.c_longlong
    library.move_blocks_on_host(
        vector([layer.data_ptr() for layer in source.pool.layers]),
        vector([layer.data_ptr() for layer in target.pool.layers]),
        vector(source.offsets.tolist()),
        vector(target.offsets.tolist()),
        long(len(source.pool.layers)),
        long(len(source.offsets)),
        vector(plan.loop_table),
        long(plan.vectors),
        long(plan.lanes),
        grid,
        threads,
    )


def test_what_is_contiguous_on_both_sides_is_one_row() -> None:
    shape = BlockShape(planes=2, tokens=16, heads=8, head_bytes=256)
    plane = 16 * 8 * 256
    ours = Arrangement.canonical(shape)
    nhd, hnd = (Arrangement.paged(shape, blocks=100, heads_first=first) for first in (False, True))

    assert plan_move(shape, ours, ours).row_bytes == 2 * plane
    assert plan_move(shape, nhd, ours).row_bytes == plane
    assert plan_move(shape, nhd, ours).loops[2] == Loop(2, 100 * plane, plane)
    crossed = plan_move(shape, hnd, ours)
    assert (crossed.row_bytes, crossed.vectors, crossed.lanes) == (256, 16, 16)
    assert crossed.loops == (
        Loop(2, 100 * plane, plane),
        Loop(16, 256, 8 * 256),
        Loop(8, 16 * 256, 256),
    )


def test_a_latent_cache_is_one_row_a_block() -> None:
    geometry = KVGeometry(layers=2, kv_heads=1, head_dim=576, form=Form.LATENT)
    shape = BlockShape.of(geometry, 16)
    at = Arrangement.paged(shape, blocks=9)

    assert plan_move(shape, at, Arrangement.canonical(shape)).row_bytes == 16 * 576 * 2


def test_odd_widths_are_named_as_what_the_kernel_cannot_do() -> None:
    odd = BlockShape(planes=2, tokens=3, heads=2, head_bytes=10)
    ours = Arrangement.canonical(odd)

    assert not plan_move(odd, Arrangement.paged(odd, blocks=3, heads_first=True), ours).is_aligned
    narrow = KVGeometry(layers=1, kv_heads=2, head_dim=192, value_dim=128)
    with pytest.raises(GeometryMismatch, match="each plane by itself"):
        BlockShape.of(narrow, 16)


@pytest.mark.parametrize("move", [move_by_reference, move_blocks])
@pytest.mark.parametrize("offset", [-16, 48, 64])
def test_a_block_outside_its_layer_is_refused(
    move: Callable[[BlockShape, Side, Side], None], offset: int
) -> None:
    shape = BlockShape(planes=1, tokens=2, heads=1, head_bytes=16)
    at = Arrangement.canonical(shape)
    layer = torch.zeros(64, dtype=torch.uint8)
    inside, outside = (Side(Pool((layer,), at), torch.tensor([start])) for start in (32, offset))

    for source, target in ((outside, inside), (inside, outside)):
        with pytest.raises(GeometryMismatch, match="leave a layer of 64 bytes"):
            move(shape, source, target)
    assert not layer.any()


def test_it_compiles_where_only_the_run_time_compiler_is_there() -> None:
    """CuPy compiles it by NVRTC, at first use on a device: no nvcc, no headers."""
    core = pytest.importorskip("cuda.core")
    options = core.ProgramOptions(arch="sm_90", std="c++17")
    code = core.Program(kernel_source(), "c++", options).compile(
        "cubin", name_expressions=("move_blocks",)
    )
    assert len(code.code) > 1000


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_it_compiles_for_an_h100_without_spilling(tmp_path: Path) -> None:
    source = tmp_path / "move.cu"
    source.write_text(kernel_source())
    command = ["nvcc", "-arch=sm_90", "-cubin", "-Xptxas", "-v,-warn-spills", "-Werror"]
    command += ["all-warnings", "-o", str(tmp_path / "move.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
