"""Show: a study or a plan on the terminal, as JSON, as a Parquet table and as a picture."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tierkv import __version__
from tierkv.core.errors import ConfigError
from tierkv.core.units import format_bytes
from tierkv.sim.source import needed
from tierkv.sim.study import Row, Size, Study

if TYPE_CHECKING:
    from tierkv.sim.capacity import Plan

_WIDE: Final = 160


def study(result: Study, *, as_json: bool) -> None:
    """Print a study."""
    if as_json:
        typer.echo(json.dumps(as_table(result), indent=2))
    else:
        _table(result)


def _table(study: Study) -> None:
    console = _console()
    for line in facts(study):
        console.print(escape(line))
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("size")
    for name in ("policy", "hit %", "LRU %", "optimum %", "gap closed %"):
        shown.add_column(name, justify="left" if name == "policy" else "right")
    before: Size | None = None
    for row in study.rows():
        size = "" if row.size == before else size_words(row.size)
        values = (percent(value) for value in (row.hit, row.lru, row.optimum, row.gap))
        shown.add_row(size, escape(row.policy), *values)
        before = row.size
    console.print()
    console.print(shown)
    console.print()
    console.print("hit: prompt tokens of the longest prefix that is there when the request comes.")
    console.print("gap closed: 0 as LRU (leaf first), 100 as the optimum, which knows the future.")


def facts(study: Study) -> list[str]:
    """What was replayed, and what of it was made up."""
    trace = study.trace
    unique = f"{trace.unique_blocks:,} blocks of {trace.block_tokens} tokens"
    blocks = f"{trace.references:,} references to {unique}"
    lines = [
        f"trace     {trace.name} ({trace.facts.format})",
        f"          {trace.requests:,} requests in {trace.duration:,.0f} s",
        f"          {blocks}",
        *(f"made up   {text}" for text in trace.facts.synthesised),
    ]
    if trace.facts.bad_lines:
        lines.append(f"bad lines {trace.facts.bad_lines:,}, left out")
        lines += [f"          {text}" for text in trace.facts.problems[:3]]
    told = "told" if study.hints else "not told"
    lines.append(f"scored    {scored(study)}; adaptive is {told} hints")
    lines.append(f"at most   {study.reachable:.2%} with a cache that never gives anything up")
    lines.append(f"tierkv    {__version__}")
    return lines


def scored(study: Study) -> str:
    """The part of the requests that is scored, in words."""
    low, high = (int(share * study.trace.requests) for share in study.part.bounds)
    if study.part.name == "all":
        return f"all {high:,} requests"
    return f"the {high - low:,} requests of the {study.part.name}"


def size_words(size: Size) -> str:
    """A size, in every unit that is known."""
    text = f"{size.blocks:,} blocks, {100 * size.share:.3g} %"
    return text if size.bytes is None else f"{text}, {format_bytes(size.bytes)}"


def percent(value: float) -> str:
    """A share as a percentage with two decimals; a dash for none."""
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def as_table(study: Study) -> dict[str, object]:
    """A study as JSON has it; None for what is no number."""
    trace = study.trace
    return {
        "tierkv": __version__,
        "trace": trace.name,
        "facts": asdict(trace.facts),
        "requests": trace.requests,
        "references": trace.references,
        "unique_blocks": trace.unique_blocks,
        "block_tokens": trace.block_tokens,
        "duration_s": trace.duration,
        "scored": study.part.name,
        "hints": study.hints,
        "model": study.model,
        "reachable": study.reachable,
        "cells": [cell(row) for row in study.rows()],
    }


def cell(row: Row) -> dict[str, str | int | float | None]:
    """A row with plain names."""
    return {
        "policy": row.policy,
        "blocks": row.size.blocks,
        "share": row.size.share,
        "bytes": row.size.bytes,
        "hit": row.hit,
        "lru": row.lru,
        "optimum": row.optimum,
        "gap_closed": None if math.isnan(row.gap) else row.gap,
    }


def save_table(study: Study, path: Path) -> None:
    """Write the rows as Parquet, each with trace, part, hints and version."""
    polars = needed("polars")
    whole = {
        "trace": study.trace.name,
        "digest": study.trace.facts.digest,
        "scored": study.part.name,
        "hints": study.hints,
        "model": study.model,
        "tierkv": __version__,
    }
    kinds = {"bytes": polars.Int64, "gap_closed": polars.Float64, "model": polars.String}
    rows = [{**whole, **cell(row)} for row in study.rows()]
    polars.DataFrame(rows, schema_overrides=kinds).write_parquet(path)


def save_plot(study: Study, path: Path) -> None:
    """Draw hits by size as a png."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = list(study.rows())
    first = [row for row in rows if row.policy == study.policies[0]]
    shares = [100 * row.size.share for row in first]
    axes.plot(shares, [100 * row.optimum for row in first], "k--", label="optimum")
    axes.plot(shares, [100 * row.lru for row in first], color="0.5", marker="o", label="LRU")
    for name in study.policies:
        hits = [100 * row.hit for row in rows if row.policy == name]
        axes.plot(shares, hits, marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("size, % of the trace's unique blocks")
    axes.set_ylabel("prompt tokens hit, %")
    # A trace's name is no formula.
    axes.set_title(study.trace.name[:80].replace("$", r"\$"))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pyplot() -> ModuleType:
    """Matplotlib that opens no window. Raises ConfigError with the cure where it is absent."""
    try:
        import matplotlib as mpl

        mpl.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        cure = "pip install 'tierkv-offload[sim]'"
        raise ConfigError(f"--plot needs the package matplotlib: {cure}") from None
    return plt


def plan(found: Plan, *, as_json: bool) -> None:
    """Print what a target needs."""
    if as_json:
        typer.echo(json.dumps(found.as_table(), indent=2))
        return
    console = _console()
    target = found.target
    console.print(
        escape(
            f"{found.trace_name}: {target.hit:.1%} of the prompt tokens of its {found.part}, "
            f"{target.model} ({format_bytes(found.block_bytes)} a block)"
        )
    )
    console.print(
        f"prices: DRAM ${target.price_dram:g} and NVMe ${target.price_nvme:g} a GiB; "
        f"DRAM serves at least {target.dram_share:.0%} of the hits"
    )
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("policy", "DRAM", "NVMe", "cost", "curve"):
        shown.add_column(name, justify="right" if name not in ("policy", "curve") else "left")
    for answer, curve in zip(found.answers, found.curves, strict=True):
        how = "exact, one pass" if curve.curve.is_exact else "full replays"
        if curve.sampled < 1:
            points = 100 * curve.error
            how = f"{curve.sampled:.0%} sampled, off by up to {points:.1f} points where checked"
        if answer.cost is None or answer.dram_blocks is None or answer.nvme_blocks is None:
            reach = f"out of reach: {answer.reachable:.2%} at most"
            shown.add_row(escape(answer.policy), "-", "-", reach, how)
            continue
        sizes = (n * found.block_bytes for n in (answer.dram_blocks, answer.nvme_blocks))
        words = (format_bytes(size) if size else "none" for size in sizes)
        shown.add_row(escape(answer.policy), *words, f"${answer.cost:,.2f}", how)
    console.print(shown)


def _console() -> Console:
    is_seen = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if is_seen else _WIDE)
