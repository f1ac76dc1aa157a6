"""The command `tierkv trace`: thin; what it imports is loaded when it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from tierkv.core.errors import ConfigError

if TYPE_CHECKING:
    from tierkv.sim.summary import TraceSummary
    from tierkv.sim.trace import Trace

trace_app = typer.Typer(help="Look at, convert and generate traces.", no_args_is_help=True)

Spec: TypeAlias = Annotated[
    str, typer.Argument(metavar="PATH", help="A file, a directory, or builtin:NAME?seed=1.")
]
Out: TypeAlias = Annotated[
    Path, typer.Argument(metavar="OUT", help=".parquet, .jsonl, .jsonl.zst or .jsonl.gz.")
]
FormatName: TypeAlias = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="Told from the content if not given.")
]
SettingWords: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="KEY=VALUE", help="Of the format or generator; repeatable."),
]
Strict: TypeAlias = Annotated[bool, typer.Option("--strict", help="Stop at the first bad line.")]

_PROBLEMS_SHOWN: Final = 10


@trace_app.command("info")
def trace_info(
    spec: Spec,
    *,
    trace_format: FormatName = None,
    setting: SettingWords = None,
    strict: Strict = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in a trace, what a cache could gain of it, and what in it was made up."""
    from tierkv.sim.opening import open_trace
    from tierkv.sim.summary import PERCENTS, summarise

    words = setting_words(setting)
    trace = open_trace(spec, format=trace_format, settings=words, strict=strict)
    summary = summarise(trace)
    if as_json:
        shown = {"name": trace.name, **asdict(summary), "percents": PERCENTS}
        typer.echo(json.dumps({**shown, "facts": asdict(trace.facts)}, indent=2))
        return
    for name, value in info_rows(trace, summary):
        typer.echo(f"{name:<24}{value}".rstrip())


@trace_app.command("convert")
def trace_convert(
    spec: Spec,
    out: Out,
    *,
    trace_format: FormatName = None,
    setting: SettingWords = None,
    strict: Strict = False,
) -> None:
    """Write a trace as Parquet or JSON lines, which every version of tierkv can read."""
    from tierkv.sim.opening import open_trace
    from tierkv.sim.writing import write_trace

    words = setting_words(setting)
    trace = open_trace(spec, format=trace_format, settings=words, strict=strict)
    write_trace(trace, out)
    typer.echo(f"{out}: {_said(trace)}")


@trace_app.command("generate")
def trace_generate(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="chat, agents, rag, shared, shift or mix.")
    ],
    out: Out,
    *,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.")] = 1,
    setting: SettingWords = None,
) -> None:
    """Make a trace like the public ones that the generator was fitted to, and write it."""
    from tierkv.sim.generator import generate
    from tierkv.sim.writing import write_trace

    trace = generate(name, {"seed": str(seed), **setting_words(setting)})
    write_trace(trace, out)
    typer.echo(f"{out}: {_said(trace)}")


def setting_words(given: list[str] | None) -> dict[str, str]:
    """`KEY=VALUE` words as a table. Raises ConfigError for what is not one."""
    words: dict[str, str] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--setting {text!r}: write KEY=VALUE")
        words[key.strip()] = value.strip()
    return words


def info_rows(trace: Trace, summary: TraceSummary) -> list[tuple[str, str]]:
    """What `tierkv trace info` prints, as (name, value)."""
    from tierkv.sim.summary import PERCENTS

    s = summary
    rows = [
        ("trace", trace.name),
        ("format", trace.facts.format),
        ("requests", f"{s.requests:,} in {s.duration_s:,.0f} s"),
        ("sessions, tenants", f"{s.sessions:,}, {s.tenants:,}"),
        ("block", f"{s.block_tokens} tokens"),
        ("references to blocks", f"{s.references:,}"),
        ("unique blocks", f"{s.unique_blocks:,}; {s.one_hit:.1%} of them used once"),
        ("tokens in, out", f"{s.input_tokens:,}, {s.output_tokens:,}"),
        ("prefix hit at most", f"{s.prefix_hit_max:.2%} of tokens"),
        ("block hit at most", f"{s.block_hit_max:.2%} of references"),
        ("answers ended by", ", ".join(f"{k} {n:,}" for k, n in s.stops.items() if n)),
        ("percentiles", "".join(f"p{percent}".rjust(10) for percent in PERCENTS)),
    ]
    tables = {
        "  input tokens": s.input_quantiles,
        "  output tokens": s.output_quantiles,
        "  turns of a session": s.depth_quantiles,
        "  between arrivals, s": s.arrival_gap_s,
        "  block used again, s": s.reuse_gap_s,
        "  pause, s": s.pause_s,
    }
    rows += [(k, "".join(map(_number, values))) for k, values in tables.items() if values]
    rows += [("made up", text) for text in trace.facts.synthesised]
    if trace.facts.settings:
        words = " ".join(f"{key}={value}" for key, value in trace.facts.settings.items())
        rows.append(("settings", words))
    rows.append(("bad lines", f"{trace.facts.bad_lines:,}"))
    problems = trace.facts.problems
    rows += [("", text) for text in problems[:_PROBLEMS_SHOWN]]
    if trace.facts.bad_lines > _PROBLEMS_SHOWN:
        rows.append(("", "…"))
    return rows


def _number(value: float) -> str:
    return f"{value:>10,.0f}" if value >= 100 else f"{value:>10.3g}"


def _said(trace: Trace) -> str:
    bad = f", {trace.facts.bad_lines:,} bad lines" if trace.facts.bad_lines else ""
    return (
        f"{trace.requests:,} requests, {trace.references:,} references to "
        f"{trace.unique_blocks:,} blocks{bad}"
    )
