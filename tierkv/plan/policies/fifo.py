"""First in, first out: pages go in the order in which they came, whatever is used."""

from __future__ import annotations

from tierkv.plan.policies.queues import Ordered


class FIFO(Ordered):
    """Pages in order of arrival, oldest first."""

    __slots__ = ()
