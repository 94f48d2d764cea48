"""When the next checkpoint is taken, which one was taken already, and which one a new generation begins with.

Invariants:
- A checkpoint is named by its generation and version; each is written once, and later ones are larger.
- A cluster begins anew only from what is its own: a checkpoint of its generations, or the one that it
  resumed from.
"""

from __future__ import annotations


class CheckpointPlan:
    """Of one cluster. `versions`: how many commits lie between two; 0 where time decides.

    Attributes:
        written: generation and version of the newest one; (−1, −1) before the first.
    """

    def __init__(self, versions: int) -> None:
        self.written = (-1, -1)
        self._versions = versions

    def next(self, version: int) -> int:
        """At which version the next one is taken, after `version`; 0: at once, whatever version that is."""
        return (version // self._versions + 1) * self._versions if self._versions else 0

    def wants(self, generation: int, version: int) -> bool:
        """Whether one of this version is to be written: neither it nor a newer one was."""
        return (generation, version) > self.written

    def wrote(self, generation: int, version: int) -> None:
        """It is complete."""
        self.written = generation, version


def own_since(*, resumes: bool, first: int) -> int:
    """Generation from which on checkpoints are a cluster's own, whose own first generation was `first`."""
    return 0 if resumes else first
