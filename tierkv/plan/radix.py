"""Radix index: the known prefixes, as a tree of runs of blocks.

A node is a **run**: consecutive blocks that share one history without a branch. Block ids are
dense small integers that other tables use as indices; an id is reused after its block is removed.

A key names its whole prefix (see `tierkv.core.keys`). So two chains that agree at one position
agree at all earlier ones, and a run is compared with a chain by its last key alone, or by
bisection: finding a prefix costs a few look-ups a run, not one a block.

Invariants (`check` verifies them):
1. Prefix-closed: a known block's parent is known (or is a namespace root), so of any chain of
   keys the known ones are a prefix. A known block may be resident nowhere (a gap in a prefix).
2. A node other than the root has at least one block; a block is in exactly one node.
3. No node has exactly one child (equal runs are merged), except the root.
4. Only leaves are removed.

Single owner (the planner).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tierkv.core.keys import BlockKey

#: The parent id of a namespace's first block.
ROOT = -1


class Node:
    """One run: keys and block ids in order, and the runs that continue it by their first key."""

    __slots__ = ("blocks", "children", "keys", "parent")

    def __init__(self, parent: Node | None, keys: list[BlockKey], blocks: list[int]) -> None:
        self.parent = parent
        self.keys = keys
        self.blocks = blocks
        self.children: dict[BlockKey, Node] = {}


class RadixIndex:
    """Keys to block ids, with the tree that orders their removal."""

    __slots__ = ("_free", "_node_of", "_position", "_root", "forgotten")

    def __init__(self) -> None:
        #: Keys that were forgotten, where somebody asks for them.
        self.forgotten: list[BlockKey] | None = None
        self._root = Node(None, [], [])
        self._node_of: list[Node | None] = []  # by block id; None: the id is free
        self._position = array("q")  # by block id: where in its run
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._node_of) - len(self._free)

    @property
    def ids_end(self) -> int:
        """One past the largest id ever given; tables indexed by id need this length."""
        return len(self._node_of)

    def match(self, keys: Sequence[BlockKey], first: int = 0, stop: int | None = None) -> list[int]:
        """The ids of ``keys[first:stop]``, as far as that chain is known. No side effect."""
        return self._walk(keys, first, len(keys) if stop is None else stop)[0]

    def is_known(self, block: int) -> bool:
        """Whether this id names a block now."""
        return self._node_of[block] is not None

    def names(self, block: int, key: BlockKey) -> bool:
        """Whether this id names that key now: an id outlives its block."""
        node = self._node_of[block]
        return node is not None and node.keys[self._position[block]] == key

    def key(self, block: int) -> BlockKey:
        """The key of a known block."""
        return self._node(block).keys[self._position[block]]

    def parent(self, block: int) -> int:
        """The parent of a known block, or ROOT."""
        node, position = self._node(block), self._position[block]
        if position:
            return node.blocks[position - 1]
        above = node.parent
        return above.blocks[-1] if above is not None and above.blocks else ROOT

    def chain(self, block: int) -> list[int]:
        """The ids from a chain's first block to this one."""
        node: Node | None = self._node(block)
        parts = [self._node(block).blocks[: self._position[block] + 1]]
        while (node := node.parent if node else None) is not None:
            parts.append(node.blocks)
        blocks: list[int] = []
        for part in reversed(parts):
            blocks += part
        return blocks

    def depth(self, block: int) -> int:
        """How many blocks a chain has before this one."""
        node: Node | None = self._node(block)
        count = self._position[block]
        while (node := node.parent if node else None) is not None:
            count += len(node.blocks)
        return count

    def is_leaf(self, block: int) -> bool:
        """Whether nothing known continues this block."""
        node = self._node(block)
        return node.blocks[-1] == block and not node.children

    def insert(self, keys: Sequence[BlockKey]) -> Sequence[int]:
        """Make a chain known; gives the ids of all its blocks, old and new.

        The ids of new blocks are consecutive where they can be: if all are new, a `range` comes
        back then, and tables indexed by it are written by slices.
        """
        ids, node, length = self._walk(keys, 0, len(keys))
        fresh = list(keys[len(ids) :])
        if not fresh:
            return ids
        new = self._append(node, length, fresh)
        return [*ids, *new] if ids else new

    def insert_below(self, parent: int, key: BlockKey) -> int:
        """Make one block known below a known one, or ROOT; it must not be known yet."""
        node = self._root if parent == ROOT else self._node(parent)
        length = 0 if parent == ROOT else self._position[parent] + 1
        return self._append(node, length, [key])[0]

    def remove(self, block: int) -> int:
        """Forget a leaf; gives its parent (or ROOT), which may have become a leaf."""
        assert self.is_known(block), f"block {block} is not known"
        assert self.is_leaf(block), f"block {block} has children; remove those first"
        parent = self.parent(block)
        self._cut(self._node(block), 1)
        return parent

    def prune(self, blocks: Sequence[int], places: Sequence[Sequence[int]]) -> list[int]:
        """Forget blocks that no table of `places` has, leaves first, with the gaps above them.

        Those that something known continues stay. Gives what was forgotten.
        """
        gone: list[int] = []
        first, others = places[0], places[1:]
        for block in reversed(blocks):
            node = self._node_of[block]
            while node is not None and node is not self._root and not node.children:
                run, above, count = node.blocks, node.parent, 0
                for at in reversed(run):
                    if first[at] >= 0 or (others and any(place[at] >= 0 for place in others)):
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
            assert len(node.blocks) == len(node.keys), "a run with more keys than blocks"
            assert len(node.children) != 1, "two runs that should be one"
            for position, block in enumerate(node.blocks):
                assert block not in seen, f"block {block} is in two runs"
                assert self._node_of[block] is node, f"block {block} points at another run"
                assert self._position[block] == position, f"block {block} has a wrong position"
                seen.add(block)
            for first, child in node.children.items():
                assert child.keys[0] == first, "a child is filed under a wrong key"
                stack.append((node, child))
        assert len(seen) == len(self), "ids leaked"

    def _node(self, block: int) -> Node:
        node = self._node_of[block]
        assert node is not None, f"block {block} is not known"
        return node

    def _walk(self, keys: Sequence[BlockKey], first: int, stop: int) -> tuple[list[int], Node, int]:
        """Known ids of ``keys[first:stop]``, the run where they end, how much of it they take."""
        ids: list[int] = []
        node, at = self._root, 0
        while at < stop:
            child = node.children.get(keys[at])
            if child is None:
                break
            node, run = child, child.keys
            length = min(len(run), stop - at)
            if run[length - 1] != keys[at + length - 1]:
                length = _agreeing(run, keys, at, length)
            if at + length > first:
                ids += node.blocks[max(0, first - at) : length]
            if length < len(run):
                return ids, node, length
            at += length
        return ids, node, len(node.blocks)

    def _append(self, node: Node, length: int, fresh: list[BlockKey]) -> Sequence[int]:
        """Continue a run after its first `length` blocks; gives the ids of the new ones."""
        if length < len(node.blocks):
            self._split(node, length)
        if node is self._root or node.children:
            child = Node(node, [], [])
            node.children[fresh[0]] = child
            node = child
        new = self._new_ids(len(fresh))
        start = len(node.blocks)
        node.keys += fresh
        node.blocks += new
        self._place(node, new, start)
        return new

    def _new_ids(self, count: int) -> Sequence[int]:
        free = self._free
        if len(free) < count:
            start = len(self._node_of)
            self._node_of += [None] * count
            self._position += array("q", bytes(8 * count))
            return range(start, start + count)
        # Removal goes leaf first, so the newest free ids, reversed, are usually consecutive.
        reused = free[: -count - 1 : -1]
        del free[-count:]
        row = range(reused[0], reused[0] + count)
        return row if reused[-1] == row[-1] and reused == list(row) else reused

    def _place(self, node: Node, blocks: Sequence[int], start: int) -> None:
        """Note that blocks are in a run from position `start` on."""
        if isinstance(blocks, range):
            at = slice(blocks.start, blocks.stop)
            self._node_of[at] = [node] * len(blocks)
            self._position[at] = array("q", range(start, start + len(blocks)))
        else:
            for position, block in enumerate(blocks, start):
                self._node_of[block] = node
                self._position[block] = position

    def _split(self, node: Node, length: int) -> None:
        """Cut a run: the node keeps its first `length` blocks, a new child takes the rest."""
        tail = Node(node, node.keys[length:], node.blocks[length:])
        tail.children = node.children
        for child in tail.children.values():
            child.parent = tail
        self._place(tail, tail.blocks, 0)
        del node.keys[length:], node.blocks[length:]
        node.children = {tail.keys[0]: tail}

    def _cut(self, node: Node, count: int) -> None:
        """Forget the last `count` blocks of a leaf run."""
        keep = len(node.blocks) - count
        tail, first = node.blocks[keep:], node.keys[0]
        if self.forgotten is not None:
            self.forgotten += node.keys[keep:]
        del node.blocks[keep:], node.keys[keep:]
        if not keep:
            self._detach(node, first)
        for block in tail:
            self._node_of[block] = None
        self._free += reversed(tail)

    def _detach(self, node: Node, first: BlockKey) -> None:
        """Take an emptied node out, and merge its parent with an only child that is left."""
        above = node.parent
        assert above is not None
        del above.children[first]
        if above is self._root or len(above.children) != 1:
            return
        (only,) = above.children.values()
        start = len(above.blocks)
        above.keys += only.keys
        above.blocks += only.blocks
        above.children = only.children
        for child in above.children.values():
            child.parent = above
        self._place(above, only.blocks, start)


def _agreeing(run: Sequence[BlockKey], keys: Sequence[BlockKey], at: int, length: int) -> int:
    """How many of the first `length` keys of a run a chain has from `at` on; the first it has."""
    low, high = 1, length - 1
    while low < high:
        middle = (low + high) // 2
        if run[middle] == keys[at + middle]:
            low = middle + 1
        else:
            high = middle
    return low
