"""What a coordinator is told of its cluster, and passes on to every member."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headwater.errors import ConfigurationError
from headwater.spec.seconds import seconds
from headwater.spec.user_settings import checked


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What every member is told. `settings`: the user's own, plain data for `worker.settings`;
    times in seconds.

    A member that is not heard of for `lease` is declared dead; it lets itself be heard of three times in one.
    A `patience` of more than half of the `deadline` is cut to that.
    `rewinds`: when a shard is lost everything begins anew from a checkpoint, instead of ending.
    `generation`: of the log, to begin with. `min_workers`: with fewer nothing is committed.

    Raises:
        ConfigurationError: an impossible one.
    """

    workers: int
    servers: int
    sync: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    patience: float = 10.0
    deadline: float = 600.0
    lease: float = 15.0
    replicas: int = 0
    rewinds: bool = False
    generation: int = 0
    min_workers: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", checked(self.settings))
        for name in ("workers", "servers", "min_workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be an integer ≥ 1, got {value!r}")
        if isinstance(self.replicas, bool) or self.replicas not in (0, 1):
            raise ConfigurationError(f"replicas must be 0 or 1, got {self.replicas!r}")
        if self.min_workers > self.workers:
            raise ConfigurationError(
                f"min_workers must be at most workers={self.workers}, got {self.min_workers}"
            )
        for name in ("patience", "deadline", "lease"):
            object.__setattr__(self, name, seconds(name, getattr(self, name)))
        # A wait that ends before anybody has said for whom it is could only be reported as silence.
        object.__setattr__(self, "patience", min(self.patience, self.deadline / 2))

    def kept(self) -> dict[str, Any]:
        """What must be the same when a coordinator starts again: all that members were told or go by."""
        kept = dataclasses.asdict(self)
        del kept["generation"]
        return kept
