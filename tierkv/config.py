"""The configuration: what every setting is called, its unit, its default and its limits.

`load_config` reads a YAML file; `Config(...)` takes the same names and spellings from Python.
Either way the result is frozen, every size is an int of bytes and every path is absolute:
percentages are resolved when the configuration is read (host memory against this machine's
RAM, the cold tier against its file system, quotas against their tier).
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import psutil
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from tierkv.config_yaml import Loaded, load_yaml
from tierkv.core.geometry import GIB, KIB, MIB, PageTargets
from tierkv.core.registry import known_name
from tierkv.core.units import (
    PERCENT_PATTERN,
    SIZE_BYTES_MAX,
    SIZE_PATTERN,
    format_bytes,
    parse_percent,
    parse_size,
)
from tierkv.plan.policies import POLICIES
from tierkv.tiers.files import FILE_ENGINES
from tierkv.tiers.seals import NO_SEAL, SEALS, check_key_file

DEFAULT_NAMESPACE: Final = "default"

#: The cold tier's headers hold a namespace's name in this many bytes.
NAMESPACE_BYTES_MAX: Final = 63

#: 31 years: beyond it, null is meant.
TTL_S_MAX: Final = 1e9

#: Below this a capacity is a forgotten unit, not a wish.
CAPACITY_BYTES_MIN: Final = 4096


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a YAML file. Raises ConfigError listing everything that is wrong in it."""
    return read_config(path).value


def read_config(path: str | os.PathLike[str]) -> Loaded[Config]:
    """As `load_config`, with the line that each setting came from."""
    file = Path(path)
    return load_yaml(file, Config, context={"base": file.absolute().parent})


def ram_bytes() -> int:
    """This machine's RAM, or less where a control group (a container) limits it.

    Memory of a device that the system shows as a node (Grace-Hopper) is not RAM.
    """
    from tierkv.tiers.accelerator import device_node_bytes  # needs numpy, which is slow to import

    total = psutil.virtual_memory().total - device_node_bytes()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def file_system_bytes(directory: Path) -> int:
    """The size of the file system that holds `directory`, or will when it is created."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).total


def _capacity(value: object, whole_bytes: int) -> int:
    share = parse_percent(value)
    if share is not None:
        return int(share * whole_bytes)
    size = parse_size(value)
    if 0 < size < CAPACITY_BYTES_MIN:
        raise ValueError(f"{size} means {size} bytes; write the unit, for example {size}GiB")
    return size


def _size(value: object) -> int:
    if parse_percent(value) is not None:
        raise ValueError(f"must be a size such as 2MiB; a percentage ({value}) has no meaning here")
    return parse_size(value)


def _positive(size: int) -> int:
    if size < 1:
        raise ValueError("must be more than 0 bytes")
    return size


def _quota(value: object) -> int:
    if parse_percent(value) is not None:
        raise ValueError(f"a percentage ({value}) needs its tier; only Config resolves it")
    return parse_size(value)


def _path(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"must be a path, got {value!r}")
    text = os.fspath(value)
    if not text or "\0" in text or len(os.fsencode(text)) > 4095:
        raise ValueError("must be a path of 1 to 4095 bytes without NUL")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r}: {error}") from None
    base = (info.context or {}).get("base", Path.cwd())
    path = Path(os.path.normpath(base / path))
    if path == path.parent:
        raise ValueError("must not be the root directory")
    return path


def _policy(value: str) -> str:
    return known_name(value, POLICIES)


def _engine(value: str) -> str:
    return known_name(value, chain(["auto"], FILE_ENGINES))


def _protection(value: str) -> str:
    return known_name(value, chain([NO_SEAL], SEALS))


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, got {value[:60]!r}")
    return value


def _numa(value: object) -> object:
    is_node = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1024
    if not is_node and value not in ("auto", "off"):
        raise ValueError(f"must be auto, off or a node number from 0, got {value!r:.60}")
    return value


def _namespace_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > NAMESPACE_BYTES_MAX:
        raise ValueError(
            "a namespace is named by letters, digits, '.', '_' and '-', "
            f"{NAMESPACE_BYTES_MAX} characters at most"
        )
    return name


def _salt(value: str) -> str:
    if len(value.encode("utf-8", "surrogatepass")) > 256 or not value.isprintable():
        raise ValueError("must be printable text of at most 256 bytes")
    return value


_INTEGER: Final = {"type": "integer", "minimum": 0, "maximum": SIZE_BYTES_MAX}
_SIZE_TEXT: Final = {"type": "string", "pattern": SIZE_PATTERN}
_PERCENT_TEXT: Final = {"type": "string", "pattern": PERCENT_PATTERN}
_SIZE_SCHEMA: Final = WithJsonSchema({"anyOf": [_INTEGER, _SIZE_TEXT]})
_SHARE_SCHEMA: Final = WithJsonSchema({"anyOf": [_INTEGER, _SIZE_TEXT, _PERCENT_TEXT]})

Size: TypeAlias = Annotated[int, AfterValidator(_positive), BeforeValidator(_size), _SIZE_SCHEMA]
Capacity: TypeAlias = Annotated[int, _SHARE_SCHEMA]
Quota: TypeAlias = Annotated[int, BeforeValidator(_quota), _SHARE_SCHEMA]
Milliseconds: TypeAlias = Annotated[int, Field(ge=1, le=3_600_000)]
AnyPath: TypeAlias = Annotated[Path, BeforeValidator(_path)]
Policy: TypeAlias = Annotated[str, AfterValidator(_policy)]
Device: TypeAlias = Annotated[
    str,
    AfterValidator(_device),
    WithJsonSchema({"type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]{1,3})?)$"}),
]
Engine: TypeAlias = Annotated[str, AfterValidator(_engine)]
Protection: TypeAlias = Annotated[str, AfterValidator(_protection)]
Numa: TypeAlias = Annotated[Literal["auto", "off"] | int, BeforeValidator(_numa)]
NamespaceName: TypeAlias = Annotated[str, AfterValidator(_namespace_name)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )


class PagesConfig(_Section):
    """Wanted page sizes; rounded to whole tokens and blocks for each model (see PagePlan)."""

    hot: Size = Field(default=16 * KIB, description="Page of the device tier, in bytes.")
    warm: Size = Field(default=2 * MIB, description="Page of the host tier, in bytes.")
    cold: Size = Field(default=64 * MIB, description="Page of the cold tier, in bytes.")

    @field_validator("warm", "cold")
    @classmethod
    def _not_below_the_tier_above(cls, size: int, info: ValidationInfo) -> int:
        above = "hot" if info.field_name == "warm" else "warm"
        least = info.data.get(above, 0)
        if size < least:
            raise ValueError(
                f"{format_bytes(size)} is less than pages.{above} ({format_bytes(least)}); "
                "pages grow from tier to tier"
            )
        return size

    @property
    def targets(self) -> PageTargets:
        """The same sizes, as the geometry takes them."""
        return PageTargets(hot_bytes=self.hot, warm_bytes=self.warm, cold_bytes=self.cold)


class DeviceConfig(_Section):
    """The fastest tier: memory of the device that computes."""

    device: Device = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    capacity: Capacity = Field(
        default=0, description="Bytes; 0 turns the tier off. With device cpu also % of RAM."
    )
    policy: Policy = Field(default="lru", description="Eviction policy.")

    @field_validator("capacity", mode="before")
    @classmethod
    def _resolve_capacity(cls, value: object, info: ValidationInfo) -> int:
        device = info.data.get("device", "cpu")
        if parse_percent(value) is not None and device != "cpu":
            raise ValueError(f"a percentage needs device: cpu (it is {device}); write a size")
        return _capacity(value, ram_bytes())


class HostConfig(_Section):
    """Host memory: one arena, allocated when the store opens."""

    capacity: Capacity = Field(
        default=4 * GIB, description="Bytes or % of RAM; 0 turns the tier off."
    )
    policy: Policy = Field(default="lru", description="Eviction policy.")
    hugepages: Literal["off", "auto", "advise"] = Field(
        default="auto",
        description="Transparent huge pages: off, auto (while they come quickly) or advise.",
    )
    numa: Numa = Field(default="auto", description="auto, off or the node that holds the arena.")
    prefault_threads: int = Field(
        default=0, ge=0, le=256, description="Threads that touch the arena at start; 0 chooses."
    )
    register_cuda: Literal["auto", "off"] = Field(
        default="auto", description="auto pins the arena for CUDA where there is a device."
    )
    register_threads: int = Field(
        default=1, ge=1, le=64, description="Threads that pin it, in the background."
    )
    unified: Literal["auto", "off"] = Field(
        default="auto", description="auto: a coherent device (Grace-Hopper) reads it unpinned."
    )
    zero_freed: bool = Field(
        default=False, description="Zero freed pages before another namespace gets them."
    )

    @field_validator("capacity", mode="before")
    @classmethod
    def _resolve_capacity(cls, value: object) -> int:
        return _capacity(value, ram_bytes())


class ColdConfig(_Section):
    """NVMe: segment files beneath one directory; survives restarts."""

    directory: AnyPath = Field(
        default=Path("~/.cache/tierkv/cold"),
        description="Where segment files live; relative paths start at the file's own directory.",
    )
    capacity: Capacity = Field(
        default=0, description="Bytes or % of the file system; 0 turns the tier off."
    )
    policy: Policy = Field(default="lru", description="Eviction policy.")
    engine: Engine = Field(
        default="auto",
        description="auto, direct (O_DIRECT), portable, or gds (cuFile; only by name).",
    )
    segment_cold_pages: int = Field(
        default=16, ge=1, le=4096, description="Cold pages in one segment file."
    )
    threads: int = Field(default=8, ge=1, le=256, description="Threads that read; as many write.")
    piece: Size = Field(default=8 * MIB, description="Most bytes of one request.")
    breaker_faults: int = Field(
        default=3, ge=1, le=1000, description="Faults in a row after which the disk is left alone."
    )
    breaker_slow_ms: Milliseconds = Field(
        default=5000, description="One request that takes longer counts as a fault."
    )
    sync: Literal["flush", "always"] = Field(
        default="flush", description="When writes are made durable: at flush, or after each."
    )
    protection: Protection = Field(
        default=NO_SEAL, description="none, hmac (forged pages are misses) or aes-256-gcm."
    )
    key_file: AnyPath | None = Field(
        default=None, description="File with the key of a protection; see `tierkv keygen`."
    )

    @field_validator("key_file")
    @classmethod
    def _key_where_it_is_used(cls, key_file: Path | None, info: ValidationInfo) -> Path | None:
        if "protection" in info.data:
            check_key_file(info.data["protection"], key_file)
        return key_file

    @field_validator("capacity", mode="before")
    @classmethod
    def _resolve_capacity(cls, value: object, info: ValidationInfo) -> int:
        directory = info.data.get("directory")
        if parse_percent(value) is None or directory is None:
            return _capacity(value, 0)
        try:
            return _capacity(value, file_system_bytes(directory))
        except OSError as error:
            raise ValueError(f"cannot size the file system of {directory}: {error}") from None


class TiersConfig(_Section):
    """The three tiers, fastest first."""

    device: DeviceConfig = Field(default_factory=DeviceConfig)
    host: HostConfig = Field(default_factory=HostConfig)
    cold: ColdConfig = Field(default_factory=ColdConfig)


class TransferConfig(_Section):
    """Bounds of everything that moves."""

    inflight_max: Size = Field(
        default=256 * MIB, description="Most bytes under way to or from the cold tier."
    )
    staging: Size = Field(
        default=64 * MIB, description="Device memory through which pages cross the link."
    )
    sm_budget: int = Field(
        default=16, ge=1, le=1024, description="Thread blocks that kernels of ours may occupy."
    )
    link_profiles: AnyPath | None = Field(
        default=Path("~/.cache/tierkv/links"),
        description="Directory of measured link rates, a file a card; null measures every time.",
    )
    demand_deadline_ms: Milliseconds = Field(
        default=10_000, description="After this a read is given up and recomputed."
    )
    put_deadline_ms: Milliseconds = Field(
        default=10_000, description="After this a put stops waiting for room."
    )
    flush_deadline_ms: Milliseconds = Field(
        default=60_000, description="After this a flush reports that it is not durable."
    )


class NamespaceConfig(_Section):
    """One tenant: its own keys, its own share of each tier."""

    salt: Annotated[str, AfterValidator(_salt)] = Field(
        default="", repr=False, description="Secret mixed into the keys of this namespace."
    )
    host_quota: Quota = Field(
        default=SIZE_BYTES_MAX, description="Most bytes of host memory, or % of the host tier."
    )
    cold_quota: Quota = Field(
        default=SIZE_BYTES_MAX, description="Most bytes of NVMe, or % of the cold tier."
    )
    ttl_s: Annotated[float, Field(gt=0, le=TTL_S_MAX)] | None = Field(
        default=None, description="Seconds after it was put that a block is dropped; null never."
    )


class Config(_Section):
    """Everything that can be set. `configs/reference.yaml` explains each key."""

    block_tokens: int = Field(
        default=16, ge=1, le=4096, description="Tokens in a block, the unit of reuse."
    )
    pages: PagesConfig = Field(default_factory=PagesConfig)
    tiers: TiersConfig = Field(default_factory=TiersConfig)
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    namespaces: dict[NamespaceName, NamespaceConfig] = Field(
        default_factory=dict, max_length=1024, description="Tenants by name."
    )
    event_log: AnyPath | None = Field(
        default=None, description="File that records every planner event; null records none."
    )

    @field_validator("namespaces", mode="before")
    @classmethod
    def _resolve_percentages(cls, value: object, info: ValidationInfo) -> object:
        tiers = info.data.get("tiers", TiersConfig())
        if not isinstance(value, Mapping):
            return value
        wholes = {"host_quota": tiers.host.capacity, "cold_quota": tiers.cold.capacity}
        return {name: _with_quotas(item, wholes) for name, item in value.items()}

    @field_validator("namespaces")
    @classmethod
    def _complete(
        cls, namespaces: dict[str, NamespaceConfig], info: ValidationInfo
    ) -> dict[str, NamespaceConfig]:
        """Add the default namespace; no quota is more than its tier."""
        namespaces = {DEFAULT_NAMESPACE: NamespaceConfig()} | namespaces
        tiers = info.data.get("tiers")
        if tiers is None:
            return namespaces
        return {
            name: item.model_copy(
                update={
                    "host_quota": min(item.host_quota, tiers.host.capacity),
                    "cold_quota": min(item.cold_quota, tiers.cold.capacity),
                }
            )
            for name, item in namespaces.items()
        }


def _with_quotas(item: object, wholes: Mapping[str, int]) -> object:
    """`item` with well-formed percentages made bytes; the rest is left for its own validator."""
    if not isinstance(item, Mapping):
        return item
    resolved = dict(item)
    for key, whole in wholes.items():
        try:
            share: Fraction | None = parse_percent(item.get(key))
        except ValueError:
            continue
        if share is not None:
            resolved[key] = math.floor(share * whole)
    return resolved
