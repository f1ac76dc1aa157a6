"""The demo's rows as people read them: a table, bars of the time to the first token, a verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tierkv.demo.row import Check, Row

#: Tokens, times and megabytes; with the scenario's name a row fits 80 columns.
_HEADINGS = (
    "prompt\ntokens",
    "from\ndevice",
    "from\nhost",
    "from\nNVMe",
    "com-\nputed",
    "first\ntoken",
    "of re-\ncompute",
    "MB\nin",
    "MB\nout",
    "\nsame",
)
_BAR_CELLS = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print every row with what it reused, recomputed and moved."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("\nscenario", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        counts = (row.prompt_tokens, row.device_tokens, row.host_tokens, row.cold_tokens)
        table.add_row(
            escape(row.name),
            *(f"{count:,}" if count else "-" for count in counts),
            f"{row.recomputed_tokens:,}",
            f"{row.ttft_s:.2f}s",
            f"{row.ratio:.0%}" if row.ratio >= 0.1 else f"{row.ratio:.1%}",
            f"{row.loaded_bytes / 1e6:,.0f}" if row.loaded_bytes else "-",
            f"{row.stored_bytes / 1e6:,.0f}" if row.stored_bytes else "-",
            "[green]yes[/]" if row.tokens_identical else "[bold red]NO[/]",
        )
    console.print(table)


def show_bars(console: Console, rows: Sequence[Row]) -> None:
    """Print the time to the first token of every row as a bar; all bars share one scale."""
    console.print("[bold]Time to the first token[/] (grey: recomputing the same prompt)")
    scale = _BAR_CELLS / max(max(row.ttft_s, row.recompute_ttft_s) for row in rows)
    width = max(len(row.name) for row in rows)
    for row in rows:
        own = _bar(row.ttft_s * scale)
        rest = max(0, round(row.recompute_ttft_s * scale) - len(own))
        line = Text(f"{row.name:<{width}} ")
        line.append(own, style="green" if row.reuses_most else "yellow")
        line.append("░" * rest, style="bright_black")
        line.append(f" {row.ttft_s:.2f} s")
        if row.reuses_most:
            line.append(f"  {row.recompute_ttft_s / row.ttft_s:.1f}x sooner")
        console.print(line, overflow="crop", no_wrap=True)


def show_verdict(console: Console, checks: Sequence[Check], remarks: Sequence[str]) -> None:
    """Print each promise and whether it was kept, then what else is worth knowing."""
    for check in checks:
        mark = "[green]✔[/]" if check.ok else "[bold red]✘[/]"
        console.print(f"{mark} {escape(check.text)}")
    for remark in remarks:
        console.print(f"· {escape(remark)}")


def _bar(cells: float) -> str:
    whole, part = divmod(round(max(cells, 1 / 8) * 8), 8)
    return "█" * whole + (_EIGHTHS[part] if part else "")
