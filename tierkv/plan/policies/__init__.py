"""Eviction policies: one file per policy, one line here."""

from tierkv.core.registry import Registry

POLICIES = Registry(
    "policies",
    {
        "lru": "tierkv.plan.policies.lru:LRU",
        "fifo": "tierkv.plan.policies.fifo:FIFO",
        "s3fifo": "tierkv.plan.policies.s3fifo:S3FIFO",
        "sieve": "tierkv.plan.policies.sieve:SIEVE",
        "arc": "tierkv.plan.policies.arc:ARC",
        "mq": "tierkv.plan.policies.mq:MQ",
        "gdsf": "tierkv.plan.policies.gdsf:GDSF",
        "w_tinylfu": "tierkv.plan.policies.w_tinylfu:WTinyLFU",
        "ttl": "tierkv.plan.policies.ttl:TTL",
    },
)
