"""What a coordinator is told of its cluster, and passes on to every member."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from headwater.messages import Scalar


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What every member is told. `settings`: the user's own, for `worker.settings`; times in seconds.

    A member that is not heard of for `lease` is declared dead; it lets itself be heard of three times in one.
    `rewinds`: when a shard is lost everything begins anew from a checkpoint, instead of ending.
    `generation`: of the log, to begin with.
    """

    workers: int
    servers: int
    sync: str
    settings: dict[str, Scalar] = field(default_factory=dict)
    patience: float = 10.0
    deadline: float = 600.0
    lease: float = 15.0
    replicas: int = 0
    rewinds: bool = False
    generation: int = 0

    def kept(self) -> dict[str, Any]:
        """What must be the same when a coordinator starts again: all that members were told or go by."""
        kept = dataclasses.asdict(self)
        del kept["generation"]
        return kept
