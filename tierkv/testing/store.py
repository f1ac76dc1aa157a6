"""Stores that end badly: what a killed process leaves behind."""

from __future__ import annotations

from tierkv.store import Store


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
