"""What all tests share: how hypothesis runs, and where GPU tests are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tierkv.testing.drills import base

# A blob replays a failure; no deadline, because two cores are shared with other tests.
settings.register_profile(
    "tierkv",
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("ci", parent=settings.get_profile("tierkv"), derandomize=True)
# Without a GPU, Triton's kernels run in its interpreter; it is chosen when triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# An engine is installed beside the project, by `make engines`, which asks for them.
_ENGINES = [
    *("test_lmcache_adapter.py", "test_sglang_engine.py", "test_sglang_storage.py"),
    *("test_vllm_engine.py", "test_vllm_hooks.py"),
]
collect_ignore = [] if os.environ.get("TIERKV_ENGINES") else _ENGINES

settings.load_profile("ci" if os.environ.get("CI") else "tierkv")


@pytest.fixture
def quiet() -> Iterator[None]:
    """No logs where what is damaged is repaired or refused, and said so, over and over."""
    with base.quiet():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where torch is absent or finds no device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()
