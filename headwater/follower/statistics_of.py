"""What a follower is at and has done, as plain data."""

from __future__ import annotations

import time

import msgspec

from headwater.follower.keeper import Keeper
from headwater.spec.version import Version


class FollowerStatistics(msgspec.Struct, frozen=True):
    """What a follower is at and what it has done; a snapshot.

    Attributes:
        version: what readers see; None before the first.
        newest: number of the newest version that it has heard of.
        age: seconds since the servers said that `version` is the newest.
        behind: how many newer versions it has heard of.
        installed: versions that it has shown.
        received: bytes of parameters and rows.
        whole: publications that brought all rows of a table, or all parameters where no table is followed.
        failed: publications that did not come, or not whole; the former version stayed.
        reconnects: times that it joined the cluster again.
        held_up: times that it waited for its readers' pins.
        pinned: versions that readers hold.
        reason: why it is not up to date, in words; "" while it is.
    """

    version: Version | None
    newest: int
    age: float
    behind: int
    installed: int
    received: int
    whole: int
    failed: int
    reconnects: int
    held_up: int
    pinned: int
    reason: str


def statistics_of(keeper: Keeper) -> FollowerStatistics:
    """Of the follower that this keeps up to date, now; does not block."""
    machine = keeper.machine
    with keeper.changed:
        current, counts = machine.current, keeper.counts
        return FollowerStatistics(
            version=current.version if current is not None else None,
            newest=machine.newest,
            age=time.monotonic() - current.as_of if current is not None else float("inf"),
            behind=machine.behind(current.version) if current is not None and current.version else 0,
            installed=machine.installed,
            received=counts.received,
            whole=counts.whole,
            failed=counts.failed,
            reconnects=counts.reconnects,
            held_up=counts.held_up,
            pinned=machine.pinned,
            reason=keeper.reason,
        )
