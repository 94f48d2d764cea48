"""Asks a running cluster whether every standby is what its server is, at one entry of the log."""

from __future__ import annotations

import msgspec

from headwater import messages as m
from headwater.errors import RefusedError, named
from headwater.runtime.client import Client
from headwater.spec.seconds import seconds
from headwater.wire.security import PLAIN, Security

_TRIES = 3


class ShardVerification(msgspec.Struct, frozen=True):
    """One shard. `differing`: parts of which server and standby have different digests, with both.

    `reason`: why there is no caught-up standby to compare with, or "". `parts`: how many were compared.
    """

    index: int
    parts: int
    differing: dict[str, tuple[str, str]]
    reason: str

    @property
    def equal(self) -> bool:
        """Whether there is a caught-up standby, and it is what its server is."""
        return not self.differing and not self.reason


class Verification(msgspec.Struct, frozen=True):
    """All shards right after the entry at `position` of the log."""

    version: int
    position: int
    shards: tuple[ShardVerification, ...]

    @property
    def equal(self) -> bool:
        """Whether all shards are."""
        return all(shard.equal for shard in self.shards)


def verify(coordinator: str, *, deadline: float | None = None, security: Security = PLAIN) -> Verification:
    """Compare every server of a cluster with its standby, while training goes on; blocks until all have.

    Training pauses for a copy of each shard in memory, as for a checkpoint; digests are made of the copies.

    `security`: what all nodes of the cluster were given.

    Raises:
        ConfigurationError: an impossible `deadline`.
        ConnectionLostError: nobody answers there, or the cluster ends.
        StalledError: `deadline` seconds passed, by default those of the cluster.
        RefusedError: `security` is not what the cluster's nodes must prove, or servers were replaced again
            and again meanwhile.
    """
    limit = None if deadline is None else seconds("deadline", deadline)
    session = Client(coordinator, "observer", deadline=limit, security=security)
    try:
        for left in reversed(range(_TRIES)):
            session.ask(m.Verify, "verify")
            compared: list[m.Compared] = session.ask(m.Compare, "compare", expects=m.Compared)
            failures = [one.failure for one in compared if one.failure is not None]
            if not failures:
                break
            if not left:
                raise named(failures[0].error, failures[0].reason, default=RefusedError)
        session.leave(finished=True)
    finally:
        session.close()
    return Verification(compared[0].version, compared[0].position, tuple(map(_shard, compared)))


def _shard(one: m.Compared) -> ShardVerification:
    standby = {digest.part: digest.value for digest in one.standby or ()}
    own = {digest.part: digest.value for digest in one.own}
    parts = dict.fromkeys((*own, *standby)) if one.standby is not None else ()
    differing = {
        part: (own.get(part, ""), standby.get(part, ""))
        for part in parts
        if own.get(part) != standby.get(part)
    }
    return ShardVerification(one.index, len(parts), differing, one.reason)
