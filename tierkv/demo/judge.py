"""What the demo promises, and whether the rows keep it. Pure: rows in, checks out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from tierkv.demo.row import Check, Row

#: Least part of the document's tokens that NVMe must give back after a restart.
REUSE_MIN: Final = 0.95

WITHOUT: Final = "without tierkv"
FIRST: Final = "first time"
WARM: Final = "other question"
FROM_HOST: Final = "HBM too small"
FROM_NVME: Final = "host too small"
RESTARTED: Final = "after a restart"
SHORT: Final = "short prompt"
CHAT: Final = "chat, turn {}"

#: Rows that must find the document, wherever it lies.
_REUSING: Final = (WARM, FROM_HOST, FROM_NVME, RESTARTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much the demo does, and what it must then reach."""

    document_tokens: int
    chat_tokens: int
    new_tokens: int
    #: Time to the first token after a restart, at most this part of recomputing.
    ttft_ratio_max: float


def judge(rows: Sequence[Row], size: Size, document_tokens: int) -> list[Check]:
    """Hold the rows against the promises. `document_tokens` is what the questions share.

    What was on a page that a row found damaged cannot be reused in that row, and is computed: this
    is said, and is no promise broken. A token that differs always is.
    """
    by_name = {row.name: row for row in rows}
    restarted = by_name[RESTARTED]
    differing = [row.name for row in rows if not row.tokens_identical]
    least = REUSE_MIN * document_tokens
    from_nvme = min(restarted.cold_tokens, document_tokens)
    is_late = restarted.ratio > size.ttft_ratio_max
    return [
        Check(
            name="tokens_identical",
            ok=not differing,
            text=(
                f"Tokens differ from recomputing in: {', '.join(differing)}"
                if differing
                else f"Every token of all {len(rows)} answers is the one that recomputing gives"
            ),
        ),
        _document_reused([by_name[name] for name in _REUSING], least),
        Check(
            name="restart_reuse",
            ok=from_nvme >= least or restarted.damaged_pages > 0,
            text=(
                f"After a restart, a new process and a new question, {from_nvme:,} of the"
                f" document's {document_tokens:,} tokens ({from_nvme / document_tokens:.1%}) came"
                f" from NVMe (promised {REUSE_MIN:.0%})"
                f"{_excuse([restarted]) if from_nvme < least else ''}"
            ),
        ),
        Check(
            name="restart_ttft",
            ok=not is_late or restarted.damaged_pages > 0,
            text=(
                f"Its first token came after {restarted.ttft_s:.2f} s instead of"
                f" {restarted.recompute_ttft_s:.2f} s: {restarted.ratio:.1%} of recomputing"
                f" (promised {size.ttft_ratio_max:.0%}){_excuse([restarted]) if is_late else ''}"
            ),
        ),
    ]


def _document_reused(rows: Sequence[Row], least: float) -> Check:
    short = [row for row in rows if row.reused_tokens < least]
    names = ", ".join(row.name for row in short)
    return Check(
        name="document_reused",
        ok=all(row.damaged_pages for row in short),
        text=(
            f"Less than {REUSE_MIN:.0%} of the document was reused in: {names}{_excuse(short)}"
            if short
            else f"At least {REUSE_MIN:.0%} of the document was reused whichever tier was small"
        ),
    )


def _excuse(rows: Sequence[Row]) -> str:
    """Why rows reuse less than promised, if it is damage that they found."""
    pages = sum(row.damaged_pages for row in rows)
    if not pages:
        return ""
    return f"; {_pages(pages)} found damaged there, and what they held was computed"


def _pages(count: int) -> str:
    return "1 page on NVMe was" if count == 1 else f"{count} pages on NVMe were"


def remarks(rows: Sequence[Row], facts: Mapping[str, object]) -> list[str]:
    """What a reader should know beside the promises: where there is no gain, what it cost."""
    by_name = {row.name: row for row in rows}
    lines = []
    first, short = by_name[FIRST], by_name[SHORT]
    if first.stored_bytes:
        lines.append(
            f"Storing the document cost {first.store_s:.2f} s once, inside the first answer's"
            f" {first.ttft_s:.2f} s to its first token; it was durable on NVMe"
            f" {facts['flush_s']:.2f} s after the answer."
        )
    damaged, step_s = facts["damaged_pages"], facts["decode_step_s"]
    assert isinstance(damaged, int)
    assert isinstance(step_s, float)
    lines.append(
        f"{_pages(damaged)} found damaged and computed again."
        if damaged
        else "No page on NVMe was found damaged."
    )
    save_s = max(0.0, short.recompute_ttft_s - step_s)
    lines.append(
        f"Short prompt: no gain expected here, because computing its {short.prompt_tokens} tokens"
        f" takes {short.recompute_ttft_s:.2f} s, and one pass over the weights, which any new token"
        f" needs, {step_s:.2f} s: at most {save_s:.2f} s could be saved."
    )
    lines.append("On this machine 'device' is an arena in CPU memory that stands in for HBM.")
    return lines


def write_json(
    path: Path,
    rows: Sequence[Row],
    checks: Sequence[Check],
    facts: Mapping[str, object],
    size: Size,
) -> None:
    """Everything measured, as indented JSON with a trailing newline."""
    report = {
        "passed": all(check.ok for check in checks),
        "checks": [asdict(check) for check in checks],
        "rows": [
            asdict(row)
            | {
                "reused_tokens": row.reused_tokens,
                "recomputed_tokens": row.recomputed_tokens,
                "ttft_ratio": row.ratio,
            }
            for row in rows
        ],
        "size": asdict(size),
        "facts": dict(facts),
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
