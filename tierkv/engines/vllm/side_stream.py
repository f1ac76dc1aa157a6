"""A stream of the engine's device beside the one that it computes on; on a CPU there is none.

What is queued on it follows what the engine had queued (`follow`), and the engine's stream waits
for it where it must (`hold`). No call waits for the device but `Mark.wait`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch


class Mark:
    """A point of a side stream; on a CPU it is passed at once."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Return when all before it is done."""
        if self._event is not None:
            self._event.synchronize()

    def hold(self) -> None:
        """Have what this thread's stream gets from now on wait for it."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class SideStream:
    """See the module. Any thread, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """What comes here runs after what this thread's stream has got so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def queue(self) -> AbstractContextManager[object]:
        """What is done in this context is queued here."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        """What is queued so far."""
        return Mark() if self._stream is None else Mark(self._stream.record_event())

    def index(self, places: Sequence[int]) -> torch.Tensor:
        """Places as a tensor of the device, without waiting for it."""
        if self._stream is None:
            return torch.tensor(places)
        return torch.tensor(places, pin_memory=True).to(self.device, non_blocking=True)

    def to_host(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in host memory, once all that is queued so far is done."""
        if self._stream is None:
            return rows
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        return host
