"""Assembly: from a configuration and a layout to opened tiers, a planner and a transfer engine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from tierkv.config import Config
from tierkv.core.errors import ConfigError, TierFailed, TierKVError
from tierkv.core.geometry import Layout, PagePlan
from tierkv.core.keys import KeyChain
from tierkv.core.tier import RecoveredPage, TierId
from tierkv.core.units import format_bytes
from tierkv.kernels.driver import Driver
from tierkv.plan.spec import NamespaceSpec, PlanSpec, TierPlan
from tierkv.tiers.accelerator import accelerators, home_node
from tierkv.tiers.device import DeviceTier
from tierkv.tiers.files import choose_engine
from tierkv.tiers.files.base import FileEngine
from tierkv.tiers.host import HostTier
from tierkv.tiers.seals import load_seal
from tierkv.tiers.seals.base import Seal
from tierkv.tiers.segment_format import page_header_bytes
from tierkv.tiers.segments import SegmentTier
from tierkv.tiers.unified import unified_home
from tierkv.transfer.breaker import Breaker
from tierkv.transfer.engine import TransferEngine
from tierkv.transfer.link_profile import link_profile, measure_device
from tierkv.transfer.spread import PlainSpread
from tierkv.transfer.staging import SLOTS, Staging
from tierkv.transfer.status import StatusFile
from tierkv.transfer.streams import CudaStreams

logger = logging.getLogger(__name__)

#: Of one tier: each takes some 60 bytes of memory while it is free. 32 TiB in pages of 2 MiB.
_PAGES_MAX: Final = 1 << 24


@dataclass(slots=True)
class Parts:
    """What a store is made of, opened."""

    spec: PlanSpec
    chains: dict[str, KeyChain]
    host: HostTier
    device: DeviceTier | None
    cold: SegmentTier | None
    files: FileEngine | None
    engine: TransferEngine
    recovered: list[RecoveredPage]
    status: StatusFile | None

    def close(self) -> None:
        """End the threads, then close tier after tier; a tier that fails does not keep others."""
        self.engine.close()
        for tier in (self.cold, self.device, self.host):
            if tier is not None:
                try:
                    tier.close()
                except TierKVError as error:
                    logger.warning("close failed error=%s", error)
        if self.files is not None:
            self.files.shutdown()
        if self.status is not None:  # last: until then `doctor` shows a store that hangs in closing
            self.status.close()


#: Makes the file engine for a directory; tests and fault drills give their own.
FilesFor: TypeAlias = Callable[[Path], FileEngine]
#: Makes the ring between host and device; tests give one on recorded streams.
StagingFor: TypeAlias = Callable[[HostTier, DeviceTier], Staging]


def assemble(
    config: Config,
    layout: Layout,
    *,
    files_for: FilesFor | None = None,
    staging_for: StagingFor | None = None,
) -> Parts:
    """Open every tier that is switched on; what was opened is closed again if a later one fails."""
    plan = layout.pages
    chains = {
        name: KeyChain(
            layout.fingerprint,
            namespace=name,
            salt=space.salt.encode(),
            block_tokens=config.block_tokens,
        )
        for name, space in config.namespaces.items()
    }
    spec = plan_spec(config, plan, chains)
    with ExitStack() as undo:
        host = _host(config, plan, spec.tiers[TierId.HOST].pages)
        host.open()
        undo.callback(host.close)
        device, staging = None, None
        if TierId.DEVICE in spec.tiers:
            device = DeviceTier(
                plan,
                frames=spec.tiers[TierId.DEVICE].pages,
                device=config.tiers.device.device,
                programs=config.transfer.sm_budget,
            )
            device.open()
            undo.callback(device.close)
            staging = staging_for(host, device) if staging_for else _staging(config, host, device)
        cold, files, recovered, status = None, None, [], None
        # A directory per layout: two layouts never share a file, and each can be deleted alone.
        root = config.tiers.cold.directory / layout.fingerprint.hex()[:16]
        if TierId.COLD in spec.tiers:
            wanted = config.tiers.cold.engine
            # First of all: a wrong key changes nothing on the disk.
            seal = load_seal(config.tiers.cold.protection, config.tiers.cold.key_file)
            files = files_for(root) if files_for else choose_engine(root, wanted)
            undo.callback(files.shutdown)
            cold = _cold(config, layout, spec.tiers[TierId.COLD].pages, files, seal)
            recovered = cold.open()
            undo.callback(cold.close)
        engine = TransferEngine(
            plan,
            host,
            device=device,
            staging=staging,
            cold=cold,
            threads=config.tiers.cold.threads,
            inflight_bytes_max=config.transfer.inflight_max,
            piece_bytes=config.tiers.cold.piece,
            sync_each_write=config.tiers.cold.sync == "always",
            zero_freed=config.tiers.host.zero_freed,
            breaker=Breaker(
                TierId.COLD.label,
                faults_max=config.tiers.cold.breaker_faults,
                slow_s=config.tiers.cold.breaker_slow_ms / 1e3,
            ),
        )
        if cold is not None and files_for is None:  # other files lie in no directory to be named
            status = StatusFile(root, engine.breaker)
            status.open()
        undo.pop_all()
    return Parts(spec, chains, host, device, cold, files, engine, recovered, status)


def plan_spec(config: Config, plan: PagePlan, chains: dict[str, KeyChain]) -> PlanSpec:
    """The planner's view: capacities in pages. Raises ConfigError for a tier too small to work."""
    tiers = config.tiers
    # Capacity is what the disk may lose, so headers count.
    header_bytes = page_header_bytes(plan.warm_page_blocks, tiers.cold.protection)
    slot_bytes = plan.warm_page_bytes + header_bytes
    cold_pages = tiers.cold.capacity // slot_bytes
    host_pages = plan.warm_pages_in(tiers.host.capacity)
    least = 2 if tiers.cold.capacity else 1
    if host_pages < least:
        raise ConfigError(
            f"tiers.host.capacity: {format_bytes(tiers.host.capacity)} holds {host_pages} warm "
            f"pages of {format_bytes(plan.warm_page_bytes)}; at least {least} are needed"
        )
    if tiers.cold.capacity and not cold_pages:
        raise ConfigError(
            f"tiers.cold.capacity: {format_bytes(tiers.cold.capacity)} is less than one warm page "
            f"with its header, {format_bytes(slot_bytes)}; raise it, or 0 turns the tier off"
        )
    for name, pages in (("host", host_pages), ("cold", cold_pages)):
        if pages > _PAGES_MAX:
            raise ConfigError(
                f"tiers.{name}.capacity: {pages:,} warm pages of "
                f"{format_bytes(plan.warm_page_bytes)} are more than the {_PAGES_MAX:,} that are "
                "kept track of; raise pages.warm, or lower the capacity"
            )
    plans = {TierId.HOST: TierPlan(host_pages, plan.warm_page_blocks, tiers.host.policy)}
    if tiers.device.capacity:
        frames = plan.hot_blocks_in(tiers.device.capacity)
        if not frames:
            raise ConfigError(
                f"tiers.device.capacity: {format_bytes(tiers.device.capacity)} is less than one "
                f"block of {format_bytes(plan.block_bytes)}; raise it, or 0 turns the tier off"
            )
        plans = {TierId.DEVICE: TierPlan(frames, 1, tiers.device.policy), **plans}
    if cold_pages:
        plans[TierId.COLD] = TierPlan(cold_pages, plan.warm_page_blocks, tiers.cold.policy)
    spaces = [
        NamespaceSpec(
            name,
            chains[name].root,
            _quotas(space.host_quota, space.cold_quota, config, plan),
            None if space.ttl_s is None else int(space.ttl_s * 1e9),
        )
        for name, space in config.namespaces.items()
    ]
    return PlanSpec(
        plans, spaces, config.block_tokens, plan.block_bytes, zero_freed=tiers.host.zero_freed
    )


def _quotas(host: int, cold: int, config: Config, plan: PagePlan) -> dict[TierId, int]:
    """Quotas in pages, only where they bound something."""
    quotas: dict[TierId, int] = {}
    if host < config.tiers.host.capacity:
        quotas[TierId.HOST] = plan.warm_pages_in(host)
    if cold < config.tiers.cold.capacity:
        quotas[TierId.COLD] = plan.warm_pages_in(cold)
    return quotas


def _host(config: Config, plan: PagePlan, pages: int) -> HostTier:
    settings = config.tiers.host
    number = device_number(config.tiers.device.device)
    found = accelerators() if config.tiers.device.device != "cpu" else []
    device = next((one for one in found if one.number == number), None)
    node = settings.numa if isinstance(settings.numa, int) else None
    if settings.numa == "auto":
        node = home_node(device)
    driver = Driver.load() if device and settings.register_cuda == "auto" else None
    return HostTier(
        plan,
        pages=pages,
        node=node,
        hugepages=settings.hugepages,
        threads=settings.prefault_threads,
        registrar=driver.registrar(number) if driver else None,
        register_threads=settings.register_threads,
        home=unified_home(device) if device and settings.unified == "auto" else None,
    )


def _staging(config: Config, host: HostTier, device: DeviceTier) -> Staging | None:
    """The ring between the arena and the slab; None where both are host memory."""
    if device.device.type != "cuda":
        return None
    import torch

    driver = Driver.load()
    if driver is None:
        raise TierFailed("device tier: torch sees CUDA, but libcuda.so.1 cannot be loaded")
    limits = config.transfer
    streams = CudaStreams(driver, device.device, programs=limits.sm_budget)
    card = f"{driver.uuid(device.device.index)}-{driver.version}"
    # On streams of its own: what was launched on some is kept prepared, with its memory.
    scratch = partial(CudaStreams, driver, device.device, programs=limits.sm_budget)
    profile = link_profile(
        lambda: measure_device(scratch(), device.device), limits.link_profiles, card
    )
    for way, found in (("up", profile.up), ("down", profile.down)):
        least = found.crossover_bytes
        logger.info("link %s crossover_bytes=%d source=%s", way, least, profile.source)
    return Staging(
        streams,
        torch.from_numpy(host.pages),
        PlainSpread(streams, host.plan, device.blocks),
        profile=profile,
        regions=host.regions,
        slot_bytes=limits.staging // SLOTS,
    )


def _cold(
    config: Config, layout: Layout, pages: int, files: FileEngine, seal: Seal | None
) -> SegmentTier:
    return SegmentTier(
        files,
        layout.pages,
        layout.fingerprint,
        pages_max=pages,
        segment_cold_pages=config.tiers.cold.segment_cold_pages,
        inflight_max_bytes=config.transfer.inflight_max,
        seal=seal,
        erase_payloads=config.tiers.host.zero_freed,
    )


def device_number(wanted: str) -> int:
    """The CUDA device that a configuration names; where it names none, torch's current one."""
    number = wanted.partition(":")[2]
    if number:
        return int(number)
    torch = sys.modules.get("torch")
    started = torch is not None and torch.cuda.is_initialized()
    return int(torch.cuda.current_device()) if torch is not None and started else 0
