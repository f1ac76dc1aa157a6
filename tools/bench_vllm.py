"""What vLLM gains and pays by `TierKVConnector`: SmolLM2 on the CPU, a process for each engine.

    python tools/bench_vllm.py [--quick] [--json FILE] [--check] [--rows A,B,..]

vLLM is in `.venv-vllm` (`make engines` installs it), or where TIERKV_VLLM_PYTHON says. `ttft`: the
first token of prompts of 4,000 tokens that the engine's own cache has lost, from host memory and,
after a restart, from disk, over recomputing them. `idle`: tokens a second of prompts that are never
seen again, with the connector over without. `example`: the same first tokens against vLLM's own
example connector, and bytes on disk against payload. `steps`: what the scheduler's thread does in a
step of 64 running requests, and for the lookup of a prompt of 2,048 blocks. `identical`: answers
that are the same with and without.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec
import numpy as np
from measuring import Row, options_of, report, scratch

from tierkv.demo.model import checkpoint
from tierkv.engines.vllm.mirror import MEMORY, Report
from tierkv.engines.vllm.scheduler import SchedulerSide
from tierkv.testing.life import Answer, Ask, Life, Said

ROOT: Final = Path(__file__).resolve().parent.parent
PYTHON: Final = os.environ.get("TIERKV_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
BLOCK: Final = 32
#: SmolLM2-135M in float32.
TOKEN_BYTES: Final = 46_080

ROWS: Final = "ttft,idle,example,steps,identical"
TITLE: Final = "vLLM with tierkv, against vLLM without"


def main() -> int:
    """Run the chosen rows; see the module."""
    options = options_of(__doc__.splitlines()[0], ROWS).parse_args()
    rows: list[Row] = []
    for name, measure in (
        ("ttft", ttft_rows),
        ("idle", idle_rows),
        ("example", example_rows),
        ("steps", step_rows),
        ("identical", identical_rows),
    ):
        if name in options.rows:
            with scratch(options.directory) as place:
                try:
                    rows += measure(Path(place), options.quick)
                except SystemExit:
                    report(rows, options, TITLE)  # what was measured until an engine failed
                    raise
    return report(rows, options, TITLE)


def ask(document: int, question: int, tokens: int, count: int) -> Ask:
    """A document that nobody wrote, a question, and how many tokens to answer."""
    text, asked = random.Random(f"{document}"), random.Random(f"{document}/{question}")
    ids = [text.randrange(100, 40_000) for _ in range(tokens - 16)]
    ids += [asked.randrange(100, 40_000) for _ in range(16)]
    return Ask(tokens=ids, count=count)


def lived(
    place: Path,
    turns: Sequence[list[Ask]],
    kv: Path | None,
    settings: Mapping[str, object] = MappingProxyType({}),
    *,
    host: str = "1GiB",
) -> Said:
    """A life of an engine, after a turn that warms it up and is not told of."""
    model = {"model": str(checkpoint(lambda _what, _part: None)), "skip_tokenizer_init": True}
    life = Life(
        turns=[[ask(-1, 0, 200, 2)], *turns],
        directory=None if kv is None else str(kv),
        host=host,
        cold="4GiB",
        settings=model | dict(settings),
    )
    order, answer, log = place / "order.json", place / "answer.json", place / "log"
    order.write_bytes(msgspec.json.encode(life))
    with log.open("w") as out:
        code = subprocess.call(
            [PYTHON, ROOT / "tools" / "vllm_life.py", order, answer],
            stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    if code:
        sys.exit(f"the engine ended with {code}:\n{log.read_text()[-3000:]}")
    said = msgspec.json.decode(answer.read_bytes(), type=Said)
    return msgspec.structs.replace(said, turns=said.turns[1:], seconds=said.seconds[1:])


def ttft_rows(place: Path, quick: bool) -> list[Row]:
    """First tokens from host memory and from disk, over recomputing."""
    documents, tokens = (1, 1000) if quick else (3, 4000)
    asked = [[[ask(document, question, tokens, 1)] for document in range(documents)]
             for question in range(3)]  # fmt: skip
    plain = lived(place, asked[0], None).seconds
    first = lived(place, asked[0] + asked[1], place / "kv").seconds
    host = first[documents:]
    disk = lived(place, asked[2], place / "kv").seconds
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
            asked = [[ask(100 + 1000 * number + 10 * turn + one, 0, 300, 32) for one in range(8)]
                     for turn in range(turns)]  # fmt: skip
            kv = place / f"kv-{number}" if name == "with" else None
            seconds[name].append(lived(place, asked, kv).seconds)
    ratios = np.array(seconds["without"]) / np.array(seconds["with"])
    note = f"{lives * turns} pairs of 8 prompts of 300 and 32 new tokens, {ratios.std():.3f} apart"
    return [Row("tokens a second, nothing used again", float(np.median(ratios)), 0.98, True,
                "x without", note)]  # fmt: skip


def example_rows(place: Path, quick: bool) -> list[Row]:
    """Against the connector that vLLM ships as an example: a file for each layer."""
    documents, tokens = (1, 1000) if quick else (3, 2000)
    asked = [[ask(document, 0, tokens, 1)] for document in range(documents)]
    theirs = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(place / "example")},
    }
    # The example finds whole prompts only, and cannot load one that was computed in pieces.
    batch = {"max_num_batched_tokens": 4608}
    found: dict[str, list[float]] = {}
    for name, kv, told in (
        ("example", None, batch | {"kv_transfer_config": theirs}),
        ("tierkv", place / "kv", batch),
    ):
        found[f"{name}, in the same life"] = lived(place, asked + asked, kv, told).seconds[
            documents:
        ]
        found[f"{name}, after a restart"] = lived(place, asked, kv, told).seconds
        for file in place.rglob("*"):
            if file.is_file():
                forget(file)
        found[f"{name}, after a restart of the machine"] = lived(place, asked, kv, told).seconds
    rows = []
    for what, reach in (
        ("in the same life", 0.5),
        ("after a restart", None),
        ("after a restart of the machine", 0.5),
    ):
        ours, example = found[f"tierkv, {what}"], found[f"example, {what}"]
        ratio = float(np.median(np.array(ours) / np.array(example)))
        note = f"{np.median(ours):.3f} s, the example {np.median(example):.3f} s"
        rows.append(Row(f"first token of {tokens:,} {what}", ratio, reach, False, "x example",
                        note))  # fmt: skip
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
    in_use = stored["disk_bytes"] / payload
    return [*rows, Row("bytes on disk in use", in_use, 1.02, False, "x payload", files)]


def forget(file: Path) -> None:
    """Have the kernel hold nothing of a file in memory."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def identical_rows(place: Path, quick: bool) -> list[Row]:
    """Greedy tokens with and without, of documents that fit neither vLLM's cache nor memory.

    vLLM has room for 3 documents, host memory for 6 and the disk for all; two lives.
    """
    prompts = 20 if quick else 200
    order = random.Random(1)
    asks = [ask(order.randrange(prompts // 8), n, 400, 12) for n in range(prompts)]
    turns = [asks[at : at + 4] for at in range(0, prompts, 4)]
    settings = {"num_gpu_blocks_override": 64, "max_model_len": 1024}
    plain = lived(place, turns, None, settings).turns
    half = len(turns) // 2
    ours: list[list[Answer]] = []
    reused = 0
    for part in (turns[:half], turns[half:]):
        said = lived(place, part, place / "kv", settings, host="128MiB")
        ours += said.turns
        reused += sum(answer.reused for turn in said.turns for answer in turn)
    same = sum(
        mine.tokens == without.tokens
        for turn, expected in zip(ours, plain, strict=True)
        for mine, without in zip(turn, expected, strict=True)
    )
    note = f"{reused:,} of {400 * prompts:,} prompt tokens reused"
    return [Row(f"identical answers of {prompts}", float(same), prompts, True, "prompts", note)]


@dataclass
class Request:
    """As vLLM's, as far as it is used."""

    request_id: str
    num_tokens: int
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    priority: int = 0


def step_rows(place: Path, quick: bool) -> list[Row]:
    """What the scheduler's thread does."""
    steps = 200 if quick else 2000
    del place
    side = SchedulerSide(block_tokens=BLOCK, block_bytes=BLOCK * TOKEN_BYTES)
    long = Request("long", 2048 * BLOCK + 1, [os.urandom(32) for _ in range(2048)])
    known = [os.urandom(32) for _ in range(200_000)] + long.block_hashes
    side.told([Report(0, [dict.fromkeys(known, MEMORY)])])
    looked = timed(lambda: side.matched(long, 0), 200)
    assert side.matched(long, 0)[0] == 2048 * BLOCK
    running = [Request(str(n), 1, [os.urandom(32) for _ in range(256)]) for n in range(64)]
    places = [list(range(256)) for _ in running]
    for request, held in zip(running, places, strict=True):
        side.allocated(request, [held], 0)
    at = 0

    def step() -> None:
        nonlocal at
        at += 1
        for request in running:
            side.scheduled(request.request_id, None, at, 1)
        saved = side.step().saves
        changes: dict[bytes, int] = {
            key: MEMORY for blocks in saved for key in blocks.keys[blocks.first :]
        }
        side.told([Report(0, [changes])])

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
