"""Whether a cluster is well, in a sentence: for `headwater status`, `headwater ping` and whoever looks at
them."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.messages import ClusterStatistics


@dataclass(frozen=True, slots=True)
class Health:
    """What is wrong with a cluster, in parts of sentences.

    Attributes:
        servers: that are not there: nothing goes on without them.
        copies: standbys that are missing, and servers that are not heard of: it goes on, but may not survive.
        workers: declared ones that are neither there nor have finished.
        begun: whether anything was committed yet.
    """

    servers: tuple[str, ...]
    copies: tuple[str, ...]
    workers: tuple[str, ...]
    begun: bool

    @staticmethod
    def of(statistics: ClusterStatistics) -> Health:
        """Of a cluster that answered."""
        there = {node.index for node in statistics.nodes if node.role == "server"}
        absent = [index for index in range(statistics.servers) if index not in there]
        known = {node.rank for node in statistics.nodes if node.role == "worker"} | {*statistics.finished}
        gone = [rank for rank in range(statistics.workers) if rank not in known]
        alone = list(statistics.unreplicated) if not absent else []
        copies = [f"{_are('server', alone)} without a caught-up standby"] if alone else []
        copies += [
            f"{node.role} {node.index} {node.waits_for}"
            for node in statistics.nodes
            if node.role in ("server", "standby") and node.waits_for
        ]
        return Health(
            (f"{_are('server', absent)} not there",) if absent else (),
            tuple(copies),
            (f"{_are('worker', gone)} not there",) if gone else (),
            statistics.version > 0,
        )

    @property
    def is_ready(self) -> bool:
        """Whether workers can train: every server is there, with its standby where it should have one."""
        return not self.servers and not self.copies

    def readiness(self) -> str:
        """Why it is ready or not."""
        return "ready" if self.is_ready else f"not ready: {'; '.join((*self.servers, *self.copies))}"

    def summary(self) -> str:
        """The first line of `headwater status`."""
        wrong = "; ".join((*self.servers, *self.copies, *self.workers))
        if not wrong:
            return "healthy"
        starting = not self.begun and not self.copies
        return f"{'starting' if starting else 'degraded'}: {wrong}"


def _are(noun: str, indices: list[int]) -> str:
    verb = "is" if len(indices) == 1 else "are"
    return f"{noun}{'s' * (len(indices) > 1)} {', '.join(map(str, indices))} {verb}"
