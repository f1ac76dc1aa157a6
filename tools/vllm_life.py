"""One life of a vLLM engine, in a process of its own; see `tierkv.testing.life`.

`settings` are vLLM's, with the checkpoint as `model`; `kv_transfer_config` among them replaces
tierkv's. A tenant is a `cache_salt`. `reused` are the tokens that vLLM says were cached. The model
"second" is the same checkpoint with one weight changed.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

from tierkv.testing.life import Answer, Ask, Life, Said, main  # noqa: E402 vLLM reads it on import

#: New tokens after which an asker goes away.
_GONE_AFTER = 3


def live(life: Life) -> Said:
    """Start vLLM, ask it, and end it."""
    from vllm import LLM

    llm = LLM(**settings_of(life))
    turns, seconds = [], []
    for number, asks in enumerate(life.turns):
        if number:
            assert llm.reset_prefix_cache()
        start = time.perf_counter()
        turns.append(answers(llm.llm_engine, asks, f"turn-{number}"))
        seconds.append(time.perf_counter() - start)
    counters: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            counters[metric.name] = counters.get(metric.name, 0) + metric.value
    llm.llm_engine.engine_core.shutdown()
    return Said(turns=turns, seconds=seconds, counters=counters)


def settings_of(life: Life) -> dict[str, Any]:
    """What vLLM is started with."""
    settings: dict[str, Any] = {
        "dtype": life.dtype,
        "max_model_len": 4608,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 8,
        "block_size": 32,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    if life.directory is not None:
        settings["kv_transfer_config"] = {
            "kv_connector": "TierKVConnector",
            "kv_connector_module_path": "tierkv.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "host": life.host,
                "cold": life.cold,
                "directory": life.directory,
            },
        }
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        settings["distributed_executor_backend"] = "uni"
    settings |= life.settings
    if life.model == "second":
        settings["model"] = changed(Path(settings["model"]))
    return settings


def answers(engine: Any, asks: list[Ask], turn: str) -> list[Answer]:  # noqa: ANN401 vLLM's
    """Ask them all at once, and step until all have answered or gone."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names = {f"{turn}-{number}": ask for number, ask in enumerate(asks)}
    for name, ask in names.items():
        prompt: dict[str, Any] = {"prompt_token_ids": ask.tokens}
        if ask.tenant:
            prompt["cache_salt"] = ask.tenant
        sampling = SamplingParams(
            temperature=0, max_tokens=ask.count, ignore_eos=True, detokenize=False
        )
        sampling.output_kind = RequestOutputKind.CUMULATIVE
        engine.add_request(name, prompt, sampling)
    done: dict[str, Answer] = {}
    while engine.has_unfinished_requests():
        for said in engine.step():
            name = said.request_id
            tokens = list(said.outputs[0].token_ids)
            done[name] = Answer(tokens=tokens, reused=said.num_cached_tokens or 0)
            if names[name].is_cancelled and len(tokens) >= _GONE_AFTER and not said.finished:
                engine.abort_request([name])
    return [done[name] for name in names]


def changed(checkpoint: Path) -> str:
    """Another model of the same name and shapes."""
    from safetensors.torch import load_file, save_file

    place = checkpoint.parent / "changed" / checkpoint.name
    if not (place / "config.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        weights = load_file(checkpoint / "model.safetensors")
        weights["model.norm.weight"] = -weights["model.norm.weight"]
        save_file(weights, place / "model.safetensors", {"format": "pt"})
        for file in checkpoint.iterdir():
            if file.suffix != ".safetensors" and file.name != "config.json":
                shutil.copy(file, place)
        shutil.copy(checkpoint / "config.json", place)
    return str(place)


if __name__ == "__main__":
    main(live)
