"""What `generate` returned, and the rows of a cache that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from tierkv.engines.transformers.prompts import Prompts

#: The unpadded token ids of one row.
Row: TypeAlias = npt.NDArray[np.uint32]


def rows_of(
    out: torch.Tensor, rows: Sequence[Row], prompts: Prompts, *, is_reordered: bool
) -> list[Row]:
    """What an answer says of each row; ValueError if that is not what went into the model.

    Beams are `is_reordered`: a sequence is of the row that has most of it, and of its prompt all.
    """
    ids: torch.Tensor = getattr(out, "sequences", out)
    ids = (ids if ids.dim() == 2 else ids[None]).cpu()
    pads = prompts.pads
    found = [row[:0] for row in rows]
    for number, sequence in enumerate(ids):
        prompt = number * len(pads) // len(ids)
        given = sequence[pads[prompt] :].numpy().astype(np.uint32)
        is_own = len(ids) == len(rows) and not is_reordered
        shared, row = max(
            (_in_common(given, rows[row]), row)
            for row in ([number] if is_own else range(len(rows)))
        )
        wanted = min(len(given), len(rows[row])) if is_own else prompts.columns - pads[prompt]
        if shared < wanted:
            raise ValueError("`out` is not what was generated with this cache")
        if shared > len(found[row]):
            found[row] = given[:shared]
    return found


def without_fill(row: Row, fill_id: int) -> Row:
    """A row up to its last token that is not filling."""
    kept = np.flatnonzero(row != fill_id)
    return row[: kept[-1] + 1 if kept.size else 0]


def _in_common(given: Row, row: Row) -> int:
    """How many tokens both begin with."""
    length = min(len(given), len(row))
    differing = np.flatnonzero(given[:length] != row[:length])
    return int(differing[0]) if differing.size else length
