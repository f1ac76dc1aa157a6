from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import pytest

import tierkv
from tierkv import cli, doctor
from tierkv.doctor import Finding, State, examine
from tierkv.tiers.files.portable import PortableFiles

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = str(ROOT / "configs" / "reference.yaml")


class Result:
    """What a run of the command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


Command: TypeAlias = Callable[..., Result]


@pytest.fixture
def tierkv_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["tierkv", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        assert "Traceback" not in out + err
        return Result(code if isinstance(code, int) else int(code is not None), out, err)

    return run


def test_the_version_is_printed(tierkv_command: Command) -> None:
    done = tierkv_command("--version")
    assert (done.code, done.out) == (0, f"tierkv {tierkv.__version__}\n")


def test_a_good_file_is_ok(tierkv_command: Command) -> None:
    done = tierkv_command("config", "check", REFERENCE)
    assert (done.code, done.out) == (0, f"{REFERENCE}: ok\n")


def test_a_bad_file_is_named_with_place_and_caret_on_stderr(
    tierkv_command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("tiers:\n  host:\n    capasity: 4GiB\nblock_tokens: 0\n")
    for command in (["check"], ["show"], ["show", "--effective", "--json"]):
        done = tierkv_command("config", *command, str(path))
        assert (done.code, done.out) == (2, "")
        lines = done.err.splitlines()
        assert lines[0].startswith(f"{path}:3:5: tiers.host.capasity: unknown key; did you mean")
        assert lines[2] == "      |     ^"
        assert lines[3].startswith(f"{path}:4:15: block_tokens: must be at least 1, got 0")


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "check"],
        ["config", "chek", REFERENCE],
        ["config", "check", "no such file.yaml"],
        ["config", "check", str(ROOT)],
        ["config", "show", "--model", "lama-3-8b", REFERENCE],
        ["config", "show", "--modle", "gpt2", REFERENCE],
        ["doctr"],
        ["doctor", "extra"],
        ["demo", "--json"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_is_two_with_a_word_on_stderr(
    tierkv_command: Command, arguments: list[str]
) -> None:
    done = tierkv_command(*arguments)
    assert done.code == 2
    assert done.err.strip()


def test_show_tells_what_the_file_sets_and_from_which_line(
    tierkv_command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tiers:\n  host: {capacity: 64GB}\n")
    done = tierkv_command("config", "show", str(path))
    assert done.code == 0
    assert "tiers.host.capacity  59.6 GiB (64GB: decimal, powers of 1000)  c.yaml:2" in done.out
    assert "block_tokens" not in done.out


def test_show_effective_tells_every_setting_and_its_source(
    tierkv_command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("namespaces:\n  a: {salt: hush, host_quota: 25%}\n")
    done = tierkv_command("config", "show", "--effective", "--json", str(path))
    settings = json.loads(done.out)["settings"]
    assert settings["block_tokens"] == {"value": 16, "source": "default"}
    assert settings["namespaces.a.host_quota"] == {"value": 1 << 30, "source": "c.yaml:2"}
    assert settings["namespaces.default.host_quota"]["value"] == 4 << 30
    assert settings["namespaces.a.salt"]["value"] == "(set)"
    assert "hush" not in done.out


def test_show_tells_what_pages_and_tiers_come_to_for_a_model(tierkv_command: Command) -> None:
    done = tierkv_command("config", "show", "--effective", "--model", "llama-3-8b", REFERENCE)
    rows = {line.split("  ")[0].strip(): line for line in done.out.splitlines()}
    assert "128 KiB" in rows["token"]
    assert "16 KiB" in rows["hot page"]
    assert "8 tokens of one layer" in rows["hot page"]
    assert "32,768 tokens" in rows["host tier"]
    assert "off" in rows["device tier"]
    assert "lost to rounding" in rows["cold tier"]


def test_the_plan_of_a_tier_never_claims_more_than_its_capacity(tierkv_command: Command) -> None:
    for model in ("llama-3-70b:tp8", "deepseek-v3", "gpt2", "falcon-7b", "smollm2-135m"):
        done = tierkv_command("config", "show", "--json", "--model", model, REFERENCE)
        plan = json.loads(done.out)["plan"]
        for tier, capacity in (("host tier", 4 << 30), ("cold tier", 64 << 30)):
            held = plan[tier]["value"] * plan["token"]["value"]
            assert 0.95 * capacity < held <= capacity


def test_a_tier_too_small_for_a_model_is_named(tierkv_command: Command, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tiers: {host: {capacity: 1MiB}}")
    done = tierkv_command("config", "show", "--model", "llama-3-8b", str(path))
    assert done.code == 2
    assert "tiers.host.capacity: 1 MiB holds 0 warm pages of 2 MiB" in done.err


def test_the_schema_is_json_and_knows_every_section(tierkv_command: Command) -> None:
    schema = json.loads(tierkv_command("config", "schema").out)
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) >= {"block_tokens", "pages", "tiers", "namespaces"}


def test_doctor_looks_at_the_machine_and_the_directory(
    tierkv_command: Command, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    done = tierkv_command("doctor", "--json", "--directory", str(tmp_path))
    findings = {item["name"]: item for item in json.loads(done.out)}
    assert done.code == 0
    assert {"Python", "torch", "CUDA", "CPU", "RAM", "memlock", "NUMA", "O_DIRECT"} <= set(findings)
    assert findings["directory"]["state"] == "ok"
    assert findings["file engine"]["state"] in ("ok", "note")
    assert list(tmp_path.iterdir()) == [], "a probe leaves nothing behind"


def test_doctor_prints_a_table_with_cures(tierkv_command: Command, tmp_path: Path) -> None:
    done = tierkv_command("doctor", "--directory", str(tmp_path / "not" / "yet"))
    assert done.code == 0
    assert "→ mkdir -m 700 -p" in done.out
    assert not (tmp_path / "not").exists()


def test_doctor_fails_where_the_directory_cannot_work(
    tierkv_command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = tierkv_command("doctor", "--json", "--directory", str(tmp_path / "file" / "x"))
    assert done.code == 1
    assert [f["name"] for f in json.loads(done.out) if f["state"] == "problem"] == ["directory"]


def test_doctor_warns_of_a_directory_that_others_can_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (finding,) = [f for f in examine(tmp_path) if f.name == "directory"]
    assert finding.state is State.NOTE
    assert f"chmod 700 {tmp_path}" in finding.cure


def test_doctor_refuses_a_directory_that_others_may_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    findings = {finding.name: finding for finding in examine(tmp_path)}
    assert findings["directory"].state is State.PROBLEM
    assert "file engine" not in findings


class Refusing(PortableFiles):
    """A file engine that never works; for the registry below."""

    @classmethod
    def probe(cls, root: Path) -> str | None:
        return "refused here"


class Working(PortableFiles):
    """A file engine that always works."""

    @classmethod
    def probe(cls, root: Path) -> str | None:
        return None


class Asked(Working):
    """One that `auto` never takes."""

    by_name_only = True


class Unbuffered(Working):
    """One that passes the page cache by, so that nothing better was refused."""

    align_bytes = 4096


@pytest.mark.parametrize(
    ("engines", "state", "detail"),
    [
        ([Working, Refusing], State.OK, "a"),
        ([Refusing, Working], State.NOTE, "b (a: refused here)"),
        ([Refusing, Unbuffered], State.OK, "b (a: refused here)"),
        ([Refusing, Refusing], State.PROBLEM, "none works: a: refused here; b: refused here"),
        ([Asked, Working], State.OK, "b"),
    ],
    ids=["first", "second", "as good", "none", "by name"],
)
def test_doctor_tells_why_an_engine_was_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engines: list[type],
    state: State,
    detail: str,
) -> None:
    from tierkv.core.registry import Registry

    module = ModuleType("two_engines")
    module.A, module.B = engines
    monkeypatch.setitem(sys.modules, "two_engines", module)
    registry = Registry("files", {"a": "two_engines:A", "b": "two_engines:B"})
    monkeypatch.setattr(doctor, "FILE_ENGINES", registry)
    (finding,) = [f for f in examine(tmp_path) if f.name == "file engine"]
    assert (finding.state, finding.detail) == (state, detail)


def test_a_finding_is_json_of_text() -> None:
    finding = Finding("x", State.OK, "fine")
    assert json.dumps(finding.as_dict()) == (
        '{"name": "x", "state": "ok", "detail": "fine", "cure": ""}'
    )


def test_demo_says_what_to_install_where_torch_is_missing(
    tierkv_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("tierkv.demo")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    done = tierkv_command("demo", "--quick")
    assert done.code == 2
    assert "install" in done.err


def test_demo_passes_its_options_on(
    tierkv_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, object] = {}

    def run(**options: object) -> int:
        seen.update(options)
        return 1

    module = ModuleType("tierkv.demo")
    module.run = run
    monkeypatch.setitem(sys.modules, "tierkv.demo", module)
    done = tierkv_command("demo", "--quick", "--json", "x.json", "--directory", str(tmp_path))
    assert done.code == 1
    assert seen == {"json_path": Path("x.json"), "quick": True, "directory": tmp_path}


def test_the_installed_command_runs_and_honours_no_color(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "tierkv"
    environment = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": "1", "LC_ALL": "C"}
    done = subprocess.run(
        [command, "doctor", "--directory", tmp_path],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b[3" not in done.stdout
    assert done.stderr == b""
