"""The command `tierkv sim`: thin; what it imports is loaded when it runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tierkv.core.errors import ConfigError
from tierkv.core.models import model_geometry
from tierkv.core.registry import known_name
from tierkv.core.units import parse_percent, parse_size
from tierkv.sim.commands import FormatName, SettingWords, Strict, setting_words

if TYPE_CHECKING:
    from tierkv.sim.study import Kind, Size, Study
    from tierkv.sim.trace import Trace

SIZES: Final = "1%,2%,5%,10%"
#: Those whose replay is compiled or quick: what a newcomer waits for. s3fifo takes minutes on a
#: trace of ten million references.
POLICIES_SHOWN: Final = "adaptive,ttl"
MODEL: Final = "llama-3-8b"
_SIZES_MAX: Final = 64


def sim(
    *,
    trace: Annotated[
        str, typer.Option("--trace", metavar="PATH", help="As for `tierkv trace info`.")
    ] = "builtin:agents",
    trace_format: FormatName = None,
    setting: SettingWords = None,
    policies: Annotated[
        str, typer.Option(metavar="NAMES", help="Names with commas between them, or all.")
    ] = POLICIES_SHOWN,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py:CLASS", help="A policy of your own; it is run. Repeatable."),
    ] = None,
    sizes: Annotated[
        str, typer.Option(metavar="SIZES", help="Like 1%,8GiB,1000blocks; % of unique blocks.")
    ] = SIZES,
    model: Annotated[
        str | None, typer.Option(metavar="NAME[:tpN][:DTYPE]", help="For sizes in bytes.")
    ] = None,
    hints: Annotated[
        str, typer.Option(metavar="on|off", help="Tell adaptive what an engine could hint.")
    ] = "off",
    half: Annotated[
        str, typer.Option(metavar="second|first|all", help="The requests that are scored.")
    ] = "second",
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes; as the trace needs.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a report.")] = None,
    save_table: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Write the cells.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the hits.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Strict = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say the cheapest tiers for --target-hit.")
    ] = False,
    target_hit: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="RATIO", help="With --plan.")
    ] = 0.8,
    price_dram: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="With --plan: dollars a GiB.")
    ] = 5.0,
    price_nvme: Annotated[
        float, typer.Option(min=0.0, metavar="Y", help="With --plan: dollars a GiB.")
    ] = 0.15,
    dram_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="With --plan: of the hits, served by DRAM.")
    ] = 0.5,
) -> None:
    """Replay a trace through one tier at several sizes, and say what each policy makes of it.

    Hits are prompt tokens of the longest prefix that is there when a request comes. Beside each
    policy are LRU, the optimum, and how much of the gap between them the policy closes.
    """
    from tierkv.sim import show, study
    from tierkv.sim.opening import open_trace

    kinds = _kinds(policies, policy or [])
    part = study.PARTS.get(half)
    if part is None:
        raise ConfigError(f"--half {half!r}: second, first or all")
    if hints not in ("on", "off"):
        raise ConfigError(f"--hints {hints!r}: on or off")
    _can_write(out, save_table, plot)
    asked = _asked_sizes(sizes, model, is_plan=plan)
    words = setting_words(setting)
    opened = open_trace(trace, format=trace_format, settings=words, strict=strict)
    if not opened.references:
        raise ConfigError(f"{trace}: there is no whole block in it to replay")
    if plan:
        from tierkv.sim.capacity import Prices, run_plan

        prices = Prices(price_dram, price_nvme, dram_share)
        found = run_plan(opened, kinds, part, target_hit, model or MODEL, prices, hints == "on")
        show.plan(found, as_json=as_json)
        return
    with _progress() as tell:
        result = study.run_study(
            opened,
            kinds,
            [size(opened) for size in asked],
            part,
            hints=hints == "on",
            model=model,
            processes=jobs,
            tell=tell,
        )
    _write(result, out, save_table, plot)
    if as_json:
        typer.echo(json.dumps(show.as_table(result), indent=2))
    else:
        show.table(result)


def _kinds(names: str, programs: Sequence[str]) -> list[Kind]:
    from tierkv.sim.study import Kind
    from tierkv.sim.sweep import policy_names
    from tierkv.sim.user_policy import load_policy, split_program

    kinds = []
    for word in dict.fromkeys(filter(None, map(str.strip, names.split(",")))):
        if word == "all":
            kinds += [Kind(name) for name in policy_names()]
            continue
        try:
            kinds.append(Kind(known_name(word, policy_names())))
        except ValueError as error:
            raise ConfigError(f"--policies: {error}") from None
    for program in programs:
        load_policy(program)
        kinds.append(Kind(split_program(program)[1], program))
    if not kinds:
        raise ConfigError("--policies: name one, or give one of your own with --policy")
    by_name = {kind.name: kind for kind in kinds}
    for kind in kinds:
        if by_name[kind.name].program != kind.program:
            raise ConfigError(f"--policy: two policies are called {kind.name!r}")
    return list(by_name.values())


def _asked_sizes(text: str, model: str | None, *, is_plan: bool) -> list[Callable[[Trace], Size]]:
    """Makes sizes of words, as far as that goes without the trace. Raises ConfigError."""
    token_bytes = None if model is None else model_geometry(model).token_bytes
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or len(words) > _SIZES_MAX:
        raise ConfigError(f"--sizes: give 1 to {_SIZES_MAX} of them, like {SIZES}")
    return [] if is_plan else [_size(word, token_bytes) for word in words]


def _size(word: str, token_bytes: int | None) -> Callable[[Trace], Size]:
    from tierkv.sim.study import Size

    blocks = re.fullmatch(r"([1-9][0-9]{0,11})\s*blocks?", word)
    try:
        share = parse_percent(word)
        size_bytes = None if share is not None or blocks else parse_size(word)
    except ValueError as error:
        raise ConfigError(f"--sizes: {error}; or 5%, or 1000blocks") from None
    if size_bytes is not None and token_bytes is None:
        raise ConfigError(f"--sizes {word}: how many tokens that is depends on --model NAME")

    def size(trace: Trace) -> Size:
        block_bytes = None if token_bytes is None else token_bytes * trace.block_tokens
        if share is not None:
            count = int(share * trace.unique_blocks)
        elif size_bytes is not None and block_bytes is not None:
            count = size_bytes // block_bytes
        else:
            count = int(blocks[1]) if blocks else 0
        if count < 1:
            raise ConfigError(f"--sizes {word}: that is less than one block of this trace")
        # More than everything is everything; a policy may make room for all it is told.
        count = min(count, trace.unique_blocks)
        in_bytes = None if block_bytes is None else count * block_bytes
        return Size(count, count / trace.unique_blocks, in_bytes)

    return size


def _can_write(out: Path | None, save_table: Path | None, plot: Path | None) -> None:
    """Complain before the work, not after it."""
    endings = {"--out": (out, ".html"), "--save-table": (save_table, ".parquet")}
    for option, (path, ending) in {**endings, "--plot": (plot, ".png")}.items():
        if path is None:
            continue
        if path.suffix != ending:
            raise ConfigError(f"{option} {path}: the name has to end in {ending}")
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: no such directory")
    if save_table is not None:
        from tierkv.sim.source import needed

        needed("polars")
    if plot is not None:
        from tierkv.sim.show import pyplot

        pyplot()


def _write(result: Study, out: Path | None, save_table: Path | None, plot: Path | None) -> None:
    from tierkv.sim import show

    if out is not None:
        from tierkv.sim.report import write_report

        write_report(result, out)
        typer.echo(f"{out}: written", err=True)
    if save_table is not None:
        show.save_table(result, save_table)
        typer.echo(f"{save_table}: written", err=True)
    if plot is not None:
        show.save_plot(result, plot)
        typer.echo(f"{plot}: written", err=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, where somebody sees it."""
    if not sys.stderr.isatty():
        yield lambda _name, _done, _all: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("replays"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replays", total=None)

        def tell(_name: str, done: int, of_all: int) -> None:
            bar.update(task, completed=done, total=of_all)

        yield tell
