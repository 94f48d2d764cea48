"""When a row of a table comes into being, and when it ceases to be.

Value objects; `headwater.shard.table` acts on them. Both are decided within a virtual slot by the ids pushed
to it, so they come out the same for any number of servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from headwater.messages import RuleSpec
from headwater.spec.placement import SLOTS
from headwater.spec.settings import Settings, refuse_unknown, require

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class AfterCount(Settings):
    """Make an id's row in the `count`-th update that carries it; gradients before that are dropped.

    Workers that push an id in one update count once. What is remembered of ids that are not admitted is
    bounded: 128 a virtual slot, 524,288 in the whole table, in buckets of 8 by hash. Beyond that a new id
    displaces the one of its bucket that was not pushed for longest, which then starts from nothing: an id may
    be admitted later than at its `count`-th update, never earlier.

    Args:
        count: how many updates must carry an id before it has a row; 1 admits all.

    Raises:
        ConfigurationError: `count` is below 1.
    """

    count: int

    def check(self) -> None:
        """There is a first update."""
        require(1 <= self.count <= _MOST, self, "count", f"from 1 (all ids) to {_MOST}")


@dataclass(frozen=True, slots=True)
class AfterSteps(Settings):
    """Treat a row as absent once more than `steps` versions passed since its last applied gradient.

    Reading a row does not keep it. One that expired starts anew: admission, initial value, state and count.

    Args:
        steps: versions that a row outlives its last gradient by.

    Raises:
        ConfigurationError: `steps` is below 1.
    """

    steps: int

    def check(self) -> None:
        """A row outlives the update that made it."""
        require(1 <= self.steps <= _MOST, self, "steps", f"from 1 to {_MOST}")


@dataclass(frozen=True, slots=True)
class LeastRecentlyUsed(Settings):
    """Keep at most `max_rows` rows: those whose gradients were applied last.

    Each of the 4096 virtual slots keeps its share. After an update that leaves one with more, its rows
    with the smallest (step, id) go, until fifteen sixteenths of the share are left.

    Args:
        max_rows: rows of the whole table, at least 4096.

    Raises:
        ConfigurationError: not even one row a virtual slot.
    """

    max_rows: int

    def check(self) -> None:
        """Every slot has a share."""
        require(SLOTS <= self.max_rows <= _MOST, self, "max_rows", f"from {SLOTS} (one a slot) to {_MOST}")

    @property
    def share(self) -> int:
        """Most rows of one virtual slot."""
        return self.max_rows // SLOTS

    @property
    def kept(self) -> int:
        """Rows that a slot over its share keeps."""
        return self.share - self.share // 16


Expiry: TypeAlias = AfterSteps | LeastRecentlyUsed

ADMISSIONS: dict[str, type[AfterCount]] = {AfterCount.__name__: AfterCount}
EXPIRIES: dict[str, type[AfterSteps] | type[LeastRecentlyUsed]] = {
    AfterSteps.__name__: AfterSteps,
    LeastRecentlyUsed.__name__: LeastRecentlyUsed,
}


def admission_from_spec(spec: RuleSpec) -> AfterCount:
    """The admission that a spec describes.

    Raises:
        ConfigurationError: an unknown name, or an unknown, missing, ill-typed or impossible setting.
    """
    refuse_unknown("no admission", [spec.name], ADMISSIONS)
    return ADMISSIONS[spec.name].from_flat(spec.settings)


def expiry_from_spec(spec: RuleSpec) -> Expiry:
    """The expiry that a spec describes.

    Raises:
        ConfigurationError: an unknown name, or an unknown, missing, ill-typed or impossible setting.
    """
    refuse_unknown("no expiry", [spec.name], EXPIRIES)
    return EXPIRIES[spec.name].from_flat(spec.settings)
