"""Reports in words and tables, for a terminal; nothing is read here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from tierkv.core.units import format_bytes
from tierkv.tiers.seals import NO_SEAL
from tierkv.upkeep.reading import Flaw, Weight
from tierkv.upkeep.report import LayoutReport

if TYPE_CHECKING:
    from tierkv.upkeep.drill import Outcome as DrillOutcome

_STYLES = {Weight.NOTE: "yellow", Weight.DAMAGE: "bold red"}


def escape(text: str) -> str:
    """`text` for a terminal: what comes from a disk may hold markup and control characters."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escape_markup("".join(shown))


def table_of(*headers: str) -> Table:
    """A plain table, as all of this command are."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(escape(header), overflow="fold")
    return table


def show_report(console: Console, report: LayoutReport) -> None:
    """Print what one layout's folder holds and what is wrong with it."""
    console.print(f"[bold]{escape(str(report.directory))}[/]", soft_wrap=True)
    table = table_of("what", "found")
    table.add_row("layout", report.fingerprint[:16])
    table.add_row("last stop", "clean" if report.is_clean else "not clean")
    if report.protection != NO_SEAL:
        table.add_row("protection", _protection(report))
    size = format_bytes(report.disk_bytes)
    table.add_row("segments", f"{report.segments}, {size} on disk")
    page = format_bytes(report.warm_page_bytes)
    table.add_row("pages", f"{report.pages} of {page}, {report.pages_free} free")
    for name, n in sorted(report.namespaces.items()):
        table.add_row(
            f"namespace {escape(name)}",
            f"{n.pages} pages, {n.blocks} blocks, {format_bytes(n.disk_bytes)}",
        )
    table.add_row("the next start", _recovery(report))
    console.print(table)
    if report.flaws:
        console.print(flaw_table(report.flaws))
    console.print(verdict(report), soft_wrap=True)


def _protection(report: LayoutReport) -> str:
    if report.has_key:
        return f"{escape(report.protection)}, tags verified with the key"
    return (
        f"{escape(report.protection)}, looked at without the key: checksums find faults, forged "
        "pages are not found (--key-file does)"
    )


def _recovery(report: LayoutReport) -> str:
    gone = report.blocks_let_go
    reason = "older copies, or blocks whose beginning is missing"
    freed = f" (lets go {gone} blocks: {reason})" if gone else ""
    most = "" if report.blocks_kept_is_exact else "at most "
    kept = f"keeps {report.pages_kept} pages, {most}{report.blocks_kept} blocks{freed}"
    refused = (
        f"{report.pages_refused} kept pages do not verify: misses when read, "
        f"{report.blocks_refused} blocks with those behind them"
        if report.is_deep
        else "payloads were not read (--deep does)"
    )
    return f"{kept}; drops {report.pages_dropped} pages; {refused}"


def flaw_table(flaws: Sequence[Flaw]) -> Table:
    """One row for each flaw, with what it costs and the cure."""
    table = table_of("", "file", "page", "what is wrong", "recomputed")
    for flaw in flaws:
        style = _STYLES[flaw.weight]
        table.add_row(
            f"[{style}]{flaw.weight}[/]",
            escape(flaw.file),
            "" if flaw.page is None else str(flaw.page),
            f"{escape(flaw.what)}\n→ {escape(flaw.cure)}",
            cost(flaw),
        )
    return table


def cost(flaw: Flaw) -> str:
    """The blocks that a flaw loses, in words."""
    if flaw.weight is Weight.NOTE or not flaw.blocks:
        return "nothing"
    return f"{flaw.blocks} blocks" if flaw.is_exact else f"at most {flaw.blocks} blocks"


def verdict(report: LayoutReport) -> str:
    """One line that says whether all is well."""
    damage = report.damage
    if not damage:
        depth = "headers and payloads" if report.is_deep else "headers"
        found = f"{depth} verify" if report.has_key else f"checksums of {depth} verify, not tags"
        return f"ok: {found}; nothing was changed"
    lost = sum(flaw.blocks for flaw in damage)
    return (
        f"damaged: {len(damage)} findings with at most {lost} blocks; a read of them is a miss, "
        "never wrong bytes; nothing was changed"
    )


def show_outcome(console: Console, outcome: DrillOutcome) -> None:
    """Print what a drill on one folder showed."""
    title = f"[bold]{escape(str(outcome.directory))}[/] (seed {outcome.seed})"
    console.print(title, soft_wrap=True)
    table = table_of("drill " + outcome.kind, "count", "must be")
    before = outcome.damaged_before
    table.add_row("pages that verified before", str(outcome.pages), "")
    if before:
        table.add_row("pages that did not, left out", str(before), "")
    table.add_row("pages and calls broken", str(outcome.broken), "")
    table.add_row("of those noticed (a miss or an error)", str(outcome.noticed), "all")
    table.add_row("pages served with wrong bytes", str(len(outcome.wrong)), "0")
    table.add_row("unharmed pages not served", str(len(outcome.lost)), "0")
    console.print(table)
    if outcome.held:
        console.print("held: every fault was noticed, and every byte served was right")
    else:
        pages = ", ".join(map(str, sorted(outcome.wrong | outcome.lost)[:16])) or "none by number"
        console.print(f"[bold red]NOT held[/]: pages {pages}; please report this, with the seed")


def show_kept(console: Console, folder: Path) -> None:
    """Say where a drill has left its broken copy."""
    console.print(f"the broken copy is kept in {escape(str(folder))}", soft_wrap=True)


class ScrubWords:
    """Says how a scrub goes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def began(self, root: Path, next_page: int, pages: int) -> None:
        """Say where it begins."""
        start = f"goes on at page {next_page}" if next_page else "begins"
        self._console.print(escape(f"{root}: {start}, {pages} pages"), soft_wrap=True)

    def finished(self, report: LayoutReport) -> None:
        """Show what was found."""
        show_report(self._console, report)

    def stopped(self, root: Path, next_page: int | None) -> None:
        """Say how far it got."""
        place = "while headers were read" if next_page is None else f"at page {next_page}"
        words = f"{root}: stopped {place}; the next scrub goes on where this one was"
        self._console.print(escape(words), soft_wrap=True)
