"""Triton kernels of hot pages: the reference's bytes in the interpreter, and code for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from tierkv.codecs.grouped import GROUP, Int4, Int8  # noqa: E402
from tierkv.kernels import triton_pages  # noqa: E402
from tierkv.kernels.pages import CodedRows, gather_pages, scatter_pages  # noqa: E402
from tierkv.testing.codecs import DTYPES, values_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning:triton")


def pool_of(pages: int, page_bytes: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8, generator=draw)


def dense(pool: torch.Tensor, numbers: torch.Tensor, codes: torch.Tensor) -> CodedRows:
    """Codes of single rows, one after the other."""
    places = torch.arange(len(numbers), device=pool.device) * codes.shape[1]
    return CodedRows(pool, numbers, codes.view(-1), places)


@settings(deadline=None, max_examples=25)
@given(
    page_bytes=st.sampled_from([4, 16, 60, 256, 4096, 4100]),
    numbers=st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True),
    programs=st.integers(1, 5),
)
def test_gather_and_scatter_move_the_bytes_of_the_reference(
    page_bytes: int, numbers: list[int], programs: int
) -> None:
    pool, index = pool_of(9, page_bytes, 1).to(DEVICE), torch.tensor(numbers).to(DEVICE)
    rows, expected = (torch.zeros(len(numbers), page_bytes, dtype=torch.uint8) for _ in range(2))
    gather_pages(pool.cpu(), index.cpu(), expected)
    rows = rows.to(DEVICE)
    triton_pages.launch_copy(pool, index, rows, gather=True, programs=programs)
    assert torch.equal(rows.cpu(), expected)

    goal = pool_of(9, page_bytes, 2)
    kernel_goal = goal.to(DEVICE)
    scatter_pages(goal, index.cpu(), expected)
    triton_pages.launch_copy(kernel_goal, index, rows, gather=False, programs=programs)
    assert torch.equal(kernel_goal.cpu(), goal)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    codec=st.sampled_from([Int8(), Int4()]),
    groups=st.sampled_from([1, 5, 32, 33, 64]),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-20, 12),
    programs=st.integers(1, 4),
)
def test_fused_codes_are_those_of_the_codec(
    seed: int, codec: Int8 | Int4, groups: int, dtype: torch.dtype, power: int, programs: int
) -> None:
    pool = values_of(seed, 7, groups * GROUP, dtype, power).to(DEVICE)
    numbers = torch.tensor([6, 1, 0], device=DEVICE)
    expected = codec.encode(pool.cpu()[numbers.cpu()])
    codes = torch.zeros(expected.shape, dtype=torch.uint8, device=DEVICE)
    how = {"group": GROUP, "bits": codec.code_bits, "programs": programs}
    triton_pages.launch_encode(dense(pool, numbers, codes), **how)
    assert torch.equal(codes.cpu(), expected)

    back = torch.zeros_like(pool)
    triton_pages.launch_decode(dense(back, numbers, codes), **how)
    assert torch.equal(back.cpu()[numbers.cpu()], codec.decode(expected, pool.shape[1], dtype))
    assert not back[[2, 3, 4, 5]].any(), "a page that was not asked for was written"


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_group_that_is_not_finite_does_not_come_back_as_if_it_were(
    codec: Int8 | Int4, bad: float
) -> None:
    pool = torch.ones(1, 3 * GROUP, device=DEVICE)
    pool[0, GROUP + 3] = bad
    numbers = torch.tensor([0], device=DEVICE)
    width = codec.encoded_bytes(pool.shape[1], pool.dtype)
    codes = torch.zeros(1, width, dtype=torch.uint8, device=DEVICE)
    how = {"group": GROUP, "bits": codec.code_bits}
    triton_pages.launch_encode(dense(pool, numbers, codes), **how)
    back = torch.zeros_like(pool)
    triton_pages.launch_decode(dense(back, numbers, codes), **how)

    assert back[0, GROUP : 2 * GROUP].isnan().all()
    assert torch.equal(back[0, :GROUP], pool[0, :GROUP])
    assert torch.equal(back[0, 2 * GROUP :], pool[0, 2 * GROUP :])


@settings(deadline=None, max_examples=25)
@given(
    codec=st.sampled_from([Int8(), Int4()]),
    groups=st.sampled_from([1, 4, 33]),
    dtype=st.sampled_from(DTYPES),
    layers=st.tuples(st.integers(0, 2), st.integers(1, 3)),
    by_kernel=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_layers_of_blocks_are_encoded_to_places_all_over_memory(
    codec: Int8 | Int4,
    groups: int,
    dtype: torch.dtype,
    layers: tuple[int, int],
    by_kernel: bool,
    seed: int,
) -> None:
    """Three layers of five blocks in a page-like memory; only the chosen layers of two blocks."""
    values, chosen = groups * GROUP, range(layers[0], min(3, sum(layers)))
    pool = values_of(seed, 15, values, dtype, 0).to(DEVICE)
    width = codec.encoded_bytes(values, dtype)
    numbers, blocks = torch.tensor([9, 0]), torch.tensor([1, 4])
    memory = pool_of(1, 3 * 5 * width + 64, seed).view(-1).to(DEVICE)
    expected = memory.clone().cpu()
    for layer in chosen:
        for number, block in zip(numbers.tolist(), blocks.tolist(), strict=True):
            start = (layer * 5 + block) * width
            row = pool[number + layer][None].cpu()
            expected[start : start + width] = codec.encode(row)[0]
    rows = CodedRows(
        pool, numbers.to(DEVICE), memory, (blocks * width).to(DEVICE), chosen, 5 * width
    )
    how = {"group": GROUP, "bits": codec.code_bits}
    if by_kernel:
        triton_pages.launch_encode(rows, **how)
    else:
        codec.encode_blocks(rows)
    assert torch.equal(memory.cpu(), expected)

    back = torch.zeros_like(pool)
    if by_kernel:
        triton_pages.launch_decode(rows._replace(rows=back), **how)
    else:
        codec.decode_blocks(rows._replace(rows=back))
    written = {number + layer for number in (9, 0) for layer in chosen}
    for number in range(15):
        wanted = torch.zeros(1, values, dtype=dtype)
        if number in written:
            row = pool[number][None].cpu()
            wanted = codec.decode(codec.encode(row), values, dtype)
        assert torch.equal(back[number].cpu(), wanted[0]), f"row {number}"


AHEAD = """
    import json, os, re, subprocess, sys, tempfile, warnings
    warnings.simplefilter("ignore")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from tierkv.kernels import triton_pages as kernels

    TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    PAGE = {"CHUNK": kernels.CHUNK_VALUES, "PAGE_VALUES": 8192, "GROUP": 64, "ALIGN": 16}
    COPY = {"CHUNK": kernels.CHUNK_WORDS, "PAGE_WORDS": 4096}
    WORDS = {"pool": "*i32", "numbers": "*i64", "rows": "*i32", "count": "i32"}
    CODES = {"numbers": "*i64", "codes": "*u8", "scales": "*fp32", "places": "*i64",
             "count": "i32", "layers": "i32", "first_layer": "i32", "layer_bytes": "i32",
             "limit": "fp32"}

    def build(kernel, types, constants):
        names = list(kernel.__code__.co_varnames[: kernel.__code__.co_argcount])
        constants = constants | {"PROGRAMS": kernels.PROGRAMS}
        types = {name: types.get(name, "constexpr") for name in names}
        pointers = [n for n, name in enumerate(names) if types[name].startswith("*")]
        source = ASTSource(
            fn=triton.jit(kernel), signature=types,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(n,): [["tt.divisibility", 16]] for n in pointers},
        )
        options = {"num_warps": kernels.WARPS, "enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            tool = [os.path.join(TOOLS, "cuobjdump"), "-res-usage", file.name]
            usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
        return found | {"wide": len(re.findall(r"global\\.v[24]", made.asm["ptx"]))}

    found = {}
    for gather in (True, False):
        found[f"copy {gather}"] = build(kernels.copy_pages, WORDS, COPY | {"GATHER": gather})
    for bits in (8, 4):
        for dtype in ("bf16", "fp16", "fp32"):
            types = CODES | {"pool": "*" + dtype}
            found[f"encode {bits} {dtype}"] = build(
                kernels.encode_pages, {k: v for k, v in types.items() if k != "limit"},
                PAGE | {"BITS": bits},
            )
            found[f"decode {bits} {dtype}"] = build(
                kernels.decode_pages, types, PAGE | {"BITS": bits}
            )
    print(json.dumps(found))
"""


def test_every_kernel_compiles_for_an_h100_with_wide_accesses_and_no_spills() -> None:
    import json

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AHEAD)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)

    assert len(found) == 14
    for kernel, usage in found.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{kernel} spills: {usage}"
        assert usage["REG"] <= 64, f"{kernel}: {usage}"
        assert usage["wide"] >= 1, f"{kernel} has no wide access"
