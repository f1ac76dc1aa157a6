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
from tierkv.kernels.pages import gather_pages, scatter_pages  # noqa: E402
from tierkv.testing.codecs import DTYPES, values_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning:triton")


def pool_of(pages: int, page_bytes: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8, generator=draw)


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
    triton_pages.launch_encode(pool, numbers, codes, **how)
    assert torch.equal(codes.cpu(), expected)

    back = torch.zeros_like(pool)
    triton_pages.launch_decode(back, numbers, codes, **how)
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
    triton_pages.launch_encode(pool, numbers, codes, group=GROUP, bits=codec.code_bits)
    back = torch.zeros_like(pool)
    triton_pages.launch_decode(back, numbers, codes, group=GROUP, bits=codec.code_bits)

    assert back[0, GROUP : 2 * GROUP].isnan().all()
    assert torch.equal(back[0, :GROUP], pool[0, :GROUP])
    assert torch.equal(back[0, 2 * GROUP :], pool[0, 2 * GROUP :])


def test_pages_of_a_pool_are_encoded_and_decoded_where_they_are() -> None:
    codec = Int8()
    pool = values_of(5, 6, 2 * GROUP, torch.bfloat16, 0)
    numbers = torch.tensor([4, 2])
    codes = codec.encode_pages(pool, numbers)
    back = torch.zeros_like(pool)
    codec.decode_pages(codes, back, numbers)

    assert torch.equal(back[numbers], codec.decode(codec.encode(pool[numbers]), 128, pool.dtype))
    assert not back[[0, 1, 3, 5]].any()


AHEAD = """
    import json, os, re, subprocess, sys, tempfile, warnings
    warnings.simplefilter("ignore")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from tierkv.kernels import triton_pages as kernels

    TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    PAGE = {"CHUNK": kernels.CHUNK_VALUES, "PAGE_VALUES": 8192, "GROUP": 64}
    COPY = {"CHUNK": kernels.CHUNK_WORDS, "PAGE_WORDS": 4096}
    WORDS = {"pool": "*i32", "numbers": "*i64", "rows": "*i32", "count": "i32"}
    CODES = {"numbers": "*i64", "codes": "*u8", "scales": "*fp32", "count": "i32", "limit": "fp32"}

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
