"""Recovery: taking over what the cold tier found when it was opened.

Pages tell which blocks they hold and each block's parent. The newest copy of a key wins; blocks
whose history was not found whole can never be asked for and are let go, their places free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tierkv.core.keys import BlockKey
from tierkv.core.tier import RecoveredPage, Span, TierId
from tierkv.plan.movement import Movement
from tierkv.plan.radix import ROOT, RadixIndex
from tierkv.plan.spec import PlanSpec


class Found(NamedTuple):
    """One block's newest copy."""

    page: int
    position: int
    parent: bytes
    namespace: str


def take_over(
    pages: Sequence[RecoveredPage],
    spec: PlanSpec,
    index: RadixIndex,
    movement: Movement,
    now_ns: int,
) -> None:
    """Take over what the cold tier found; newest copy of a key wins, orphans are let go."""
    cold = movement.tables[TierId.COLD]
    chosen: dict[bytes, Found] = {}
    for page in sorted(pages, key=lambda p: -p.generation):
        for label in page.label.blocks:
            found = Found(page.page, label.position, label.parent, page.label.namespace)
            chosen.setdefault(label.key, found)
    per_page: dict[int, tuple[str, list[int], list[int]]] = {}
    ids: dict[bytes, int] = {}
    for key in _reachable(chosen, spec):
        number, offset, parent, namespace = chosen[key]
        ids[key] = index.insert_below(ids.get(parent, ROOT), BlockKey(key))
        _, offsets, blocks = per_page.setdefault(number, (namespace, [], []))
        offsets.append(offset)
        blocks.append(ids[key])
    for table in movement.tables.values():
        table.grow(index.ids_end)
    cold.pool.adopt({page: (ns, offsets) for page, (ns, offsets, _) in per_page.items()})
    order = {p.page: p.generation for p in pages}
    for number in sorted(per_page, key=order.__getitem__):
        _, offsets, blocks = per_page[number]
        cold.fill(blocks, [Span(i, number, o, 1) for i, o in enumerate(offsets)])
        cold.publish(blocks)
        movement.track(TierId.COLD, (number,), now_ns)


def _reachable(chosen: Mapping[bytes, Found], spec: PlanSpec) -> list[bytes]:
    """Keys whose whole history was found, parents before children."""
    roots = {space.root: space.name for space in spec.namespaces}
    children: dict[bytes, list[bytes]] = {}
    ready: list[bytes] = []
    for key, (_, _, parent, namespace) in chosen.items():
        if parent in roots:
            if roots[parent] == namespace:
                ready.append(key)
        else:
            children.setdefault(parent, []).append(key)
    for key in ready:  # grows while it is walked
        ready.extend(children.get(key, ()))
    return ready
