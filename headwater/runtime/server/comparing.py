"""A server's answer to whether its standby is what it is itself."""

from __future__ import annotations

from collections.abc import Callable

from headwater import messages as m
from headwater.runtime.server.standby_link import StandbyLink
from headwater.shard.digest import digests
from headwater.shard.snapshot import ShardSnapshot


def compare(
    number: int,
    snapshot: ShardSnapshot | None,
    replica: StandbyLink | None,
    patience: float,
    waiting: Callable[[str], None],
) -> m.Compared:
    """What both were at the snapshot's position; blocks until the standby has said so, or is lost.

    `waiting` is told every `patience` seconds for whom this waits.
    """
    if snapshot is None:
        failure = m.Refused("RefusedError", "the server that was asked to verify is lost: ask again")
        return m.Compared(number, -1, 0, 0, (), None, failure=failure)
    own, (standby, reason) = digests(snapshot), _of_standby(snapshot, replica, patience, waiting)
    return m.Compared(
        number, snapshot.index, snapshot.version, snapshot.position, own, standby, reason=reason
    )


def _of_standby(
    snapshot: ShardSnapshot, replica: StandbyLink | None, patience: float, waiting: Callable[[str], None]
) -> tuple[tuple[m.Digest, ...] | None, str]:
    if replica is None:
        return None, "it has no standby"
    if replica.began >= snapshot.position or not replica.caught_up:
        return None, "its standby has not caught up yet"
    while (told := replica.digests_at(snapshot.position, patience)) is None:
        if replica.over:
            return None, "its standby was lost meanwhile"
        waiting(f"server {snapshot.index} waits for its standby to sum up what it holds")
    return told, ""
