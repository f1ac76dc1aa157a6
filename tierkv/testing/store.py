"""Stores that end badly: what a killed process leaves behind."""

from __future__ import annotations

import numpy as np

from tierkv.store import Store
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.host import HostTier
from tierkv.transfer.link_profile import PUBLISHED, LinkProfile
from tierkv.transfer.spread import PlainSpread
from tierkv.transfer.staging import Staging
from tierkv.transfer.streams import Streams


def abandon(store: Store) -> None:
    """End a store's threads and memory as if the process had died: no write-back, no sync.

    Transfers that had begun end as they do; what the file engine had not made durable is for the
    engine (`MemoryFiles.crash`) to decide. The store is closed afterwards.
    """
    runtime, parts = store._runtime, store._parts
    with runtime.lock:
        runtime.is_closed = True
        for number in list(runtime.planner.movement.flights):
            runtime.engine.cancel(number)
    runtime.engine.close()
    if parts.files is not None:
        parts.files.shutdown()
    parts.host.close()
    if parts.device is not None:
        parts.device.close()


def staging_on(
    streams: Streams,
    host: HostTier,
    device: DeviceTier,
    *,
    profile: LinkProfile = PUBLISHED,
    pinned: int | None = None,
) -> Staging:
    """The ring that a store would have on these streams; `pinned` pages of the arena are pinned."""
    import torch

    limit = host.page_count if pinned is None else pinned
    return Staging(
        streams,
        torch.from_numpy(host.pages),
        PlainSpread(streams, host.plan, device.blocks),
        profile=profile,
        regions=lambda pages: np.where(pages < limit, 0, -1),
        slots=2,
        slot_bytes=2 * host.plan.warm_page_bytes,
    )
