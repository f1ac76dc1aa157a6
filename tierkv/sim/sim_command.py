"""The command `tierkv sim`: thin; what it imports is loaded when it runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from tierkv.core.errors import ConfigError
from tierkv.core.models import model_geometry
from tierkv.core.registry import known_name
from tierkv.core.units import parse_percent, parse_size
from tierkv.sim.commands import FormatName, SettingWords, Strict, setting_words
from tierkv.sim.source import needed

if TYPE_CHECKING:
    from tierkv.sim.study import Kind, Part, Size, Study
    from tierkv.sim.trace import Trace

SIZES: Final = "1%,2%,5%,10%"
#: Those whose replay is compiled or quick: what a newcomer waits for. s3fifo takes minutes on a
#: trace of ten million references.
POLICIES_SHOWN: Final = "adaptive,ttl"
MODEL: Final = "llama-3-8b"
_SIZES_MAX: Final = 64

#: US dollars a GiB, to buy; of the order of server parts, to be overridden by one's own.
PRICE_DRAM: Final = 5.0
PRICE_NVME: Final = 0.15
#: Of the hits of a plan.
DRAM_SHARE: Final = 0.5


TraceSpec: TypeAlias = Annotated[
    str, typer.Option("--trace", metavar="PATH", help="A file, a directory, or builtin:NAME.")
]
Names: TypeAlias = Annotated[
    str, typer.Option("--policies", metavar="NAMES", help="With commas between them, or all.")
]
Programs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--policy", metavar="FILE.py:CLASS", help="Run one of your own; repeatable."),
]
Sizes: TypeAlias = Annotated[
    str, typer.Option(metavar="SIZES", help="Like 1%,8GiB,1000blocks; % of unique blocks.")
]
ModelName: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME[:tpN][:DTYPE]", help="For sizes in bytes.")
]
Hints: TypeAlias = Annotated[
    str, typer.Option(metavar="on|off", help="Tell adaptive what an engine could hint.")
]
Half: TypeAlias = Annotated[
    str, typer.Option(metavar="second|first|all", help="The requests that are scored.")
]
Jobs: TypeAlias = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Processes; as many as seem worth it.")
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write a report, one file.")
]
TableFile: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE.parquet", help="Write every figure.")
]
PlotFile: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Draw hits by size.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IsPlan: TypeAlias = Annotated[
    bool, typer.Option("--plan", help="Say the cheapest tiers that reach --target-hit.")
]
Ratio: TypeAlias = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="RATIO", help="With --plan: of prompt tokens.")
]
Price: TypeAlias = Annotated[
    float, typer.Option(min=0.0, metavar="X", help="With --plan: dollars a GiB.")
]
DramShare: TypeAlias = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, metavar="RATIO", help="With --plan: of hits, by DRAM."),
]


def sim(
    *,
    trace: TraceSpec = "builtin:agents",
    trace_format: FormatName = None,
    setting: SettingWords = None,
    policies: Names = POLICIES_SHOWN,
    policy: Programs = None,
    sizes: Sizes = SIZES,
    model: ModelName = None,
    hints: Hints = "off",
    half: Half = "second",
    jobs: Jobs = None,
    out: Out = None,
    save_table: TableFile = None,
    plot: PlotFile = None,
    as_json: AsJson = False,
    strict: Strict = False,
    plan: IsPlan = False,
    target_hit: Ratio = 0.8,
    price_dram: Price = PRICE_DRAM,
    price_nvme: Price = PRICE_NVME,
    dram_share: DramShare = DRAM_SHARE,
) -> None:
    """Replay a trace through one tier at several sizes, and say what each policy makes of it.

    Hits are prompt tokens of the longest prefix that is there when a request comes. Beside each
    policy are LRU, the optimum, and how much of the gap between them the policy closes.
    """
    from tierkv.sim import show
    from tierkv.sim.opening import open_trace
    from tierkv.sim.study import run_study

    kinds, part = _kinds(policies, policy or []), _part(half)
    is_told = _is_on(hints)
    files = _Files(out, save_table, plot)
    files.check(is_plan=plan)
    asked = _asked_sizes(sizes, model)
    words = setting_words(setting)
    opened = open_trace(trace, format=trace_format, settings=words, strict=strict)
    if not opened.references:
        raise ConfigError(f"{trace}: there is no whole block in it to replay")
    if plan:
        from tierkv.sim.capacity import Target, run_plan

        target = Target(target_hit, price_dram, price_nvme, dram_share, model or MODEL)
        with _progress() as tell:
            found = run_plan(opened, kinds, part, target, hints=is_told, tell=tell)
        show.plan(found, as_json=as_json)
        return
    measured = [size(opened) for size in asked]
    with _progress() as tell:
        result = run_study(
            opened, kinds, measured, part, hints=is_told, model=model, processes=jobs, tell=tell
        )
    files.write(result)
    show.study(result, as_json=as_json)


def _part(half: str) -> Part:
    from tierkv.sim.study import PARTS

    if half not in PARTS:
        raise ConfigError(f"--half {half!r}: second, first or all")
    return PARTS[half]


def _is_on(hints: str) -> bool:
    if hints not in ("on", "off"):
        raise ConfigError(f"--hints {hints!r}: on or off")
    return hints == "on"


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


def _asked_sizes(text: str, model: str | None) -> list[Callable[[Trace], Size]]:
    """Makes sizes of words, as far as that goes without the trace. Raises ConfigError."""
    token_bytes = None if model is None else model_geometry(model).token_bytes
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or len(words) > _SIZES_MAX:
        raise ConfigError(f"--sizes: give 1 to {_SIZES_MAX} of them, like {SIZES}")
    return [_size(word, token_bytes) for word in words]


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


@dataclass(frozen=True, slots=True)
class _Files:
    """What shall be written."""

    out: Path | None
    save_table: Path | None
    plot: Path | None

    def check(self, *, is_plan: bool) -> None:
        """Complain before the work, not after it."""
        asked = {
            ("--out", ".html"): self.out,
            ("--save-table", ".parquet"): self.save_table,
            ("--plot", ".png"): self.plot,
        }
        for (option, ending), path in asked.items():
            if path is None:
                continue
            if is_plan:
                raise ConfigError(f"{option}: --plan writes no file; it knows --json")
            if path.suffix != ending:
                raise ConfigError(f"{option} {path}: the name has to end in {ending}")
            if not path.parent.is_dir():
                raise ConfigError(f"{option} {path}: no such directory")
        if self.save_table is not None:
            needed("polars")
        if self.plot is not None:
            from tierkv.sim.show import pyplot

            pyplot()

    def write(self, result: Study) -> None:
        """Write all, and say so on stderr."""
        from tierkv.sim import show

        if self.out is not None:
            from tierkv.sim.report import write_report

            write_report(result, self.out)
        if self.save_table is not None:
            show.save_table(result, self.save_table)
        if self.plot is not None:
            show.save_plot(result, self.plot)
        for path in filter(None, (self.out, self.save_table, self.plot)):
            typer.echo(f"{path}: written", err=True)


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
