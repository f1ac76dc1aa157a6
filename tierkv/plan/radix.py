"""Radix index: the known prefixes, as a tree of runs of blocks.

A node is a **run**: consecutive blocks that share one history without a branch. Block ids are
dense small integers that other tables use as indices; an id is reused after its block is removed.

Invariants (`check` verifies them):
1. Prefix-closed: a known block's parent is known (or is a namespace root), so of any chain of
   keys the known ones are a prefix. A known block may be resident nowhere (a gap in a prefix).
2. A node other than a root has at least one block; a block is in exactly one node.
3. No node has exactly one child (equal runs are merged), except roots.
4. Only leaves are removed.

Because a key names its whole prefix, walking the tree and looking keys up in one flat table
find the same blocks; `match` does the latter. Single owner (the planner).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tierkv.core.keys import BlockKey

#: The parent id of a namespace's first block.
ROOT = -1


class Node:
    """One run of blocks and the runs that continue it, by their first block."""

    __slots__ = ("blocks", "children", "parent")

    def __init__(self, parent: Node | None, blocks: list[int]) -> None:
        self.parent = parent
        self.blocks = blocks
        self.children: dict[int, Node] = {}


class RadixIndex:
    """Keys to block ids, with the tree that orders their removal."""

    __slots__ = ("_free", "_ids", "_keys", "_node_of", "_parent", "_root")

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}
        self._keys: list[BlockKey | None] = []
        self._parent: list[int] = []
        self._node_of: list[Node] = []
        self._free: list[int] = []
        self._root = Node(None, [])

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids_end(self) -> int:
        """One past the largest id ever given; tables indexed by id need this length."""
        return len(self._keys)

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """The ids of the longest known prefix of `keys`. O(blocks), no side effect."""
        ids = list(map(self._ids.get, keys))
        if ids and ids[-1] is None:
            ids = ids[: ids.index(None)]
        return ids  # type: ignore[return-value]

    def find(self, key: bytes) -> int | None:
        """The id of one key, or None."""
        return self._ids.get(key)

    def is_known(self, block: int) -> bool:
        """Whether this id names a block now."""
        return self._keys[block] is not None

    def key(self, block: int) -> BlockKey:
        """The key of a known block."""
        key = self._keys[block]
        assert key is not None, f"block {block} is not known"
        return key

    def parent(self, block: int) -> int:
        """The parent of a known block, or ROOT."""
        return self._parent[block]

    def insert(self, keys: Sequence[BlockKey], *, parent: int = ROOT) -> Sequence[int]:
        """Make a chain known below `parent`; gives the ids of all its blocks, old and new.

        The ids of new blocks are consecutive where they can be: then a `range` comes back, and
        tables indexed by it are written by slices.
        """
        ids = self.match(keys)
        fresh = keys[len(ids) :]
        if not fresh:
            return ids
        above = ids[-1] if ids else parent
        new = self._new_ids(len(fresh))
        node = self._grow(above, new)
        if isinstance(new, range):
            at = slice(new.start, new.stop)
            self._keys[at] = fresh
            self._parent[at] = [above, *new[:-1]]
            self._node_of[at] = [node] * len(new)
        else:
            for block, key in zip(new, fresh, strict=True):
                self._keys[block] = key
                self._parent[block] = above
                self._node_of[block] = node
                above = block
        self._ids.update(zip(fresh, new, strict=True))
        return [*ids, *new] if ids else new

    def is_leaf(self, block: int) -> bool:
        """Whether nothing known continues this block."""
        node = self._node_of[block]
        return node.blocks[-1] == block and not node.children

    def remove(self, block: int) -> int:
        """Forget a leaf; gives its parent (or ROOT), which may have become a leaf."""
        assert self.is_known(block), f"block {block} is not known"
        assert self.is_leaf(block), f"block {block} has children; remove those first"
        self._cut(self._node_of[block], 1)
        return self._parent[block]

    def prune(self, blocks: Sequence[int], places: Sequence[list[int]]) -> list[int]:
        """Forget blocks that no table of `places` has, leaves first, with the gaps above them.

        Those that something known continues stay. Gives what was forgotten.
        """
        gone: list[int] = []
        first, others = places[0], places[1:]
        for block in reversed(blocks):
            if self._keys[block] is None:
                continue
            node: Node | None = self._node_of[block]
            while node is not None and node is not self._root and not node.children:
                run, above, count = node.blocks, node.parent, 0
                for at in reversed(run):
                    if first[at] >= 0 or (others and any([place[at] >= 0 for place in others])):
                        break
                    count += 1
                if not count:
                    break
                gone += run[len(run) - count :]
                emptied = count == len(run)
                self._cut(node, count)
                node = above if emptied else None
        return gone

    def runs(self) -> Iterator[list[int]]:
        """Every run, parents before children."""
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield list(node.blocks)
            stack.extend(node.children.values())

    def check(self) -> None:
        """Assert the invariants; O(blocks), for tests and `tierkv check`."""
        seen: set[int] = set()
        stack = [(self._root, child) for child in self._root.children.values()]
        while stack:
            above, node = stack.pop()
            assert node.parent is above, "a child does not know its parent"
            assert node.blocks, "an empty run"
            assert len(node.children) != 1, "two runs that should be one"
            before = above.blocks[-1] if above is not self._root else ROOT
            for block in node.blocks:
                assert block not in seen, f"block {block} is in two runs"
                assert self._node_of[block] is node, f"block {block} points at another run"
                assert self._parent[block] == before, f"block {block} has a wrong parent"
                assert self._ids[self.key(block)] == block, f"block {block} has a wrong key"
                seen.add(block)
                before = block
            for first, child in node.children.items():
                assert child.blocks[0] == first, "a child is filed under a wrong block"
                stack.append((node, child))
        assert len(seen) == len(self._ids) == len(self._keys) - len(self._free)

    def _new_ids(self, count: int) -> Sequence[int]:
        free = self._free
        if len(free) < count:
            start = len(self._keys)
            self._keys += [None] * count
            self._parent += [ROOT] * count
            self._node_of += [self._root] * count
            return range(start, start + count)
        # Removal goes leaf first, so the newest free ids, reversed, are usually consecutive.
        reused = free[: -count - 1 : -1]
        del free[-count:]
        row = range(reused[0], reused[0] + count)
        return row if reused[-1] == row[-1] and reused == list(row) else reused

    def _grow(self, above: int, new: Sequence[int]) -> Node:
        """Put a run of new blocks below `above`, splitting its run if it goes on otherwise."""
        if above == ROOT:
            node = self._root
        else:
            node = self._node_of[above]
            if node.blocks[-1] != above:
                self._split(node, above)
            elif not node.children:
                node.blocks += new
                return node
        child = Node(node, list(new))
        node.children[new[0]] = child
        return child

    def _split(self, node: Node, last: int) -> None:
        """Cut a run after `last`: the node keeps the head, a new child takes the rest."""
        cut = node.blocks.index(last) + 1
        tail = Node(node, node.blocks[cut:])
        tail.children = node.children
        for child in tail.children.values():
            child.parent = tail
        for block in tail.blocks:
            self._node_of[block] = tail
        del node.blocks[cut:]
        node.children = {tail.blocks[0]: tail}

    def _cut(self, node: Node, count: int) -> None:
        """Forget the last `count` blocks of a leaf run."""
        run = node.blocks
        tail = run[len(run) - count :]
        del run[len(run) - count :]
        if not run:
            self._detach(node, tail[0])
        names, ids = self._keys, self._ids
        for block in tail:
            del ids[names[block]]  # type: ignore[arg-type]
            names[block] = None
        self._free += reversed(tail)

    def _detach(self, node: Node, first: int) -> None:
        """Take an emptied node out, and merge its parent with an only child that is left."""
        above = node.parent
        assert above is not None
        del above.children[first]
        if above is self._root or len(above.children) != 1:
            return
        (only,) = above.children.values()
        above.blocks += only.blocks
        above.children = only.children
        for child in above.children.values():
            child.parent = above
        for block in only.blocks:
            self._node_of[block] = above
