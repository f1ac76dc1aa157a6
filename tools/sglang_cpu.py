"""SGLang's HiCache on a machine without an accelerator: its controller, pools, hashes and threads.

Nothing of SGLang's is replaced. What is missing is an accelerator, so a device's pool is one in
host memory and nothing is copied between the two; and the kernels of torchvision, which a cache
does not call, are declared, as the wheel's are for another torch.
"""

from __future__ import annotations

import threading
import warnings
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

PAGE_TOKENS = 32


def ready() -> None:
    """Make SGLang importable, and say that this is rank 0 of 1."""
    if not hasattr(ready, "library"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes) -> Tensor")
        vars(ready)["library"] = library
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.managers.cache_controller  # noqa: F401 all that follows needs it
        from sglang.srt.runtime_context import get_parallel
    ranks = ("tp", "pp", "attn_tp", "attn_dp", "attn_cp", "attn_dcp")
    get_parallel().override_permanently(
        **{f"{rank}_rank": 0 for rank in ranks}, **{f"{rank}_size": 1 for rank in ranks}
    )


def device_pool(*, dtype: torch.dtype = torch.float32, layers: int = 4, heads: int = 4) -> Any:
    """A device's pool of K and V, which is small, as nobody computes here."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return MHATokenToKVPool(
        2 * PAGE_TOKENS, PAGE_TOKENS, dtype, heads, 128, layers, "cpu", False,
        enable_alt_stream=False,
    )  # fmt: skip


def host_pool(device: Any, *, tokens: int, layout: str = "page_first") -> Any:
    """A host pool of so many tokens for a device's pool."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    return MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        2.0,
        0,
        PAGE_TOKENS,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=device.layer_num,
        host_token_capacity=tokens,
    )


def controller(device: Any, host: Any, extra: Mapping[str, object] | None) -> Any:
    """SGLang's controller with its threads; `extra`: the backend's options, None: no backend."""
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

    allocator = PagedTokenToKVPoolAllocator(
        device.size, PAGE_TOKENS, device.dtype, "cpu", device, False
    )
    names = {"backend_name": "tierkv", "module_path": "tierkv.engines.sglang",
             "class_name": "TierKVStorage"}  # fmt: skip
    return HiCacheController(
        allocator,
        host,
        PAGE_TOKENS,
        None,
        threading.Event(),
        io_backend="direct",
        storage_backend=None if extra is None else "dynamic",
        prefetch_threshold=PAGE_TOKENS,
        model_name="a-model",
        storage_backend_extra_config=None if extra is None else {**names, **extra},
    )


def key_of(tokens: Sequence[int], salt: str | None = None) -> Any:
    """The key of some tokens in SGLang's tree."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixKey(array("q", tokens), cache_salt=salt)


def hashes_of(tokens: Sequence[int], salt: str | None = None) -> list[str]:
    """SGLang's names of the whole pages of some tokens."""
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    whole = len(tokens) // PAGE_TOKENS * PAGE_TOKENS
    names = get_storage_hash_str(key_of(tokens[:whole], salt), None, page_size=PAGE_TOKENS)
    return list(names)
