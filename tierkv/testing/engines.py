"""The suite that every engine's adapter inherits, lived by real engines in processes of their own.

A subclass of `EngineTests` names a `program` (see `tierkv.testing.life`) and may set the sizes.
What is promised of every engine: with tierkv the tokens are those of the engine without it,
whatever happens to a tier, a process or an asker; and what was stored is found again. Needs pytest.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from tierkv.testing.life import Ask, Life, Said, Trouble

_LIFE_S = 600
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 it is looked at, and nothing is made there


class EngineDriver(ABC):
    """Lives lives, and compares what is said with an engine without tierkv."""

    #: Tokens of a block.
    block_tokens: ClassVar[int] = 32
    #: Tokens of a document, which questions follow; enough to be worth reusing.
    document_tokens: ClassVar[int] = 640
    #: Token ids are below.
    vocabulary: ClassVar[int] = 40_000
    #: Host memory that holds one document and not two.
    small_host: ClassVar[str] = "64MiB"
    #: Bytes on disk after which some can be found again; 0: whether a life writes any is open.
    durable_bytes: ClassVar[int] = 0
    seed: ClassVar[int] = 1
    #: What the engine is told in its own words, in every life.
    settings: ClassVar[dict[str, Any]] = {}
    #: The answers without tierkv, by model, dtype and turns: they are the same in every test.
    _plain: ClassVar[dict[str, list[list[list[int]]]]] = {}

    @property
    @abstractmethod
    def program(self) -> Sequence[str | Path]:
        """The command that lives a life; the two files are added to it."""

    # ---- what is asked

    def ask(self, document: int, question: int, *, tenant: str = "", count: int = 8,
            is_cancelled: bool = False) -> Ask:  # fmt: skip
        """A document that nobody wrote and a question about it."""
        text = random.Random(f"{self.seed}/{document}")
        asked = random.Random(f"{self.seed}/{document}/{question}")
        tokens = [text.randrange(100, self.vocabulary) for _ in range(self.document_tokens)]
        tokens += [asked.randrange(100, self.vocabulary) for _ in range(self.block_tokens // 2 + 3)]
        return Ask(tokens=tokens, count=count, tenant=tenant, is_cancelled=is_cancelled)

    @property
    def whole(self) -> int:
        """Tokens of a document in whole blocks."""
        return self.document_tokens // self.block_tokens * self.block_tokens

    # ---- living

    def started(self, place: Path, life: Life) -> subprocess.Popen[bytes]:
        """A process that lives; its log is beside the order."""
        (place / "order.json").write_bytes(msgspec.json.encode(life))
        (place / "answer.json").unlink(missing_ok=True)
        with (place / "log").open("ab") as log:
            return subprocess.Popen(
                [*map(str, self.program), str(place / "order.json"), str(place / "answer.json")],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def live(self, place: Path, life: Life) -> Said:
        """Live one life to its end."""
        process = self.started(place, life)
        try:
            code = process.wait(_LIFE_S)
        finally:
            process.kill()
        log = (place / "log").read_text(errors="replace")
        assert code == 0, f"seed {self.seed}: the engine ended with {code}\n{log[-6000:]}"
        return msgspec.json.decode((place / "answer.json").read_bytes(), type=Said)

    def life(self, place: Path, *turns: list[Ask], **more: object) -> Life:
        """A life with tierkv in `place`."""
        settings = {**self.settings, **more.pop("settings", {})}  # type: ignore[dict-item]
        life = Life(turns=list(turns), directory=str(place / "kv"), settings=settings)
        return msgspec.structs.replace(life, **more)

    def plain(self, place: Path, life: Life) -> list[list[list[int]]]:
        """The tokens of the same life without tierkv and without trouble."""
        bare = msgspec.structs.replace(life, directory=None, trouble=None)
        name = f"{type(self).__name__} {msgspec.json.encode(bare).decode()}"
        if name not in self._plain:
            self._plain[name] = tokens_of(self.live(place, bare))
        return self._plain[name]

    def check(self, place: Path, life: Life) -> Said:
        """Live, and have the tokens of an engine without tierkv. Cancelled asks are not compared.

        Every turn is compared with what was said to it alone.
        """
        said = self.live(place, life)
        for turn, asks, expected in zip(
            tokens_of(said), life.turns, self.plain(place, life), strict=True
        ):
            for found, ask, tokens in zip(turn, asks, expected, strict=True):
                if not ask.is_cancelled:
                    assert found == tokens, f"seed {self.seed}: other tokens than without tierkv"
        return said

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """A directory for one test's files."""
        return tmp_path


class EngineTests(EngineDriver):
    """The promises; see the module."""

    def test_tokens_are_the_same_and_hits_are_counted_in_one_life_and_the_next(
        self, place: Path
    ) -> None:
        life = self.life(
            place, [self.ask(0, 0)], [self.ask(0, 1), self.ask(0, 2)], [self.ask(1, 0)]
        )
        assert reused_of(self.check(place, life)) == [[0], [self.whole, self.whole], [0]]
        again = reused_of(self.check(place, life))
        assert min(min(turn) for turn in again) >= self.whole

    def test_documents_that_do_not_fit_in_host_memory_come_back_from_the_disk(
        self, place: Path
    ) -> None:
        turns = [[self.ask(n, 0)] for n in range(3)] + [[self.ask(n, 1)] for n in range(3)]
        said = self.check(place, self.life(place, *turns, host=self.small_host))
        assert reused_of(said)[3:] == [[self.whole]] * 3

    def test_documents_that_do_not_fit_on_the_disk_are_computed_again(self, place: Path) -> None:
        turns = [[self.ask(n, 0)] for n in range(4)] + [[self.ask(n, 1)] for n in range(4)]
        said = self.check(
            place, self.life(place, *turns, host=self.small_host, cold=self.small_host)
        )
        found = [turn[0] for turn in reused_of(said)[4:]]
        assert 0 in found or min(found) < self.whole, "nothing had to go, so this tests nothing"

    def test_many_asks_at_once_get_their_own_tokens(self, place: Path) -> None:
        asks = [self.ask(n % 3, n) for n in range(8)]
        said = self.check(place, self.life(place, asks, [self.ask(n % 3, n + 8) for n in range(8)]))
        assert min(reused_of(said)[1]) >= self.whole

    def test_tenants_share_nothing(self, place: Path) -> None:
        life = self.life(
            place,
            [self.ask(0, 0, tenant="alice")],
            [self.ask(0, 0, tenant="bob")],
            [self.ask(0, 0)],
            [self.ask(0, 0, tenant="alice"), self.ask(0, 0, tenant="bob")],
        )
        found = reused_of(self.check(place, life))
        assert found[:3] == [[0], [0], [0]]
        assert min(found[3]) >= self.whole

    def test_another_model_and_another_dtype_under_the_same_directory_find_nothing(
        self, place: Path
    ) -> None:
        first = self.life(place, [self.ask(0, 0)])
        self.check(place, first)
        for other in ({"model": "second"}, {"dtype": "bfloat16"}):
            said = self.check(place, self.life(place, [self.ask(0, 0)], **other))
            assert reused_of(said) == [[0]], f"{other} found what is another's"
        assert reused_of(self.check(place, first)) >= [[self.whole]]

    @pytest.mark.parametrize("trouble", [Trouble.READS_FAIL, Trouble.READS_FLIP])
    def test_a_disk_that_cannot_be_read_costs_a_recompute_and_no_token(
        self, place: Path, trouble: Trouble
    ) -> None:
        turns = [[self.ask(0, 0), self.ask(1, 0), self.ask(2, 0)]]
        self.check(place, self.life(place, *turns))
        self.check(place, self.life(place, *turns, turns[0], trouble=trouble))

    @pytest.mark.parametrize(
        "trouble", [Trouble.WRITES_FAIL, Trouble.DISK_FULL, Trouble.HOST_FAILS]
    )
    def test_a_tier_that_takes_nothing_costs_a_recompute_and_no_token(
        self, place: Path, trouble: Trouble
    ) -> None:
        turns = [[self.ask(0, 0), self.ask(1, 0)], [self.ask(0, 1), self.ask(1, 1)]]
        self.check(place, self.life(place, *turns, trouble=trouble))
        self.check(place, self.life(place, *turns))

    def test_wrong_bytes_that_nobody_verifies_change_tokens(self, place: Path) -> None:
        """So the tests above can fail."""
        life = self.life(place, [self.ask(0, 0)])
        self.check(place, life)
        believing = msgspec.structs.replace(life, trouble=Trouble.BELIEVED)
        said = self.live(place, believing)
        assert reused_of(said)[0][0] > 0
        assert tokens_of(said) != self.plain(place, life)

    def test_an_asker_who_goes_away_harms_nobody(self, place: Path) -> None:
        gone = self.ask(0, 1, count=64, is_cancelled=True)
        life = self.life(
            place, [gone, self.ask(1, 0)], [self.ask(0, 1), gone, self.ask(1, 1)], [self.ask(0, 2)]
        )
        said = self.check(place, life)
        assert reused_of(said)[2][0] >= self.whole

    def test_a_killed_engine_leaves_what_was_durable_and_nothing_in_the_way(
        self, place: Path
    ) -> None:
        turns = [[self.ask(n, 0)] for n in range(6)]
        life = self.life(place, *turns)
        expected = self.plain(place, life)
        memory = unused_memory()
        process = self.started(place, life)
        ends = time.monotonic() + _LIFE_S
        while (begun := written(place / "kv")) <= self.durable_bytes and time.monotonic() < ends:
            if process.poll() is not None:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert begun, (place / "log").read_text(errors="replace")[-6000:]
        again = self.live(place, life)
        assert tokens_of(again) == expected
        assert not self.durable_bytes or max(max(turn) for turn in reused_of(again)) > 0
        assert not list((place / "kv").rglob("*.tmp"))
        assert unused_memory() <= memory


def tokens_of(said: Said) -> list[list[list[int]]]:
    """The new tokens by turn and ask."""
    return [[answer.tokens for answer in turn] for turn in said.turns]


def reused_of(said: Said) -> list[list[int]]:
    """The reused tokens by turn and ask."""
    return [[answer.reused for answer in turn] for turn in said.turns]


def unused_memory() -> set[str]:
    """Shared memory that no process has mapped or open: what somebody has left behind."""
    used = ""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it has ended, or is another user's
                used += (process / "maps").read_text()
                used += "\n".join(map(os.readlink, (process / "fd").iterdir()))
    return {str(file) for file in _SHARED_MEMORY.iterdir() if str(file) not in used}


def written(directory: Path) -> int:
    """Bytes that segments have been given; room that is only set aside does not count."""
    total = 0
    for file in directory.rglob("segment-*"):
        with suppress(OSError), file.open("rb", buffering=0) as opened:
            at, end = 0, file.stat().st_size
            while at < end:
                first = os.lseek(opened.fileno(), at, os.SEEK_DATA)  # OSError: no more of it
                at = os.lseek(opened.fileno(), first, os.SEEK_HOLE)
                total += at - first
    return total
