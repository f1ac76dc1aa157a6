"""Room: places in tiers, taken for what comes and given back by what goes.

It owns the tables and policies of all tiers. Making room evicts pages whose blocks are also in a
lower tier; what is nowhere else is saved first, by a move, and its page is free when that landed.
Single owner (the planner); `Movement` is the rest of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from tierkv.core.stats import Stats
from tierkv.core.tier import Span, TierId
from tierkv.plan.events import AnyInstruction
from tierkv.plan.policies import POLICIES
from tierkv.plan.policies.base import UNNAMED, About, EvictionPolicy
from tierkv.plan.prefetches import Prefetches
from tierkv.plan.radix import RadixIndex
from tierkv.plan.residency import TierTable
from tierkv.plan.spec import PlanSpec

Out = list[AnyInstruction]

#: A pass of eviction frees at least this many pages, or this share of a small tier.
_EVICT_PAGES_MAX: Final = 16
_EVICT_SHARE: Final = 64
#: So many chains may have grown in a tier before its policy hears of it.
_GROWN_MAX: Final = 64


class Room(ABC):
    """See the module."""

    def __init__(self, spec: PlanSpec, index: RadixIndex, stats: Stats) -> None:
        self.spec = spec
        self.index = index
        self.stats = stats
        self.tables = {
            t: TierTable(
                p.pages, p.page_blocks, counts_openings=spec.zero_freed and t is TierId.HOST
            )
            for t, p in spec.tiers.items()
        }
        self.policies: dict[TierId, EvictionPolicy] = {
            t: POLICIES.load(p.policy)(p.pages) for t, p in spec.tiers.items()
        }
        self._grown: dict[TierId, dict[int, int]] = {t: {} for t in spec.tiers}  # block -> when
        self.dirty: set[int] = set()
        self.held: set[int] = set()
        self.deadlines: dict[int, int] = {}  # block -> when it is to be dropped
        self.loose: list[int] = []  # blocks that may be resident nowhere: see `prune`
        self.prefetches = Prefetches(stats, spec.block_bytes)
        self._quotas = {n.name: n.quota_pages for n in spec.namespaces if n.quota_pages}

    def expect(self, tier: TierId, blocks: Iterable[int]) -> None:
        """Blocks that a tier lacks are about to come: its policy may have known them."""
        policy = self.policies[tier]
        if policy.wants_names:
            policy.expect([self.index.key(block) for block in blocks])

    def track(self, tier: TierId, pages: Iterable[int], now_ns: int) -> None:
        """Pages have gained blocks that can be read, in this order."""
        policy = self.policies[tier]
        if policy.wants_names:
            for page in pages:
                policy.track(page, now_ns, self._about(tier, page))
        else:
            for page in pages:
                policy.track(page, now_ns, UNNAMED)

    def _about(self, tier: TierId, page: int) -> About:
        """A page is named by its first block."""
        table = self.tables[tier]
        start = page * table.page_blocks
        for at in range(start, start + table.page_blocks):
            block = table.block_at[at]
            if block >= 0:
                return About(self.index.key(block), depth=self.index.depth(block))
        return UNNAMED

    def touch(self, blocks: Sequence[int], now_ns: int) -> None:
        """Use a chain in every tier, last page first: see `EvictionPolicy.touch`."""
        for tier, table in self.tables.items():
            self._renew(tier)
            self.policies[tier].touch(table.pages_of(reversed(blocks)), now_ns)

    def grew(self, tier: TierId, block: int, count: int, now_ns: int) -> None:
        """A chain has grown by `count` blocks in a tier, the last of which is `block`.

        The new pages are younger than those before them, until `_renew`. That waits until somebody
        could see it, as a chain that grows in pieces costs all of its length once then.
        """
        grown = self._grown[tier]
        if not grown and self.index.depth(block) + 1 == count:
            return  # all of it is new, and tracked in order
        grown.pop(block, None)
        grown[block] = now_ns
        if len(grown) == _GROWN_MAX:
            self._renew(tier)

    def _renew(self, tier: TierId) -> None:
        """Parents are younger than their children again, in chains that have grown."""
        grown, table, policy = self._grown[tier], self.tables[tier], self.policies[tier]
        if not grown:
            return
        chains: list[tuple[list[int], int]] = []
        done: set[int] = set()
        for block in reversed(grown):
            if block not in done:
                chain = self.index.chain(block)
                chains.append((chain, grown[block]))
                if len(grown) > 1:
                    done.update(chain)
        grown.clear()
        for chain, now_ns in reversed(chains):  # the one that grew last is the most recent
            policy.renew(table.pages_of(reversed(chain)), now_ns)

    def room(
        self,
        tier: TierId,
        count: int,
        namespace: str,
        now_ns: int,
        out: Out,
        *,
        spare: Sequence[int] = (),
    ) -> list[Span]:
        """Take and pin up to `count` places, evicting colder pages, but not those of `spare`."""
        table = self.tables[tier]
        spans = self._take(table, tier, count, namespace, 0)
        taken = spans[-1].index + spans[-1].count if spans else 0
        if taken < count:
            pages = -(-(count - taken) // table.page_blocks)
            self._evict(tier, pages, namespace, now_ns, out, spare=spare)
            spans += self._take(table, tier, count, namespace, taken)
        return spans

    def fresh(self, tier: TierId, spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
        """Pages of these places that must be zeroed before they are written, with their opening."""
        openings = self.tables[tier].pool.openings
        if not openings:
            return ()
        pages = dict.fromkeys(span.page for span in spans)
        return tuple((page, openings[page]) for page in pages if page in openings)

    def whole_pages(
        self,
        tier: TierId,
        count: int,
        namespace: str,
        now_ns: int,
        out: Out,
        *,
        must: bool = False,
        over_hints: bool = False,
    ) -> list[int]:
        """Take and pin up to `count` whole pages, evicting where needed.

        `must`: a reader waits, so the policy may not refuse.
        `over_hints`: take what a PIN hint keeps, too.
        """
        table = self.tables[tier]
        pool, pins = table.pool, table.pins
        taken: list[int] = []
        while len(taken) < count:
            left = count - len(taken)
            if pool.free_pages < left or self._quota_left(tier, namespace) < 1:
                self._evict(tier, left, namespace, now_ns, out, must=must, over_hints=over_hints)
            pages = pool.take_pages(min(left, self._quota_left(tier, namespace)), namespace)
            if not pages:
                break
            for page in pages:
                pins[page] += 1
            taken += pages
        return taken

    def _take(
        self, table: TierTable, tier: TierId, count: int, namespace: str, index: int
    ) -> list[Span]:
        left = self._quota_left(tier, namespace) if self._quotas else None
        spans = table.pool.take(count, namespace, pages_max=left, index=index)
        pins = table.pins
        for span in spans:
            pins[span.page] += 1  # before anything else may evict it
        return spans

    def _quota_left(self, tier: TierId, namespace: str) -> int:
        pool = self.tables[tier].pool
        quota = self._quotas.get(namespace, {}).get(tier)
        return pool.pages if quota is None else quota - pool.owned[namespace]

    def _evict(
        self,
        tier: TierId,
        pages: int,
        namespace: str,
        now_ns: int,
        out: Out,
        *,
        spare: Sequence[int] = (),
        must: bool = False,
        over_hints: bool = False,
    ) -> None:
        """Free up to `pages` pages; those that must be copied first are freed when they landed."""
        table = self.tables[tier]
        pool, pins = table.pool, table.pins
        own_only = bool(self._quotas) and self._quota_left(tier, namespace) < 1
        wanted = pages if own_only else pages - pool.free_pages  # a quota has no use for free pages

        spared = set(table.pages_of(spare))

        def is_evictable(page: int) -> bool:
            # A sealed page is pinned by the transfer that sealed it.
            if pins[page] or page in spared or (own_only and pool.owner[page] != namespace):
                return False
            return over_hints or not self.held or self.held.isdisjoint(table.blocks_in(page))

        if wanted > 0 and not over_hints:  # no more than needed over a hint
            wanted = pages_to_evict(wanted, pool.pages)
        self._renew(tier)
        simple = not (own_only or self.held or spared)
        idle: Callable[[int], bool] = (lambda page: not pins[page]) if simple else is_evictable
        victims = self.policies[tier].evict(max(0, wanted), idle, now_ns, must=must)
        if any(other > tier for other in self.tables):
            victims = [page for page in victims if not self._save(tier, page, now_ns, out)]
        if victims:
            self.stats.add("tierkv_evicted_pages_total", len(victims), tier.label)
            blocks = table.clear(victims)
            if self.dirty or self.prefetches:
                for page in victims:
                    self._freed(tier, page)
            self._lost(tier, blocks)

    @abstractmethod
    def _save(self, tier: TierId, page: int, now_ns: int, out: Out) -> bool:
        """Copy a page down before it goes, if it holds the only copy of something."""

    def drop(self, tier: TierId, blocks: Sequence[int]) -> None:
        """Forget blocks in one tier; `prune` forgets those that are nowhere else."""
        if not blocks:
            return
        table = self.tables[tier]
        pages = {table.place[b] // table.page_blocks for b in blocks}
        table.drop(blocks)
        for page in pages:
            if page not in table.pool.owner:
                self.policies[tier].forget(page)
                self._freed(tier, page)
        self._lost(tier, blocks)

    def _freed(self, tier: TierId, page: int) -> None:
        if tier is TierId.HOST:
            self.dirty.discard(page)
            self.prefetches.gone(page)

    def _lost(self, tier: TierId, blocks: Sequence[int]) -> None:
        """Blocks left a tier: host copies of cold blocks are dirty again."""
        if tier is TierId.COLD:
            host = self.tables[TierId.HOST]
            self.dirty.update(
                host.place[b] // host.page_blocks for b in blocks if host.ready[b] >= 0
            )
        self.loose.extend(blocks)

    def unpin(self, tier: TierId, page: int) -> None:
        """Undo one pin; a page that was emptied meanwhile is free now."""
        table = self.tables[tier]
        table.unpin(page)
        if page not in table.pool.owner:
            self.policies[tier].forget(page)

    def prune(self) -> None:
        """Remove from the index what is resident nowhere.

        Once an event, at its end: until then a block that is about to be placed would look idle.
        """
        gone = self.index.prune(self.loose, [table.place for table in self.tables.values()])
        if self.held:
            self.held.difference_update(gone)
        for grown in self._grown.values():
            if grown:
                for block in gone:
                    grown.pop(block, None)
        if self.deadlines:
            for block in gone:
                self.deadlines.pop(block, None)
        self.loose.clear()


def pages_to_evict(wanted: int, pages: int) -> int:
    """How many pages of a tier to evict where so many are wanted.

    A few more at once, as most of the cost is per pass.
    """
    return max(wanted, min(_EVICT_PAGES_MAX, pages // _EVICT_SHARE))
