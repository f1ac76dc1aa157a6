"""Stores that end badly: what a killed process leaves behind."""

from __future__ import annotations

from tierkv.store import Store


def abandon(store: Store) -> None:
    """End a store's threads and memory as if the process had died: no write-back, no sync.

    Transfers that had begun end as they do; what the file engine had not made durable is for the
    engine (`MemoryFiles.crash`) to decide. The store is closed afterwards.
    """
    with store._lock:
        store._closed = True
        for number in list(store._planner.movement.flights):
            store._engine.cancel(number)
    store._engine.close()
    if store._files is not None:
        store._files.shutdown()
    store._host.close()
    if store._device is not None:
        store._device.close()
