"""Which stored blocks can be asked for: those whose whole history is stored too.

A block is reached from its namespace's root, parent by parent, so what a lost block costs is
itself and all that follow it. The store knows each root, a hash over the namespace's salt; a
directory does not say it. Here the root of the empty salt is known; for another namespace it is
taken to be the missing parent with the most blocks behind it, which counts too many where the
block right below the root is lost: see `roots_are_known`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from tierkv.core.keys import KeyChain
from tierkv.tiers.segment_format import PageHeader


def reachable(
    headers: Iterable[PageHeader], fingerprint: bytes, *, without: Collection[int] = ()
) -> set[bytes]:
    """Keys whose whole history is in `headers`, the pages `without` left out.

    Roots are judged from all of `headers`, so that a root is not lost with its first page.
    """
    every = list(headers)
    roots = _roots(_newest(every), fingerprint)
    chosen = _newest(header for header in every if header.page not in without)
    children: dict[bytes, list[bytes]] = {}
    for key, (parent, _) in chosen.items():
        children.setdefault(parent, []).append(key)
    ready = [key for root in roots for key in children.get(root, ())]
    for key in ready:  # grows while it is walked
        ready.extend(children.get(key, ()))
    return set(ready)


def roots_are_known(headers: Iterable[PageHeader], fingerprint: bytes) -> bool:
    """Whether every namespace here has the empty salt, and a block right below its root."""
    every = list(headers)
    plain = {h.label.namespace: _plain_root(fingerprint, h.label.namespace) for h in every}
    found = {
        h.label.namespace
        for h in every
        if any(b.parent == plain[h.label.namespace] for b in h.label.blocks)
    }
    return found == set(plain)


def _plain_root(fingerprint: bytes, namespace: str) -> bytes:
    return KeyChain(fingerprint, namespace=namespace, block_tokens=1).root


def _newest(headers: Iterable[PageHeader]) -> dict[bytes, tuple[bytes, str]]:
    """Parent and namespace of every key, by its newest copy."""
    chosen: dict[bytes, tuple[bytes, str]] = {}
    for header in sorted(headers, key=lambda h: -h.generation):
        for block in header.label.blocks:
            chosen.setdefault(block.key, (block.parent, header.label.namespace))
    return chosen


def _roots(chosen: dict[bytes, tuple[bytes, str]], fingerprint: bytes) -> set[bytes]:
    """The root of each namespace, as well as it can be told."""
    children: dict[bytes, list[bytes]] = {}
    for key, (parent, _) in chosen.items():
        children.setdefault(parent, []).append(key)
    heads = {(chosen[keys[0]][1], parent) for parent, keys in children.items()}
    missing = {(space, parent) for space, parent in heads if parent not in chosen}
    sizes: Counter[tuple[str, bytes]] = Counter()
    for space, parent in missing:
        behind = list(children[parent])
        for key in behind:  # grows while it is walked
            behind.extend(children.get(key, ()))
        sizes[space, parent] = len(behind)
    roots: dict[str, bytes] = {}
    for (space, parent), _ in sizes.most_common():
        if parent == _plain_root(fingerprint, space) or space not in roots:
            roots[space] = parent
    return set(roots.values())
