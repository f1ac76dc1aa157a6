"""File engines: how the cold tier reaches its directory. One file per engine, one line here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from tierkv.core.errors import TierFailed
from tierkv.core.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from tierkv.tiers.files.base import FileEngine

logger = logging.getLogger(__name__)

#: In the order in which `auto` tries them.
FILE_ENGINES = Registry(
    "files",
    {
        "direct": "tierkv.tiers.files.direct:DirectFiles",
        "portable": "tierkv.tiers.files.portable:PortableFiles",
        "gds": "tierkv.tiers.files.gds:GdsFiles",
    },
)


def probe_engines(root: Path) -> dict[str, str | None]:
    """Every engine's name and why it does not work beneath `root`; None where it does."""
    return {name: _engine(name).probe(root) for name in FILE_ENGINES}


def choose_engine(root: Path, wanted: str = "auto") -> FileEngine:
    """The engine named `wanted`, or for "auto" the first that works beneath `root`.

    Raises TierFailed with every reason if none works, ConfigError if `wanted` is unknown.
    """
    reasons: list[str] = []
    for name in FILE_ENGINES if wanted == "auto" else (wanted,):
        engine = _engine(name)
        if wanted == "auto" and not is_for_auto(engine):
            continue
        reason = engine.probe(root)
        if reason is None:
            try:
                chosen = engine(root)
            except OSError as error:  # the root is another one since it was probed
                reason = str(error)
            else:
                logger.info("file engine chosen engine=%s root=%s", name, root)
                return chosen
        logger.info("file engine passed over engine=%s reason=%s", name, reason)
        reasons.append(f"{name}: {reason}")
    cure = "chmod 700, or choose another directory" if wanted == "auto" else "try cold.engine: auto"
    raise TierFailed(f"no file engine works beneath {root} ({'; '.join(reasons)}); {cure}")


def is_for_auto(engine: type[FileEngine]) -> bool:
    """Whether `auto` may take this engine; one with a true `by_name_only` has to be asked for."""
    return not getattr(engine, "by_name_only", False)


def _engine(name: str) -> type[FileEngine]:
    return cast("type[FileEngine]", FILE_ENGINES.load(name))
