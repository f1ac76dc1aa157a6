"""vLLM's plug-in entry point: the connector by its name alone, without a module path."""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "TierKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "TierKVConnector", "tierkv.engines.vllm.connector", "TierKVConnector"
        )
