"""What may import what, read from the sources; import-linter checks the order of the layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tierkv

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tierkv"

MECHANISM = ("transfer", "attention", "tiers", "codecs", "kernels")

#: Engines and accelerators: slow to import, absent where only the core is installed.
HEAVY = {"torch", "transformers", "triton", "cupy", "cuda", "vllm", "sglang", "lmcache", "gguf"}

#: Where they may be imported at module level: modules that are loaded only when they are used.
HEAVY_PLACES = (
    "tierkv.tiers.device",
    "tierkv.kernels",
    "tierkv.engines",
    "tierkv.demo",
    "tierkv.testing.codecs",
    "tierkv.testing.streams",
)

#: All that core may use beside the standard library.
CORE_OUTSIDE = {"numpy", "msgspec", "numba", "xxhash"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(nodes: list[ast.stmt], *, inside: bool) -> Iterator[str]:
    """Imported names of a body; `inside` also those that functions import when they run."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""
            if (node.module or "").partition(".")[0] == "tierkv":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif is_skipped(node, inside=inside):
            continue
        else:
            for name in ("body", "orelse", "finalbody", "handlers", "cases"):
                children = getattr(node, name, [])
                yield from imports(children if isinstance(children, list) else [], inside=inside)


def is_skipped(node: ast.stmt, *, inside: bool) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside


def sources(*packages: str) -> list[Path]:
    found = []
    for name in packages:
        found += sorted((PACKAGE / name).rglob("*.py"))
        found += [path for path in [PACKAGE / f"{name}.py"] if path.exists()]
    return found


def imported(path: Path, *, inside: bool = True) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")).body, inside=inside))


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("tierkv.")}


@pytest.mark.parametrize("path", sources("core"), ids=module_of)
def test_core_imports_nothing_of_ours_but_core(path: Path) -> None:
    names = imported(path)
    assert ours(names) <= {"core"}
    outside = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside <= CORE_OUTSIDE | {"tierkv"}


@pytest.mark.parametrize("path", sources("plan"), ids=module_of)
def test_plan_knows_core_and_itself(path: Path) -> None:
    assert ours(imported(path)) <= {"core", "plan"}


@pytest.mark.parametrize("path", sources("plan"), ids=module_of)
def test_plan_reads_no_clock_and_no_chance_and_starts_nothing(path: Path) -> None:
    banned = {"time", "datetime", "random", "secrets", "threading", "asyncio", "subprocess", "os"}
    assert not {name.partition(".")[0] for name in imported(path)} & banned


@pytest.mark.parametrize("path", sources(*MECHANISM), ids=module_of)
def test_mechanism_does_not_know_the_planner(path: Path) -> None:
    assert not ours(imported(path)) & {"plan", "store", "config", "engines", "sim", "cli", "daemon"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_of)
def test_torch_and_engines_are_imported_where_they_are_used(path: Path) -> None:
    if module_of(path).startswith(HEAVY_PLACES):
        return
    names = imported(path, inside=False)
    assert not {name.partition(".")[0] for name in names} & HEAVY


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_everything_but_engines_imports_without_torch() -> None:
    modules = sorted(
        module
        for module in map(module_of, PACKAGE.rglob("*.py"))
        if not module.startswith((*HEAVY_PLACES, "tierkv.testing"))
    )
    code = f"""
import sys
from importlib import import_module
for name in {sorted(HEAVY)}:
    sys.modules[name] = None
for module in {modules}:
    import_module(module)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_importing_tierkv_loads_no_dependency() -> None:
    code = """
import sys
import tierkv
heavy = {"torch", "numpy", "pydantic", "typer", "ruamel", "tierkv.core"} & set(sys.modules)
assert not heavy, heavy
assert tierkv.__version__
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_in_dir() -> None:
    for name in tierkv.__all__:
        assert getattr(tierkv, name) is not None
        assert name in dir(tierkv)
    with pytest.raises(AttributeError, match="nonsense"):
        tierkv.nonsense  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert version("tierkv-offload") == tierkv.__version__
