"""Which token is in which column of which row of a cache: what its blocks are put under.

It follows every change that is made to the rows, on the device that the model runs on, and costs a
decode step one small copy. What it was not told of is not known, and so is not put.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch

from tierkv.core.geometry import align_up
from tierkv.engines.transformers.prompts import PAD, Prompts

logger = logging.getLogger(__name__)

_STEP_COLUMNS = 256
_UNSEEN = -1


class Ledger:
    """The token ids in a cache, `PAD` where a row is padded. Single owner."""

    def __init__(self, prompts: Prompts) -> None:
        self._ids = self._unseen(len(prompts.pads), prompts.columns + _STEP_COLUMNS)
        self._ids[:, : prompts.columns].masked_fill_(prompts.ids == PAD, PAD)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._ids)

    @property
    def pads(self) -> torch.Tensor:
        """Columns of padding, by row: int64 (rows,) on the CPU."""
        return (self._ids == PAD).sum(1).cpu()

    def note(self, start: int, ids: torch.Tensor) -> None:
        """Columns from `start` on hold these ids: int64 (rows, columns)."""
        end = start + ids.shape[1]
        # Normal tensors even under inference_mode, so that a later call outside it may write.
        with torch.inference_mode(mode=False):
            if self._ids.device != ids.device:
                self._ids = self._ids.to(ids.device)
            if (columns := self._ids.shape[1]) < end:
                more = self._unseen(self.rows, align_up(max(end - columns, columns), _STEP_COLUMNS))
                self._ids = torch.cat([self._ids, more.to(ids.device)], 1)
        self._write(start, end, ids)

    def forget(self, start: int) -> None:
        """Nothing is known of the columns from `start` on."""
        self._write(start, self._ids.shape[1], torch.tensor(_UNSEEN, device=self._ids.device))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        with torch.inference_mode(mode=False):
            self._ids = self._ids[rows.clone().to(self._ids.device)]

    def repeat(self, times: int) -> None:
        """Repeat every row."""
        self.select(torch.arange(self.rows).repeat_interleave(times))

    def tokens(self, row: int, columns: int) -> npt.NDArray[np.uint32]:
        """The unpadded ids of a row's first `columns`, cut where one was never seen."""
        ids = self._ids[row, :columns].cpu().numpy()
        ids = ids[ids != PAD]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            logger.warning("not stored: tokens not seen entering the model, from=%d", unknown[0])
            ids = ids[: unknown[0]]
        tokens: npt.NDArray[np.uint32] = ids.astype(np.uint32)
        return tokens

    def holds(self, ids: torch.Tensor) -> bool:
        """Whether the first columns hold these ids: int64 (rows, columns). Padding may be any."""
        held = self._ids[:, : ids.shape[1]]
        return bool(((held == ids.to(held.device)) | (held == PAD)).all())

    def _write(self, start: int, end: int, ids: torch.Tensor) -> None:
        held = self._ids[:, start:end]
        held.copy_(torch.where(held == PAD, held, ids))

    @staticmethod
    def _unseen(rows: int, columns: int) -> torch.Tensor:
        with torch.inference_mode(mode=False):
            return torch.full((rows, columns), _UNSEEN)
