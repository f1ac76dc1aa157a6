"""The command: thin. Each body is a few lines around a module that can be used without it.

Exit codes: 0 done; 1 it failed at run time, or a check found damage; 2 wrong usage or
configuration; 130 interrupted. A user's mistake is a message on stderr, never a traceback.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tierkv import __version__
from tierkv.config import Config, read_config
from tierkv.config_report import PlanRow, SettingRow, plan_rows, setting_rows
from tierkv.config_yaml import ConfigFileError
from tierkv.core.errors import ConfigError, TierKVError
from tierkv.core.models import model_geometry
from tierkv.core.registry import known_name
from tierkv.doctor import Finding, State, examine
from tierkv.sim.commands import trace_app
from tierkv.sim.sim_command import sim
from tierkv.upkeep import DrillKind

if TYPE_CHECKING:
    from tierkv.setups.base import EngineSetup

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

app = typer.Typer(
    name="tierkv",
    help="Tiered KV cache for LLM inference: device memory, host memory, NVMe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Check, show and describe configuration files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(trace_app, name="trace")
app.command()(sim)

ConfigFile: TypeAlias = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file.")]
ColdDirectory: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIRECTORY", help="tiers.cold.directory, or a folder in it.")
]
KeyFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="tiers.cold.key_file of a protected one."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
EngineName: TypeAlias = Annotated[
    str, typer.Option(metavar="NAME", help="vllm, sglang, lmcache or transformers.")
]

_COLD_DIRECTORY: Final = Path("~/.cache/tierkv/cold")


def main() -> None:
    """Entry point of the command `tierkv`."""
    # A path or a terminal that is not UTF-8 gets escapes, not an exception.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ConfigError as error:
        _complain(error.report() if isinstance(error, ConfigFileError) else str(error))
        sys.exit(EXIT_USAGE)
    except TierKVError as error:
        _complain(f"tierkv: {error}")
        sys.exit(EXIT_FAILED)
    except OSError as error:
        _complain(f"tierkv: {error}")
        sys.exit(EXIT_FAILED)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"tierkv {__version__}")
        raise typer.Exit


@config_app.command("check")
def config_check(file: ConfigFile) -> None:
    """Say everything that is wrong with FILE, with line and column."""
    read_config(file)
    typer.echo(f"{file}: ok")


@config_app.command("show")
def config_show(
    file: ConfigFile,
    *,
    effective: Annotated[
        bool, typer.Option("--effective", help="Also what the file leaves at default.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME[:tpN][:DTYPE]", help="Page sizes and tokens for a model."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the settings of FILE came to, and where each came from."""
    loaded = read_config(file)
    settings = [row for row in setting_rows(loaded) if effective or row.is_set]
    plan = plan_rows(loaded.value, model_geometry(model)) if model is not None else []
    if as_json:
        typer.echo(_show_json(file, settings, model, plan))
        return
    console = _console()
    console.print(_setting_table(settings))
    if model is not None:
        console.print(_plan_table(model, plan))
    elif effective:
        console.print("For page sizes and tokens add --model, for example --model llama-3-8b.")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def init(
    *,
    engine: EngineName,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Checkpoint directory, hub id, or known shape.")
    ],
    dram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory; half of what is free.")
    ] = None,
    nvme: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Disk; half of what is free. 0: none.")
    ] = None,
    hbm: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Device memory; for transformers only.")
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where the disk's part lives.")] = Path("kv"),
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tierkv.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
) -> None:
    """Write a configuration for ENGINE and MODEL on this machine; print how to start the engine.

    What is printed can be pasted into a shell (transformers: is a Python program); warnings go to
    stderr.
    """
    from tierkv.setups.models import model_facts
    from tierkv.setups.writing import Sizes, prepare, write

    setup, facts = _setup(engine), model_facts(model)
    sizes = Sizes(dram, nvme, hbm)
    written = prepare(setup, facts, sizes, directory=directory, out=out)
    write(out, written.text, force=force)
    for warning in written.warnings:
        _complain(f"warning: {warning}")
    _complain(f"{out}: written; see `tierkv doctor --engine {engine} --config {out}`")
    typer.echo("\n".join(written.lines))


@app.command()
def doctor(
    *,
    directory: Annotated[
        Path | None,
        typer.Option(help=f"Where the cold tier would live ({_COLD_DIRECTORY}); probed if there."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also what would keep this engine from working."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Look at what this configuration asks for.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="With --engine: the model, as for init.")
    ] = None,
    arguments: Annotated[
        str, typer.Option(metavar="TEXT", help="With --engine: what it is started with.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Say what this machine can do, and the cure for what it cannot."""
    asked = None if config is None else read_config(config).value
    if engine is None and (model is not None or arguments):
        raise ConfigError("--model and --arguments say something of an engine; add --engine NAME")
    findings = []
    if engine is not None:
        findings = _engine_findings(engine, asked, directory, model, arguments)
    if directory is None:
        directory = _COLD_DIRECTORY if asked is None else asked.tiers.cold.directory
    findings = examine(directory) + findings
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        styles = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "bold red"}
        table = _table("", "what", "found")
        for finding in findings:
            cure = f"\n→ {finding.cure}" if finding.cure else ""
            style = styles[finding.state]
            table.add_row(
                f"[{style}]{finding.state}[/]", finding.name, escape(finding.detail + cure)
            )
        _console().print(table)
    if any(finding.state is State.PROBLEM for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def demo(
    *,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter document.")] = False,
    directory: Annotated[
        Path | None, typer.Option(help="Keep the cold tier here; found again by the next run.")
    ] = None,
) -> None:
    """Run a small model on this CPU and show what each tier saves, and that no token differs."""
    from tierkv.demo import run

    raise typer.Exit(run(json_path=json_path, quick=quick, directory=directory))


@app.command()
def check(
    directory: ColdDirectory,
    *,
    deep: Annotated[bool, typer.Option("--deep", help="Read and verify every payload.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    key_file: KeyFile = None,
) -> None:
    """Say what a cold directory holds and what in it is damaged; changes nothing."""
    from tierkv.upkeep.report import as_json, examine
    from tierkv.upkeep.show import show_report

    reports = examine(directory, deep=deep, key_file=key_file)
    for report in reports:
        show_report(_console(), report)
    if json_path is not None:
        text = json.dumps(as_json(directory, reports, deep=deep), indent=2) + "\n"
        try:
            json_path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: {error}") from None
    if any(report.damage for report in reports):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def scrub(
    directory: ColdDirectory,
    *,
    rate: Annotated[
        str, typer.Option(metavar="SIZE/s", help="Read at most this much a second.")
    ] = "100MB/s",
    once: Annotated[bool, typer.Option("--once", help="End after one pass.")] = False,
    key_file: KeyFile = None,
) -> None:
    """Verify everything at a bounded rate, pass after pass; goes on where it was interrupted."""
    from tierkv.upkeep.pace import parse_rate
    from tierkv.upkeep.scrub import Scrub
    from tierkv.upkeep.show import ScrubWords

    try:
        passes = Scrub(directory, parse_rate(rate), ScrubWords(_console()), key_file)
        os.nice(19)  # a core that somebody waits for is theirs
        is_good = passes.run(once=once)
    except KeyboardInterrupt:
        _complain("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not is_good:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def drill(
    kind: Annotated[DrillKind, typer.Argument(help="What to break.")],
    directory: ColdDirectory,
    *,
    count: Annotated[int, typer.Option(min=1, help="Pages to break.")] = 16,
    seed: Annotated[int | None, typer.Option(help="Repeat a drill; it prints its seed.")] = None,
    key_file: KeyFile = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Leave the broken copy here; made.")
    ] = None,
) -> None:
    """Break a copy of a cold directory, made beside it, and show that no wrong byte is served."""
    from tierkv.upkeep.drill import run_drill
    from tierkv.upkeep.show import show_kept, show_outcome

    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    outcomes = run_drill(directory, kind, seed=chosen, count=count, key_file=key_file, keep=keep)
    for outcome in outcomes:
        show_outcome(_console(), outcome)
    if keep is not None:
        show_kept(_console(), keep)
    if not all(outcome.held for outcome in outcomes):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def keygen(file: Annotated[Path, typer.Argument(metavar="FILE", help="Made, mode 0600.")]) -> None:
    """Make a random key for tiers.cold.key_file; never overwrites anything."""
    from tierkv.tiers.seals.key_file import make_key

    make_key(file)
    typer.echo(f"{file}: a new key; what is written with it is lost if it is")


def _setup(engine: str) -> EngineSetup:
    from tierkv.setups import SETUPS

    try:
        setup: EngineSetup = SETUPS.load(known_name(engine, SETUPS))()
    except ValueError as error:
        raise ConfigError(f"--engine: {error}") from None
    return setup


def _engine_findings(
    engine: str, config: Config | None, directory: Path | None, model: str | None, arguments: str
) -> list[Finding]:
    from tierkv.setups.base import Asked, options_of
    from tierkv.setups.models import model_facts

    setup, facts = _setup(engine), None if model is None else model_facts(model)
    asked = Asked(config or Config(), facts, options_of(arguments))
    if directory is not None:
        asked = asked.in_directory(directory)
    return list(setup.findings(asked))


def _show_json(
    file: Path, settings: list[SettingRow], model: str | None, plan: list[PlanRow]
) -> str:
    return json.dumps(
        {
            "file": str(file),
            "settings": {row.path: {"value": row.value, "source": row.source} for row in settings},
            "model": model,
            "plan": {
                row.name: {"value": row.value, "unit": row.unit, "note": row.note} for row in plan
            },
        },
        indent=2,
    )


def _setting_table(rows: list[SettingRow]) -> Table:
    table = _table("setting", "value", "from")
    for row in rows:
        table.add_row(escape(row.path), escape(row.shown), escape(row.source))
    return table


def _plan_table(model: str, rows: list[PlanRow]) -> Table:
    table = _table(model, "size", "")
    for row in rows:
        table.add_row(row.name, row.shown, escape(row.note))
    return table


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(escape(header), overflow="fold")
    return table


def _console() -> Console:
    """Plain and wide where nobody looks, so that a pipe gets whole lines. NO_COLOR is rich's."""
    is_seen = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if is_seen else 160)


def _complain(message: str) -> None:
    typer.echo(message, err=True)


if __name__ == "__main__":
    main()
