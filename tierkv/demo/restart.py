"""The second process of the demo: opens the directory that the first one left, and answers.

Run as ``python -m tierkv.demo.restart`` with an `Order` as JSON on stdin; prints a `Result` as
JSON on the last line of stdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import tierkv
from tierkv.config import Config
from tierkv.core.errors import TierKVError
from tierkv.demo.row import Row

if TYPE_CHECKING:
    from tierkv.store import Store

#: Loading the model and answering take seconds; a child that hangs must not hang the demo.
TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacities:
    """Bytes of each tier of a demo's store."""

    device: int
    host: int
    cold: int

    def config(self, directory: Path) -> Config:
        """The configuration of a store whose cold tier lives in `directory`."""
        cold = {
            "capacity": self.cold,
            "directory": str(directory),
            "segment_cold_pages": 2,  # small files: a demo must not reserve gigabytes
        }
        tiers = {"device": {"capacity": self.device}, "host": {"capacity": self.host}, "cold": cold}
        return Config.model_validate({"tiers": tiers})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the new process shall do."""

    checkpoint: str
    directory: str
    capacities: Capacities
    prompt: list[int]
    new_tokens: int
    expected_tokens: list[int]
    recompute_ttft_s: float
    name: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What it found."""

    row: Row
    open_s: float
    process: int


def damaged_pages(store: Store) -> int:
    """Pages on NVMe that a store has found damaged, torn or unreadable since it was opened.

    Each error of the disk counts as one, also that of a write.
    """
    found = store.snapshot()["tiers"]
    names = ("cold,pages_corrupt", "cold,pages_torn", "cold,io_errors")
    return sum(found[name] for name in names)


def answer_in_new_process(order: Order) -> Result:
    """Start the other process and wait for its answer. Raises TierKVError with its last words."""
    root = str(Path(tierkv.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tierkv.demo.restart"],
            input=msgspec.json.encode(order),
            capture_output=True,
            timeout=TIMEOUT_S,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TierKVError(f"the new process gave no answer in {TIMEOUT_S:.0f} s") from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        words = done.stderr.decode(errors="replace").strip()[-2000:]
        raise TierKVError(f"the new process ended with status {done.returncode}: {words}")
    return msgspec.json.decode(lines[-1], type=Result)


def main() -> int:
    """The body of the new process."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tierkv.demo.session import Prompt, Recomputed, Session, quiet
    from tierkv.store import Store

    quiet()
    session = Session(Path(order.checkpoint), new_tokens=order.new_tokens)
    session.warm_up()
    config = order.capacities.config(Path(order.directory))
    started_ns = time.perf_counter_ns()
    with Store.open(config, session.layout) as store:
        open_s = (time.perf_counter_ns() - started_ns) / 1e9
        expected = Recomputed(order.expected_tokens, order.recompute_ttft_s, 0.0)
        row = session.answer(
            store,
            Prompt(tuple(order.prompt)),
            name=order.name,
            note=order.note,
            expected=expected,
        )
        row.damaged_pages = damaged_pages(store)
    result = Result(row=row, open_s=open_s, process=os.getpid())
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(result) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
