"""Nothing that is read is ever run: no unpickling, no eval, no shell, no module named by data.

A cache directory, a configuration and a model's files hold what others wrote. The syntax tree of
every module of the package and of the tools is searched for the ways in which Python runs what it
reads, under whatever name they were imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("tierkv", "tools") for path in (ROOT / folder).rglob("*.py"))

#: Modules that run what they read.
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("code", "codeop", "imp", "runpy"),
}
#: Built-in functions that run text; not even their names may be handed on.
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("torch.load", "torch.jit.load", "torch.package.PackageImporter", "yaml.load"),
    *("yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load"),
    *("pandas.read_pickle", "os.system", "os.popen"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader"),
}
#: Arguments that make a call dangerous unless they are literally False.
SWITCHES = {"shell", "allow_pickle", "trust_remote_code"}
IMPORTERS = {"importlib.import_module", "importlib.__import__", "importlib.reload"}

#: Where a module may be imported by name, and why the name is no data.
IMPORTS_BY_NAME = {
    "tierkv/__init__.py": "public names are loaded when first asked for, from a table in it",
    "tierkv/core/registry.py": "members of a family, from a table or an installed entry point",
    "tierkv/doctor_hardware.py": "asks whether a module of a list in it can be imported",
    "tierkv/engines/vllm/__init__.py": "what vLLM asks for is loaded then, from a table in it",
    "tierkv/tiers/files/gds.py": "one of the modules of cuda.bindings, named by the code",
    "tierkv/testing/drills/process_server.py": "a module of its own, and planted mistakes of tests",
    "tools/peer_lmcache.py": "another program's modules, by literal names, in its own environment",
    "tools/reliability.py": "drills, from a table in it",
}

#: Where a file that is named on the command line may be run, once, and why.
RUNS_A_FILE = {
    "tierkv/sim/user_policy.py": "`--policy my.py:MyPolicy` is run as `python my.py` would be",
}
FILE_RUNNER = "importlib.util.spec_from_file_location"


def findings(source: str) -> list[str]:
    """Every banned construct of a module's text, as ``line: what``; importers by name too."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    found = [(node.lineno, what) for node, what in _banned(tree, names)]
    return [f"{line}: {what}" for line, what in sorted(set(found))]


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Local name -> what it stands for, wherever in the module it is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield alias.asname or first, alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}"


def _banned(tree: ast.Module, names: dict[str, str]) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in _modules(node):
                if set(module.split(".")) & MODULES:
                    yield node, f"import of {module}"
        elif isinstance(node, ast.Name | ast.Attribute):
            whole = _whole(node, names)
            plain = whole.removeprefix("builtins.")
            if whole in CALLS | IMPORTERS or plain in BUILTINS:
                yield node, plain
        elif isinstance(node, ast.Call):
            yield from ((node, what) for what in _switches(node))
            if _whole(node.func, names) == "numpy.load" and len(node.args) > 2:
                yield node, "allow_pickle="


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module or ''}.{alias.name}" for alias in node.names]


def _whole(node: ast.expr, names: dict[str, str]) -> str:
    """A dotted name as its modules call it: ``np.load`` is ``numpy.load``; else ''."""
    if isinstance(node, ast.Attribute):
        before = _whole(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _switches(node: ast.Call) -> Iterator[str]:
    for keyword in node.keywords:
        literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg in SWITCHES and literal is not False:
            yield f"{keyword.arg}="
        if (keyword.arg, literal) in {("typ", "unsafe"), ("weights_only", False)}:
            yield f"{keyword.arg}={literal!r}"


def importers(source: str) -> list[str]:
    """The findings that are only imports by name."""
    return [one for one in findings(source) if one.partition(": ")[2] in IMPORTERS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_runs_what_it_reads(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    by_name = importers(source)
    name = path.relative_to(ROOT).as_posix()
    found = [one for one in findings(source) if one not in by_name]

    if name in RUNS_A_FILE:
        (found_once,) = found
        assert found_once.endswith(f": {FILE_RUNNER}"), RUNS_A_FILE[name]
    else:
        assert found == []
    if name not in IMPORTS_BY_NAME:
        assert by_name == []


def test_every_place_that_may_import_by_name_does() -> None:
    for name, reason in IMPORTS_BY_NAME.items():
        assert reason
        assert importers((ROOT / name).read_text(encoding="utf-8")), f"{name}: not needed any more"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import os, marshal",
        "from shelve import open as o",
        "def f():\n    import dill",
        "import cloudpickle.fast",
        "from joblib import load",
        "from multiprocessing import reduction, pickle",
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import exec as run\nrun(text)",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load\nload(path)",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load as u\nu(text)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy\nnumpy.load(path, allow_pickle=wanted)",
        "import numpy\nnumpy.load(path, None, True)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "from subprocess import Popen\nPopen(text, shell=wanted)",
        "from subprocess import getoutput\ngetoutput(text)",
        "import os\nos.system(text)",
        "from os import system as s\ns(text)",
        "import os\nos.popen(text)",
        "from ruamel.yaml import YAML\nYAML(typ='unsafe')",
        "M.from_pretrained(path, trust_remote_code=True)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as i\ni(name)",
        "import importlib.util\nimportlib.util.spec_from_file_location('m', path)",
    ],
)
def test_each_way_to_run_what_is_read_is_found(source: str) -> None:
    assert findings(source), source


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import numpy as np\nnp.load(path, allow_pickle=False)\nnp.load(path)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import json\njson.load(file)",
        "code.encode()",
        "from ast import literal_eval\nliteral_eval(text)",
        "'eval(x) and pickle in a text'",
        "from ruamel.yaml import YAML\nYAML(typ='safe').load(text)",
        "from importlib.util import find_spec\nfind_spec('torch')",
    ],
)
def test_what_runs_nothing_is_not_found(source: str) -> None:
    assert findings(source) == []


def test_a_finding_names_its_line() -> None:
    assert findings("import os\n\nos.system('x')\n") == ["3: os.system"]
