"""Stack: the tiers of a simulated machine, from words such as ``hbm=8GiB,dram=64GiB,nvme=1TiB``.

Capacities are of one tensor-parallel rank. They become whole pages as the live store makes them:
HBM in blocks, DRAM and NVMe in warm pages of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from tierkv.core.errors import ConfigError
from tierkv.core.geometry import KVGeometry, PagePlan, PageTargets
from tierkv.core.registry import known_name
from tierkv.core.tier import TierId
from tierkv.core.units import format_bytes, parse_size
from tierkv.plan.policies import POLICIES
from tierkv.plan.spec import NamespaceSpec, PlanSpec, TierPlan

NAMES: Final[Mapping[str, TierId]] = {
    "hbm": TierId.DEVICE,
    "dram": TierId.HOST,
    "nvme": TierId.COLD,
}
#: The root of all chains; a trace names its blocks itself.
_ROOT: Final = b"simulated".ljust(32, b"\0")
_FORM: Final = "write for example hbm=8GiB,dram=64GiB,nvme=1TiB"


@dataclass(frozen=True, slots=True)
class Tiers:
    """Capacities in bytes; `hbm` and `nvme` may be 0, which leaves the tier out."""

    dram: int
    hbm: int = 0
    nvme: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``name=size,...``. Raises ConfigError, saying what to write instead."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, equals, size = (word.strip() for word in part.partition("="))
            try:
                if not equals:
                    raise ValueError(f"{part.strip()[:60]!r} has no size; {_FORM}")
                known_name(name, NAMES)
                if name in sizes:
                    raise ValueError(f"{name!r} is there twice")
                sizes[name] = parse_size(size)
            except ValueError as error:
                raise ConfigError(f"tiers: {error}") from None
        if not sizes.get("dram"):
            raise ConfigError(f"tiers: 'dram' is missing or 0, and all blocks pass it; {_FORM}")
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = [(name, getattr(self, name)) for name in NAMES]
        return ",".join(f"{name}={format_bytes(n)}".replace(" ", "") for name, n in sizes if n)

    def spec(
        self,
        geometry: KVGeometry,
        block_tokens: int,
        policies: str | Mapping[str, str] = "lru",
        targets: PageTargets | None = None,
    ) -> PlanSpec:
        """What a planner needs. Raises ConfigError for a tier too small to work."""
        plan = PagePlan.of(geometry, block_tokens=block_tokens, targets=targets)
        by_name = dict.fromkeys(NAMES, policies) if isinstance(policies, str) else policies
        tiers: dict[TierId, TierPlan] = {}
        for name, tier in NAMES.items():
            capacity = getattr(self, name)
            if not capacity:
                continue
            unit = plan.block_bytes if tier is TierId.DEVICE else plan.warm_page_bytes
            least = 2 if tier is TierId.HOST and self.nvme else 1
            if capacity < least * unit:
                raise ConfigError(
                    f"tiers: {name}={format_bytes(capacity)} is less than {least} page(s) of "
                    f"{format_bytes(unit)}, which is what {block_tokens} tokens a block take"
                )
            blocks = 1 if tier is TierId.DEVICE else plan.warm_page_blocks
            tiers[tier] = TierPlan(capacity // unit, blocks, _policy(by_name.get(name, "lru")))
        return PlanSpec(tiers, [NamespaceSpec("default", _ROOT)], block_tokens, plan.block_bytes)


def _policy(name: str) -> str:
    try:
        return known_name(name, POLICIES)
    except ValueError as error:
        raise ConfigError(f"policies: {error}") from None
