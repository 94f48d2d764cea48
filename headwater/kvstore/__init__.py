"""MXNet's KVStore verbs over a Headwater cluster (docs/coming-from.md)."""

from __future__ import annotations

from headwater.kvstore.keyed_store import KVStore, create

__all__ = ["KVStore", "create"]
