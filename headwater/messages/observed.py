"""What nodes count of themselves, in parts: histograms with fixed bounds, turns by stage, traffic."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

Nanoseconds: TypeAlias = int
"""Whole nanoseconds, so that parts add up exactly."""


class Histogram(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many values lie in each bucket.

    Attributes:
        counts: one for each bound of the metric (values ≤ that bound and > the one before), and one for what
            is larger than all.
        sum: of all values.
    """

    counts: tuple[int, ...] = ()
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class TurnBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Turns of one worker that belong together: of one round, or of a row of 2 ** `size` rounds.

    Attributes:
        key: number of the row: the version (in modes without rounds the step) shifted right by `size`.
        size: exponent of how many versions, or steps, a row has.
        turns: how many there were.
        ended: when the last of them ended, by the worker's monotonic clock.
        stages: nanoseconds that they spent in each of `headwater.spec.stages.STAGES`.
    """

    key: int
    size: int
    turns: int
    ended: Nanoseconds
    stages: tuple[Nanoseconds, ...]


class LoggedPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What `Worker.log` was told at one step.

    Attributes:
        step: of this rank over all its incarnations, finished when it was told.
        version: of the last answer then.
        age: seconds between that moment and the sending of the report.
        metrics: by name.
    """

    step: int
    version: int
    age: float
    metrics: dict[str, float]


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one node has sent and received, and who was turned away.

    Attributes:
        connections: that are open.
        sent: bytes, by transport ("unix", "tcp" or "tls"); memory that is shared is not counted.
        received: as `sent`.
        refused: connections that were refused or ended for what they sent, by reason.
    """

    connections: int = 0
    sent: dict[str, int] = {}
    received: dict[str, int] = {}
    refused: dict[str, int] = {}


class CheckpointCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was written into a cluster's directory of checkpoints by this coordinator's process.

    Attributes:
        written: how many checkpoints.
        failed: how many could not be written.
        bytes: of all that were written.
        seconds: spent writing them, from the entry of the log to the manifest.
        version: of the last one; -1 before the first.
        last_bytes: of the last one.
        last_seconds: that the last one took.
        age: seconds since the last one was written, when this was told; -1 before the first.
    """

    written: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    version: int = -1
    last_bytes: int = 0
    last_seconds: float = 0.0
    age: float = -1.0


class WorkerTotals(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank has done over all its incarnations, as they told the coordinator.

    An incarnation tells it four times a second and when it leaves, so of one that is killed the last quarter
    of a second is missing.

    Attributes:
        rank: which worker.
        steps: finished steps by what became of them: "applied", "late" (dropped), "carried" (late, and sent
            again with the next step) and "skipped" (an empty turn, since a gradient was not finite).
        samples: that its `batches` have handed out.
        waiting: seconds spent in exchanges with the servers.
        elapsed: seconds of membership.
        staleness: of its steps, in commits.
        stages: seconds that a turn took, by stage.
        exposed: nanoseconds for which the cluster waited for this rank, by stage (`Frontier`).
        norms: gradient norm of the last commit by model, where the servers measure it.
        incarnations: how many there were.
        dropped: names of metrics that `Worker.log` was told and that are not kept, since there are too many.
    """

    rank: int
    steps: dict[str, int] = {}
    samples: int = 0
    waiting: float = 0.0
    elapsed: float = 0.0
    staleness: Histogram = Histogram()
    stages: dict[str, Histogram] = {}
    exposed: dict[str, Nanoseconds] = {}
    norms: dict[str, float] = {}
    incarnations: int = 1
    dropped: int = 0


class MemberCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a coordinator counted of its members since its process began.

    Attributes:
        joined: by role.
        lost: declared dead, by role.
        failovers: servers whose standby took over.
        failover_seconds: of all of them, each from the moment at which a server was declared dead until every
            server knew who took over.
        rewinds: how often training began anew from a checkpoint.
    """

    joined: dict[str, int] = {}
    lost: dict[str, int] = {}
    failovers: int = 0
    failover_seconds: float = 0.0
    rewinds: int = 0
