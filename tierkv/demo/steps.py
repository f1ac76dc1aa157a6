"""Progress on the terminal: one bar for the step at hand, one line for each step that is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: Told the part of a step that is done, 0 to 1, and at will what is being done.
Tick = Callable[..., None]


class Steps:
    """Shows steps one after the other; a context manager around the whole show."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[Tick]:
        """Show `name` while the block runs; it is handed a function that moves the bar."""
        task = self._progress.add_task(escape(name), total=1.0)
        started_ns = time.monotonic_ns()

        def tick(part: float, what: str | None = None) -> None:
            shown = f"{name}: {what}" if what else name
            self._progress.update(task, completed=part, description=escape(shown))

        try:
            yield tick
        finally:
            self._progress.remove_task(task)
        took_s = (time.monotonic_ns() - started_ns) / 1e9
        self.say(f"[green]✔[/] {escape(name)} [dim]{took_s:.1f} s[/]")

    def say(self, line: str) -> None:
        """Print a line (rich markup) above the bar."""
        self._progress.console.print(line, highlight=False)
