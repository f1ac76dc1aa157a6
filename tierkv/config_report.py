"""What a configuration comes to: every setting with its source, and the page plan of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from pydantic import BaseModel

from tierkv.assembly import plan_spec
from tierkv.config import Config
from tierkv.config_text import Keys, path_text
from tierkv.config_yaml import Loaded
from tierkv.core.geometry import KVGeometry, Layout
from tierkv.core.keys import KeyChain
from tierkv.core.tier import TierId
from tierkv.core.units import format_bytes, is_decimal_size

Scalar: TypeAlias = bool | int | float | str | None

#: Settings in bytes, by the last part of their name.
_SIZE_KEYS: Final = frozenset(
    {
        *("hot", "warm", "cold", "capacity", "piece", "inflight_max", "staging"),
        *("host_quota", "cold_quota"),
    }
)


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting: its value, how to show it, and where it came from."""

    path: str
    value: Scalar
    shown: str
    source: str
    is_set: bool


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One figure of a page plan: `value` in `unit`, with what it means."""

    name: str
    value: int
    unit: str
    note: str = ""

    @property
    def shown(self) -> str:
        """The value as people read it."""
        return format_bytes(self.value) if self.unit == "bytes" else f"{self.value:,} {self.unit}"


def setting_rows(loaded: Loaded[Config]) -> list[SettingRow]:
    """Every setting in order of the reference file; a salt is not shown."""
    rows = []
    for path, value in _scalars(loaded.value, ()):
        source = loaded.sources.get(path)
        shown = _shown(path, value)
        origin = "default"
        if source is not None:
            origin = f"{loaded.file.name}:{source.line}"
            if _is_size(path) and value:
                shown += _written_as(source.text, shown)
        if path[-1] == "salt":
            value = shown = "(set)" if value else "(none)"
        rows.append(SettingRow(path_text(path), value, shown, origin, source is not None))
    return rows


def plan_rows(config: Config, geometry: KVGeometry) -> list[PlanRow]:
    """What pages and tiers come to for one model."""
    layout = Layout(geometry, block_tokens=config.block_tokens, targets=config.pages.targets)
    plan = layout.pages
    warm_loss = plan.warm_page_bytes - plan.warm_payload_bytes
    rows = [
        PlanRow("token", geometry.token_bytes, "bytes", f"in all {geometry.layers} layers"),
        PlanRow("block", plan.block_bytes, "bytes", f"{plan.block_tokens} tokens"),
        PlanRow(
            "hot page",
            plan.hot_page_bytes,
            "bytes",
            f"{plan.hot_page_tokens} tokens of one layer; wanted {format_bytes(config.pages.hot)}",
        ),
        PlanRow(
            "warm page",
            plan.warm_page_bytes,
            "bytes",
            f"{plan.tokens_in(plan.warm_page_blocks)} tokens in {plan.warm_page_blocks} blocks, "
            f"{format_bytes(warm_loss)} padding; wanted {format_bytes(config.pages.warm)}",
        ),
        PlanRow(
            "cold page",
            plan.cold_page_bytes,
            "bytes",
            f"{plan.tokens_in(plan.warm_page_blocks * plan.cold_page_warm_pages)} tokens in "
            f"{plan.cold_page_warm_pages} warm pages; wanted {format_bytes(config.pages.cold)}",
        ),
    ]
    return rows + _tier_rows(config, layout)


def _tier_rows(config: Config, layout: Layout) -> list[PlanRow]:
    """The tiers as the store would open them. Raises ConfigError for one too small to work."""
    plan, tiers = layout.pages, config.tiers
    chains = {name: KeyChain(layout.fingerprint) for name in config.namespaces}
    opened = plan_spec(config, plan, chains).tiers
    rows = []
    for tier, capacity in (
        (TierId.DEVICE, tiers.device.capacity),
        (TierId.HOST, tiers.host.capacity),
        (TierId.COLD, tiers.cold.capacity),
    ):
        tokens, note = 0, "off"
        if tier in opened:
            tokens = plan.tokens_in(opened[tier].pages * opened[tier].page_blocks)
            lost = capacity - tokens * layout.geometry.token_bytes
            note = f"{format_bytes(capacity)}, {format_bytes(lost)} of it lost to rounding"
        rows.append(PlanRow(f"{tier.label} tier", tokens, "tokens", note))
    return rows


def _scalars(section: BaseModel, path: Keys) -> Iterator[tuple[Keys, Scalar]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _scalars(value, (*path, name))
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from _scalars(item, (*path, name, key))
        else:
            yield (*path, name), str(value) if isinstance(value, Path) else value


def _is_size(path: Keys) -> bool:
    return path[-1] in _SIZE_KEYS


def _shown(path: Keys, value: Scalar) -> str:
    if value is None:
        return "none"
    if _is_size(path) and isinstance(value, int):
        return "off" if path[-1] == "capacity" and value == 0 else format_bytes(value)
    return str(value)


def _written_as(text: str, shown: str) -> str:
    """How the file says it, where that is not plain from the value."""
    if text.rstrip().endswith("%"):
        return f" ({text.strip()})"
    if is_decimal_size(text):
        return f" ({text.strip()}: decimal, powers of 1000)"
    return "" if text.replace(" ", "") == shown.replace(" ", "") else f" ({text.strip()})"
