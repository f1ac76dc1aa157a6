"""Seals: what protects the cold tier beyond checksums. One file per kind, one line here.

A store without one writes format 1. `none` is no kind: it is the absence of a seal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from tierkv.core.errors import ConfigError, TierFailed
from tierkv.core.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from tierkv.tiers.seals.base import Seal

NO_SEAL: Final = "none"

SEALS = Registry(
    "seals",
    {
        "hmac": "tierkv.tiers.seals.hmac_sha256:HmacSeal",
        "aes-256-gcm": "tierkv.tiers.seals.aes_gcm:AesGcmSeal",
    },
)


def check_key_file(protection: str, key_file: Path | None) -> None:
    """ValueError, with the cure, for a protection without a key, or a key without one."""
    if protection == NO_SEAL and key_file is not None:
        raise ValueError(f"a key protects nothing with protection: none; set {' or '.join(SEALS)}")
    if protection != NO_SEAL and key_file is None:
        raise ValueError(f"protection: {protection} needs one; make it with: tierkv keygen FILE")


def load_seal(protection: str, key_file: Path | None) -> Seal | None:
    """The seal of that name with the key in `key_file`; None for `none`.

    Raises ConfigError for a key that is missing, unreadable or open to others, and for a library
    that is not installed.
    """
    from tierkv.tiers.seals.key_file import read_key

    if protection == NO_SEAL:
        return None
    if key_file is None:
        raise ConfigError(f"tiers.cold.protection: {protection} needs a key_file")
    kind = cast("type[Seal]", SEALS.load(protection))
    return kind(read_key(key_file))


def expect_protection(found: str, expected: str) -> None:
    """TierFailed, in words that follow "it is", unless what lies on the disk is as configured."""
    if found != expected:
        told = "not protected" if found == NO_SEAL else f"protected by {found}"
        raise TierFailed(
            f"{told}, and tiers.cold.protection is {expected}; cure: set the protection and the "
            "key_file it was written with, another directory, or remove its contents"
        )
