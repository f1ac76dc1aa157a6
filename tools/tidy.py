"""House rules that no linter knows. `python tools/tidy.py [ROOT]` prints findings, exit 1 if any.

Lengths of lines, functions and files; words that mark unfinished work; calls that run what they
read; paths of somebody's machine; modules that nothing uses.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LINE_CHARS_MAX = 100
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 450
TEST_LINES_MAX = 650  # tests carry tables of cases

#: Files that may be longer, each with its reason.
LONG_FILES: dict[str, str] = {}

FOLDERS = ("tierkv", "tools", "tests")
TEXTS = ("*.md", "configs/*.yaml", "docs/**/*.md", "Makefile", "pyproject.toml")

# Written in halves so that this file passes its own rules.
WORDS = re.compile(r"\b(FIX" + r"ME|XX" + r"X|HA" + r"CK)\b|\bTO" + r"DO\b(?!\(\w)")
HOMES = re.compile(r"(?<![\w.~])/(home|root|Users|work)/\w")

BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system", "np.load", "numpy.load"}


def findings(root: Path) -> list[str]:
    """Everything that breaks a rule beneath `root`, as `file:line: message`."""
    found: list[str] = []
    trees: dict[Path, ast.Module] = {}
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        trees[path] = ast.parse(text, name)
        found += _text_findings(name, text)
        found += _tree_findings(name, trees[path])
        lines, most = text.count("\n"), _lines_max(name)
        if lines > most and name not in LONG_FILES:
            found.append(f"{name}:1: {lines} lines, more than {most}")
    for path in sorted(p for pattern in TEXTS for p in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        found += _text_findings(name, path.read_text(encoding="utf-8"), is_code=False)
    found += [f"{name}: {reason} is stale" for name, reason in _stale(root)]
    return found + _dead_modules(root, trees)


def _lines_max(name: str) -> int:
    return TEST_LINES_MAX if name.startswith("tests/") else FILE_LINES_MAX


def _text_findings(name: str, text: str, *, is_code: bool = True) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if is_code and len(line) > LINE_CHARS_MAX:
            yield f"{name}:{number}: {len(line)} characters, more than {LINE_CHARS_MAX}"
        if match := WORDS.search(line):
            yield f"{name}:{number}: {match[0]} marks unfinished work"
        if HOMES.search(line):
            yield f"{name}:{number}: a path of somebody's machine"


def _tree_findings(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                message = f"{lines} lines, more than {FUNCTION_LINES_MAX}"
                yield f"{name}:{node.lineno}: {node.name} has {message}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                if module.partition(".")[0] in BANNED_MODULES:
                    yield f"{name}:{node.lineno}: {module} runs what it reads"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BANNED_CALLS:
            yield f"{name}:{node.lineno}: {ast.unparse(node.func)}() runs what it reads"


def _stale(root: Path) -> Iterator[tuple[str, str]]:
    for name in LONG_FILES:
        path = root / name
        if not path.exists() or path.read_text(encoding="utf-8").count("\n") <= _lines_max(name):
            yield name, "its exception from the file length"


def _dead_modules(root: Path, trees: dict[Path, ast.Module]) -> list[str]:
    """Modules that nothing but a test imports, and no registry or entry point names.

    `tierkv.testing` is for tests of other packages too, so nothing of ours need import it.
    """
    used: set[str] = set()
    pyproject = root / "pyproject.toml"
    if pyproject.exists():
        used |= set(re.findall(r'"(tierkv[\w.]*):\w+"', pyproject.read_text(encoding="utf-8")))
    for path, tree in trees.items():
        if path.is_relative_to(root / "tests"):
            continue
        module = _module_name(root, path)
        for node in ast.walk(tree):
            used |= _names_used(node) - {module}
    dead = []
    for path in trees:
        module = _module_name(root, path)
        is_ours = module.startswith("tierkv.") and not module.startswith("tierkv.testing")
        if is_ours and path.name not in ("__init__.py", "__main__.py") and module not in used:
            dead.append(f"{path.relative_to(root).as_posix()}:1: nothing imports {module}")
    return dead


def _names_used(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value.partition(":")[0]
        return {text} if re.fullmatch(r"tierkv(\.\w+)+", text) else set()
    return set()


def _module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> int:
    """Print the findings; 1 if there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = findings(root)
    for line in found:
        print(line)
    print(f"tidy: {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
