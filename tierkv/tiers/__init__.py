"""Tiers: where bytes live. A tier holds pages; it decides nothing and starts no thread."""
