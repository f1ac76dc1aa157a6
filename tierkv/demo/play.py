"""`tierkv demo`: one long document through every tier, against recomputing it.

Read order: `play` prepares model and directory, `Scenarios.play` answers prompts one after the
other, `judge` holds the rows against what is promised. Every answer is compared, token for token,
with the answer of plain transformers that computes the whole prompt; both are timed from the call
to the first new token, lookup, loading and storing included.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

import tierkv
from tierkv.core.errors import ConfigError, TierKVError
from tierkv.core.geometry import MIB, align_up
from tierkv.demo import judge as promise
from tierkv.demo import model, text
from tierkv.demo.judge import Size, judge, remarks, write_json
from tierkv.demo.place import require_space, working_directory
from tierkv.demo.restart import Capacities, Order, answer_in_new_process, damaged_pages
from tierkv.demo.row import Row
from tierkv.demo.steps import Steps
from tierkv.demo.table import show_bars, show_rows, show_verdict

if TYPE_CHECKING:
    from tierkv.demo.session import Prompt, Recomputed, Session
    from tierkv.store import Store

_FULL: Final = Size(document_tokens=6200, chat_tokens=1200, new_tokens=20, ttft_ratio_max=0.1)
#: Looking up and loading have a fixed part, so that a short document gains less.
_QUICK: Final = Size(document_tokens=1900, chat_tokens=600, new_tokens=12, ttft_ratio_max=0.33)


def play(*, json_path: Path | None, quick: bool, directory: Path | None) -> int:
    """See `tierkv.demo.run`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    model.require_packages()
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_path}: its directory does not exist")
    console = Console(highlight=False)
    size = _QUICK if quick else _FULL
    started_ns = time.monotonic_ns()
    with working_directory(directory) as root, Steps(console) as steps:
        played = Scenarios(_open_session(steps, size), root / "kv", size, steps)
        played.play()
    rows, facts = played.rows, played.facts
    facts["total_s"] = (time.monotonic_ns() - started_ns) / 1e9
    checks = judge(rows, size, played.document_tokens)
    console.print()
    show_rows(console, rows)
    console.print()
    show_bars(console, rows)
    console.print()
    show_verdict(console, checks, remarks(rows, facts))
    console.print(f"The demo took {facts['total_s']:.0f} s.")
    if json_path is not None:
        write_json(json_path, rows, checks, facts, size)
        console.print(f"All figures are in {json_path}")
    return 0 if all(check.ok for check in checks) else 1


def _open_session(steps: Steps, size: Size) -> Session:
    with steps.step("model ready") as tick:
        from tierkv.demo.session import Session, quiet

        quiet()
        path = model.checkpoint(lambda what, part: tick(part, what))
        tick(1.0, "loading")
        session = Session(path, new_tokens=size.new_tokens)
        session.warm_up()
    return session


class Scenarios:
    """Plays every scenario once; `rows` and `facts` are what came out. Single use."""

    def __init__(self, session: Session, directory: Path, size: Size, steps: Steps) -> None:
        self.session = session
        self.directory = directory
        self.steps = steps
        self.rows: list[Row] = []
        #: Of all stores that were closed, and of the open one as far as rows have told.
        self._damaged_pages = self._damaged_told = 0
        document = text.document(size.document_tokens, session.count_tokens)
        self.first, self.other, self.last = (
            session.prompt(f"{document}\n\n---\n\n{question}") for question in text.QUESTIONS
        )
        self.short = session.prompt(text.SHORT_QUESTION)
        chat = text.chat_document(size.chat_tokens, session.count_tokens)
        self.chat = session.prompt(f"{chat}\n\n---\n\n{text.CHAT_TURNS[0]}")
        self.document_tokens = min(
            _common(self.first.ids, self.other.ids), _common(self.first.ids, self.last.ids)
        )
        pages = session.layout.pages
        #: K and V of one long prompt, whole warm pages.
        self.prompt_bytes = align_up(
            len(self.first.ids) * pages.block_bytes // pages.block_tokens,
            pages.warm_page_bytes,
        )
        self.facts: dict[str, object] = _machine() | {
            "model": model.MODEL_NAME,
            "dtype": session.layout.geometry.dtype,
            "token_bytes": session.layout.geometry.token_bytes,
            "document_tokens": self.document_tokens,
            "prompt_bytes": self.prompt_bytes,
        }

    def play(self) -> None:
        """Every scenario, in the order in which the data moves down the tiers."""
        require_space(self.directory.parent, self._cold_bytes + 256 * MIB)
        with self._store(device=self._roomy, host=self._roomy) as store:
            self._ask_for_the_first_time(store)
            self._ask(store, self.other, promise.WARM, "the device arena holds all of it")
            self._chat(store)
            self._ask(store, self.short, promise.SHORT, "nothing to gain")
            self.facts["decode_step_s"] = self.session.recompute(self.short).step_s
            self._flush(store)
        small = max(self.prompt_bytes // 8, 4 * MIB)
        with self._store(device=small, host=self._roomy) as store:
            self._touch(store)
            self._ask(store, self.other, promise.FROM_HOST, f"device {small / 1e6:.0f} MB")
        with self._store(device=small, host=2 * small) as store:
            self._touch(store)
            self._ask(store, self.other, promise.FROM_NVME, f"host {2 * small / 1e6:.0f} MB")
        self._restart()
        self.facts["damaged_pages"] = self._damaged_pages

    @property
    def _roomy(self) -> int:
        return align_up(self.prompt_bytes * 3 // 2, MIB) + 128 * MIB

    @property
    def _cold_bytes(self) -> int:
        return align_up(self.prompt_bytes * 3, 64 * MIB) + 512 * MIB

    @contextmanager
    def _store(self, *, device: int, host: int) -> Iterator[Store]:
        from tierkv.store import Store

        capacities = Capacities(device=device, host=host, cold=self._cold_bytes)
        with Store.open(capacities.config(self.directory), self.session.layout) as store:
            self._damaged_told = 0
            yield store
            self._damaged_pages += damaged_pages(store)

    def _ask_for_the_first_time(self, store: Store) -> None:
        earlier = store.match(self.first.ids[:-1]).tokens
        self.facts["earlier_tokens"] = earlier
        note = "nothing stored yet"
        if earlier:
            note = f"an earlier run left {earlier:,} tokens"
            self.steps.say(
                f"[yellow]![/] {self.directory.parent} already holds {earlier:,} of the first"
                f" prompt's {len(self.first.ids):,} tokens from an earlier run; they are used"
            )
        expected = self._recompute(self.first, promise.WITHOUT)
        self.rows.append(_row_without(self.first, expected, self.session))
        self._ask(store, self.first, promise.FIRST, note)
        self._flush(store)

    def _chat(self, store: Store) -> None:
        prompt = self.chat
        for number, _said in enumerate(text.CHAT_TURNS, start=1):
            row = self._ask(store, prompt, promise.CHAT.format(number), "", commit=True)
            if number < len(text.CHAT_TURNS):
                said = text.CHAT_TURNS[number]
                prompt = self.session.next_turn(prompt, row.answer_tokens, said)

    def _ask(
        self, store: Store, prompt: Prompt, name: str, note: str, *, commit: bool = False
    ) -> Row:
        expected = self._recompute(prompt, name)
        with self.steps.step(f"{name}: with tierkv") as tick:
            row = self.session.answer(
                store, prompt, name=name, note=note, expected=expected, commit=commit, tick=tick
            )
        found = damaged_pages(store)
        row.damaged_pages, self._damaged_told = found - self._damaged_told, found
        self.rows.append(row)
        return row

    def _recompute(self, prompt: Prompt, name: str) -> Recomputed:
        if self.session.is_recomputed(prompt):
            return self.session.recompute(prompt)
        with self.steps.step(f"{name}: recomputing {len(prompt.ids):,} tokens") as tick:
            return self.session.recompute(prompt, tick)

    def _touch(self, store: Store) -> None:
        """Use the document once, so that each tier holds of it what it can."""
        with self.steps.step(f"store reopened, {len(self.other.ids):,} tokens read once"):
            self.session.load_only(store, self.other)

    def _flush(self, store: Store) -> None:
        started_ns = time.perf_counter_ns()
        if not store.flush():
            raise TierKVError("the cold tier did not take everything in time; see the log")
        self.facts.setdefault("flush_s", (time.perf_counter_ns() - started_ns) / 1e9)

    def _restart(self) -> None:
        expected = self._recompute(self.last, promise.RESTARTED)
        order = Order(
            checkpoint=str(self.session.path),
            directory=str(self.directory),
            capacities=Capacities(device=0, host=self._roomy, cold=self._cold_bytes),
            prompt=list(self.last.ids),
            new_tokens=self.session.new_tokens,
            expected_tokens=expected.tokens,
            recompute_ttft_s=expected.ttft_s,
            name=promise.RESTARTED,
            note="a new process",
        )
        with self.steps.step(f"{promise.RESTARTED}: a new process"):
            result = answer_in_new_process(order)
        self.rows.append(result.row)
        self._damaged_pages += result.row.damaged_pages
        self.facts["restart_open_s"] = result.open_s
        self.facts["processes"] = [os.getpid(), result.process]


def _row_without(prompt: Prompt, expected: Recomputed, session: Session) -> Row:
    return Row(
        name=promise.WITHOUT,
        note="plain transformers, the whole prompt computed",
        prompt_tokens=len(prompt.ids),
        ttft_s=expected.ttft_s,
        recompute_ttft_s=expected.ttft_s,
        total_s=expected.total_s,
        answer=session.text_of(expected.tokens),
        answer_tokens=expected.tokens,
        tokens_identical=True,
    )


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that two prompts share from their start."""
    for number, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return number
    return min(len(left), len(right))


def _machine() -> dict[str, object]:
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {"tierkv": tierkv.__version__} | versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
