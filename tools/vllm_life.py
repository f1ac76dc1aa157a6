"""One life of a vLLM engine, in a process of its own: what it is asked is JSON, and what it says.

    python tools/vllm_life.py ORDER.json ANSWER.json

The order: `model`, `connector` (a KV transfer configuration, or null), `settings` of the engine,
`believes` (do not verify what the disk gives), `fails` (every so-manieth read of the disk fails),
and `turns`, lists of prompts that are answered together: `tokens`, `count`, `salt`. Before each
turn but the first the engine's own prefix cache is emptied. The answer has for each turn its
seconds, for each prompt the new tokens and how many were cached, and the engine's counters.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)


def main() -> None:
    """Carry an order out."""
    from vllm import LLM, SamplingParams

    order = json.loads(Path(sys.argv[1]).read_text())
    damage(order)
    settings: dict[str, Any] = {
        "model": order["model"],
        "dtype": "float32",
        "max_model_len": 4608,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 8,
        "block_size": 32,
        "enforce_eager": True,
        "disable_log_stats": False,
        "distributed_executor_backend": "uni",
        **order.get("settings", {}),
    }
    if order["connector"]:
        settings["kv_transfer_config"] = order["connector"]
    llm = LLM(**settings)
    turns = []
    for number, prompts in enumerate(order["turns"]):
        if number:
            assert llm.reset_prefix_cache()
        asked = [
            {"prompt_token_ids": prompt["tokens"]}
            | ({"cache_salt": prompt["salt"]} if "salt" in prompt else {})
            for prompt in prompts
        ]
        sampling = [
            SamplingParams(temperature=0, max_tokens=prompt["count"], ignore_eos=True)
            for prompt in prompts
        ]
        start = time.perf_counter()
        done = llm.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        said = [
            {"tokens": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens}
            for one in done
        ]
        turns.append({"seconds": seconds, "said": said})
    counters: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            counters[metric.name] = counters.get(metric.name, 0) + metric.value
    llm.llm_engine.engine_core.shutdown()
    Path(sys.argv[2]).write_text(json.dumps({"turns": turns, "counters": counters}))


def damage(order: dict[str, Any]) -> None:
    """Make the disk worse, or nobody notice that it is."""
    if order.get("believes"):
        from tierkv.tiers import segment_io

        vars(segment_io)["verify_page"] = lambda *_, **__: None
    if order.get("fails"):
        from tierkv.tiers.files.direct import DirectFiles

        calls, real = itertools.count(1), DirectFiles.read

        def read(self: DirectFiles, handle: int, offset: int, buffers: list[memoryview]) -> None:
            if sum(map(len, buffers)) > 8192 and not next(calls) % order["fails"]:
                raise OSError(errno.EIO, "a bad sector")
            real(self, handle, offset, buffers)

        setattr(DirectFiles, "read", read)  # noqa: B010 a method is not assigned to otherwise


if __name__ == "__main__":
    main()
