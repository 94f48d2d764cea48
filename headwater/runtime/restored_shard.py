"""A server's shard as a checkpoint has it: the first of a new generation of the log."""

from __future__ import annotations

import msgspec

from headwater import messages as m
from headwater.checkpoint import open_checkpoint, read_part, read_programs
from headwater.shard import Shard
from headwater.shard.resumed import Kept, resumed
from headwater.spec.sync import Reduce


def restored(path: str, index: int, servers: int, reduce: Reduce) -> Shard:
    """Server `index` of `servers`, however many wrote the checkpoint; blocks for reading its part.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigurationError: there is no checkpoint, or one of a newer format.
    """
    manifest = open_checkpoint(path).manifest
    kept = Kept(
        manifest.version,
        msgspec.json.decode(manifest.members, type=m.LogStateRecord),
        msgspec.json.decode(manifest.splits, type=m.DataProgress),
        read_programs(path),
    )
    return Shard.restore(resumed(index, servers, kept, *read_part(path, index, servers)), reduce)
