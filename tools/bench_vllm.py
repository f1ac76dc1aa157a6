"""What vLLM gains and pays by `TierKVConnector`: SmolLM2 on the CPU, a process for each engine.

    python tools/bench_vllm.py [--quick] [--json FILE] [--check] [--rows ttft,idle,example,steps]

vLLM is in `.venv-vllm` (`make engines` installs it), or where TIERKV_VLLM_PYTHON says. `ttft`: the
first token of prompts of 4,000 tokens that the engine's own cache has lost, from host memory and,
after a restart, from disk, over recomputing them. `idle`: tokens a second of prompts that are never
seen again, with the connector over without. `example`: the same first tokens against vLLM's own
example connector, and bytes on disk against payload. `steps`: what the scheduler's thread does in a
step of 64 running requests, and for the lookup of a prompt of 2,048 blocks.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from measuring import Row, options_of, report, scratch

from tierkv.config import Config
from tierkv.core.geometry import Form, KVGeometry, Layout
from tierkv.demo.model import checkpoint
from tierkv.engines.vllm.scheduler import SchedulerSide
from tierkv.store import Store

ROOT: Final = Path(__file__).resolve().parent.parent
PYTHON: Final = os.environ.get("TIERKV_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
BLOCK: Final = 32
#: SmolLM2-135M in float32.
TOKEN_BYTES: Final = 46_080

Turn = list[dict[str, Any]]


def main() -> int:
    """Run the chosen rows; see the module."""
    options = options_of(__doc__.splitlines()[0], "ttft,idle,example,steps").parse_args()
    rows: list[Row] = []
    for name, measure in (
        ("ttft", ttft_rows),
        ("idle", idle_rows),
        ("example", example_rows),
        ("steps", step_rows),
    ):
        if name in options.rows:
            with scratch(options.directory) as place:
                rows += measure(Path(place), options.quick)
    return report(rows, options, "vLLM with tierkv, against vLLM without")


def prompt(document: int, question: int, tokens: int, count: int) -> dict[str, Any]:
    """A document that nobody wrote, a question, and how many tokens to answer."""
    text, asked = random.Random(f"{document}"), random.Random(f"{document}/{question}")
    ids = [text.randrange(100, 40_000) for _ in range(tokens - 16)]
    return {"tokens": [*ids, *(asked.randrange(100, 40_000) for _ in range(16))], "count": count}


def connector(place: Path) -> dict[str, Any]:
    """What vLLM is told of ours."""
    return {
        "kv_connector": "TierKVConnector",
        "kv_connector_module_path": "tierkv.engines.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": "1GiB", "cold": "4GiB", "directory": str(place)},
    }


def life(
    place: Path, turns: Sequence[Turn], told: dict[str, Any] | None, **settings: object
) -> list[float]:
    """Seconds of each turn of an engine, after one that warms it up."""
    warm = [prompt(-1, 0, 200, 2)]
    order = {
        "model": str(checkpoint(lambda _what, _part: None)),
        "turns": [warm, *turns],
        "connector": told,
        "settings": settings,
    }
    (place / "order.json").write_text(json.dumps(order))
    log = place / "log"
    with log.open("w") as out:
        code = subprocess.call(
            [PYTHON, ROOT / "tools" / "vllm_life.py", place / "order.json", place / "answer.json"],
            stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    if code:
        sys.exit(f"the engine ended with {code}:\n{log.read_text()[-3000:]}")
    answer = json.loads((place / "answer.json").read_text())
    return [turn["seconds"] for turn in answer["turns"]][1:]


def ttft_rows(place: Path, quick: bool) -> list[Row]:
    """First tokens from host memory and from disk, over recomputing."""
    documents, tokens = (1, 1000) if quick else (3, 4000)
    ask = [[[prompt(document, question, tokens, 1)] for document in range(documents)]
           for question in range(3)]  # fmt: skip
    plain = life(place, ask[0], None)
    told = connector(place / "kv")
    first = life(place, ask[0] + ask[1], told)
    host = first[documents:]
    disk = life(place, ask[2], told)
    rows = []
    for what, found, reach in (
        ("host memory", host, 1 / 8),
        ("disk, after a restart", disk, 1 / 6),
    ):
        ratio = float(np.median(np.array(found) / np.array(plain)))
        note = f"{np.median(found):.2f} s instead of {np.median(plain):.2f} s"
        name = f"first token of {tokens:,}, prefix from {what}"
        rows.append(Row(name, ratio, reach, False, "x recomputed", note))
    cost = float(np.median(np.array(first[:documents]) / np.array(plain)))
    rows.append(Row(f"first token of {tokens:,}, stored for the first time", cost, None, False,
                    "x recomputed"))  # fmt: skip
    return rows


def idle_rows(place: Path, quick: bool) -> list[Row]:
    """Tokens a second where nothing is ever used again."""
    lives, turns = (1, 2) if quick else (3, 4)
    seconds: dict[str, list[list[float]]] = {"without": [], "with": []}
    for number in range(lives):
        names = ["without", "with"] if number % 2 == 0 else ["with", "without"]
        for name in names:
            asked = [[prompt(100 + 1000 * number + 10 * turn + one, 0, 300, 32) for one in range(8)]
                     for turn in range(turns)]  # fmt: skip
            told = connector(place / f"kv-{number}") if name == "with" else None
            seconds[name].append(life(place, asked, told))
    ratios = np.array(seconds["without"]) / np.array(seconds["with"])
    note = f"{lives * turns} pairs of 8 prompts of 300 and 32 new tokens, {ratios.std():.3f} apart"
    return [Row("tokens a second, nothing used again", float(np.median(ratios)), 0.98, True,
                "x without", note)]  # fmt: skip


def example_rows(place: Path, quick: bool) -> list[Row]:
    """Against the connector that vLLM ships as an example: a file for each layer."""
    documents, tokens = (1, 1000) if quick else (3, 2000)
    ask = [[prompt(document, 0, tokens, 1)] for document in range(documents)]
    theirs = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(place / "example")},
    }
    found = {}
    for name, told in (("example", theirs), ("ours", connector(place / "kv"))):
        # The example finds whole prompts only, and cannot load one that was computed in pieces.
        life(place, ask, told, max_num_batched_tokens=4608)
        found[name] = life(place, ask, told, max_num_batched_tokens=4608)
    ratio = float(np.median(np.array(found["ours"]) / np.array(found["example"])))
    note = f"{np.median(found['ours']):.2f} s, the example {np.median(found['example']):.2f} s"
    check = [
        sys.executable,
        "-m",
        "tierkv.cli",
        "check",
        "--json",
        str(place / "check"),
        str(place / "kv"),
    ]
    subprocess.run(check, capture_output=True, check=True)
    (layout,) = json.loads((place / "check").read_text())["layouts"]
    stored = layout["namespaces"]["default"]
    payload = stored["blocks"] * BLOCK * TOKEN_BYTES
    files = f"{stored['blocks']} blocks; the file is preallocated, {layout['disk_bytes']:,} bytes"
    return [
        Row(f"first token of {tokens:,} after a restart", ratio, 0.5, False, "x example", note),
        Row(
            "bytes on disk in use", stored["disk_bytes"] / payload, 1.02, False, "x payload", files
        ),
    ]


@dataclass
class Request:
    """As vLLM's, as far as it is used."""

    request_id: str
    num_tokens: int
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0


def step_rows(place: Path, quick: bool) -> list[Row]:
    """What the scheduler's thread does, on a real store."""
    steps = 200 if quick else 2000
    config = Config.model_validate({"block_tokens": BLOCK, "tiers": {
        "device": {"capacity": 0, "device": "cpu"}, "host": {"capacity": "64MiB"}}})  # fmt: skip
    geometry = KVGeometry(layers=30, kv_heads=1, head_dim=16, dtype="uint8", form=Form.LATENT)
    layout = Layout(geometry, block_tokens=BLOCK, targets=config.pages.targets, model="m")
    del place
    with Store.open(config, layout) as store:
        side = SchedulerSide(store, block_tokens=BLOCK)
        long = Request("long", 2048 * BLOCK + 1, [os.urandom(32) for _ in range(2048)])
        data = np.zeros((30, 2048, BLOCK * 16), np.uint8)
        assert store.put_keys(side._keys(long, 2048), data) == 2048
        looked = timed(lambda: side.matched(long, 0), 200)
        assert side.matched(long, 0)[0] == 2048 * BLOCK
        running = [Request(str(n), 1, [os.urandom(32) for _ in range(256)]) for n in range(64)]
        places = [list(range(256)) for _ in running]
        for request, held in zip(running, places, strict=True):
            side.allocated(request, held, 0)
        at = 0

        def step() -> None:
            nonlocal at
            at += 1
            for request, held in zip(running, places, strict=True):
                side.scheduled(request.request_id, held, at, 1)
            side.step(is_idle=False)

        taken = timed(step, steps)
    p50, p99 = np.percentile(taken, [50, 99]) * 1e6
    return [
        Row("scheduler's thread, a step of 64 requests, p50", float(p50), 200, False, "us"),
        Row("scheduler's thread, a step of 64 requests, p99", float(p99), 1000, False, "us"),
        Row("lookup of 2,048 blocks, median", float(np.median(looked)) * 1e3, 1, False, "ms"),
    ]


def timed(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


if __name__ == "__main__":
    raise SystemExit(main())
