"""What a request says of its own KV: `kv_transfer_params` and vLLM's typed `kv_hints`.

::

    kv_transfer_params={"tierkv": {"load": False, "save": False, "hints": ["pin"], "ttl_s": 600}}
    KvHintsEnvelope("1", "...", [KvHintAction("...", "demote", "1", {"in_s": 30})])

===========  ==========================================================================
prefetch     bring its prefix to memory when it arrives; with `in_s`, that long after
pin, unpin   keep it in memory, or no longer
demote       it pauses: keep only the copy on disk
share        others will want it: write it to disk at once, and keep it in memory
never_again  it will not come back: it is not saved
===========  ==========================================================================

`ttl_s` drops it after that time. What is not known here is ignored, and said once: a hint is never
an obligation, and no reason to refuse a request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from tierkv.store import HintKind

logger = logging.getLogger(__name__)

NEVER_AGAIN: Final = "never_again"
_KINDS: Final = {
    "prefetch": HintKind.PREFETCH,
    "pin": HintKind.PIN,
    "unpin": HintKind.UNPIN,
    "demote": HintKind.DEMOTE,
    "share": HintKind.SAVE,
    "ttl": HintKind.TTL,
}
_KNOWN: Final = frozenset({"load", "save", "hints", "ttl_s", "in_s"})
_warned: set[str] = set()


class Action(Protocol):
    """What is used of vLLM's `KvHintAction`."""

    @property
    def action_type(self) -> str:
        """What is to be done."""

    @property
    def payload(self) -> Mapping[str, object]:
        """With what."""


@dataclass(slots=True)
class Wishes:
    """A request's own words; the kinds with the seconds that they name."""

    may_load: bool = True
    may_save: bool = True
    at_start: list[tuple[HintKind, float]] = field(default_factory=list)
    at_end: list[tuple[HintKind, float]] = field(default_factory=list)


def wishes_of(params: Mapping[str, object] | None, actions: Iterable[Action] = ()) -> Wishes:
    """Read both. Never raises: a wish that is not understood is no wish."""
    wishes = Wishes()
    ours = (params or {}).get("tierkv")
    if isinstance(ours, Mapping):
        wishes.may_load = ours.get("load") is not False
        wishes.may_save = ours.get("save") is not False
        for name in sorted(set(map(str, ours)) - _KNOWN):
            _ignore(name)
    elif ours is not None:
        _ignore(f"tierkv={ours!r}")
    for name, seconds in [*_of_params(ours), *_of_actions(actions)]:
        kind = _KINDS.get(name)
        if name == NEVER_AGAIN:
            wishes.may_save = False
        elif kind is None:
            _ignore(name)
        elif kind is HintKind.PREFETCH and seconds:
            wishes.at_end.append((HintKind.EXPECT, seconds))
        elif kind in (HintKind.PREFETCH, HintKind.UNPIN):
            wishes.at_start.append((kind, 0.0))
        else:
            wishes.at_end.append((kind, seconds))
    return wishes


def _of_params(ours: object) -> Iterator[tuple[str, float]]:
    if not isinstance(ours, Mapping):
        return
    hints = ours.get("hints", ())
    for name in hints if isinstance(hints, list | tuple) else [hints]:
        yield str(name), _seconds(ours.get("in_s"))
    if _seconds(ours.get("ttl_s")):
        yield "ttl", _seconds(ours["ttl_s"])


def _of_actions(actions: Iterable[Action]) -> Iterator[tuple[str, float]]:
    for action in actions:
        payload = action.payload if isinstance(action.payload, Mapping) else {}
        yield action.action_type, _seconds(payload.get("in_s"))
        if _seconds(payload.get("ttl_s")):
            yield "ttl", _seconds(payload["ttl_s"])


def _seconds(value: object) -> float:
    is_time = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
    return float(value) if is_time else 0.0  # type: ignore[arg-type]


def _ignore(name: str) -> None:
    if name not in _warned and len(_warned) < 100:
        _warned.add(name)
        logger.warning("ignored an unknown hint name=%s known=%s", name, sorted(_KINDS))
