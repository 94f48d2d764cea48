"""A server's part of the shared state, as a state machine: entries of the log in, answers out."""

from headwater.shard.shard import Shard
from headwater.shard.staging import Staging
from headwater.shard.tables import StagedRows
from headwater.shard.vector import Vector

__all__ = ["Shard", "StagedRows", "Staging", "Vector"]
