from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_tidy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tidy", ROOT / "tools" / "tidy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tidy = load_tidy()

# Written in halves so that this file passes the rules it tests.
MARK = "TO" + "DO"


def house(root: Path, **files: str) -> list[str]:
    """The findings in a small house; names have `__` for `/`. Every module is used."""
    (root / "tools").mkdir()
    (root / "tests").mkdir()
    imports = []
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        imports.append(f"import {name.replace('__', '.')}\n")
    (root / "tools" / "use.py").write_text("".join(imports))
    return tidy.findings(root)


def test_this_repository_is_tidy() -> None:
    assert tidy.findings(ROOT) == []


def test_a_tidy_house_has_no_findings(tmp_path: Path) -> None:
    assert house(tmp_path, tierkv__a="x = 1\n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("x = '" + "y" * 100 + "'\n", "tierkv/a.py:1: 106 characters", id="line"),
        pytest.param("def f():\n" + "    x = 1\n" * 70, ":1: f has 71 lines", id="function"),
        pytest.param("async def f():\n" + "    x = 1\n" * 70, "f has 71 lines", id="async"),
        pytest.param("x = 1\n" * 451, "451 lines, more than 450", id="file"),
        pytest.param(f"# {MARK}: later\n", "marks unfinished work", id="mark"),
        pytest.param("# FIX" + "ME\n", "marks unfinished work", id="fix"),
        pytest.param("import pickle\n", "pickle runs what it reads", id="import"),
        pytest.param("from marshal import loads\n", "marshal runs what it reads", id="from"),
        pytest.param("def f():\n    import shelve\n", ":2: shelve runs", id="inside"),
        pytest.param("x = eval('1')\n", "eval() runs what it reads", id="eval"),
        pytest.param("import torch\ntorch.load('x')\n", ":2: torch.load() runs", id="torch"),
        pytest.param("import yaml\nyaml.load('x')\n", "yaml.load() runs", id="yaml"),
        pytest.param("x = '/ho" + "me/me/data'\n", "a path of somebody's machine", id="path"),
    ],
)
def test_each_rule_finds_its_offender(tmp_path: Path, text: str, message: str) -> None:
    (finding,) = house(tmp_path, tierkv__a=text)
    assert message in finding


def test_a_mark_with_its_condition_may_stand(tmp_path: Path) -> None:
    assert house(tmp_path, tierkv__a=f"# {MARK}(when numpy 3 is out): simplify\n") == []


def test_a_module_that_nothing_imports_is_dead(tmp_path: Path) -> None:
    house(tmp_path, tierkv__a="", tierkv__b="")
    (tmp_path / "tools" / "use.py").write_text("from tierkv import a\n")
    (tmp_path / "tests" / "test_b.py").write_text("import tierkv.b\n")
    assert tidy.findings(tmp_path) == ["tierkv/b.py:1: nothing imports tierkv.b"]


def test_a_registered_module_is_not_dead(tmp_path: Path) -> None:
    house(tmp_path, tierkv__a="KINDS = {'b': 'tierkv.b:B'}\n", tierkv__b="", tierkv__cli="")
    (tmp_path / "tools" / "use.py").write_text("import tierkv.a\n")
    (tmp_path / "pyproject.toml").write_text('x = "tierkv.cli:main"\n')
    assert tidy.findings(tmp_path) == []


def test_a_stale_exception_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidy, "LONG_FILES", {"tierkv/a.py": "one big table"})
    (finding,) = house(tmp_path, tierkv__a="x = 1\n")
    assert "stale" in finding


def test_the_command_fails_where_there_are_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    house(tmp_path, tierkv__a="import pickle\n")
    monkeypatch.setattr(tidy.sys, "argv", ["tidy.py", str(tmp_path)])
    assert tidy.main() == 1
    assert "tidy: 1 findings" in capsys.readouterr().out
