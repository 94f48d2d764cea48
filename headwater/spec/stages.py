"""The stages of a worker's turn, and the bounds of what is counted in histograms.

A turn begins where the one before it ended. Its stages, in the order in which they add up:

- data: in `next(batches)`, waiting for splits included;
- compute: everything else that `train` does;
- push: gradients are staged, tested and sent;
- wait: from the moment at which everything is sent until the last server begins to answer, and meetings;
- pull: values are received, and all other exchanges with the servers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

STAGES = ("data", "compute", "push", "wait", "pull")
"""In the order in which they add up."""

STEP_RESULTS = ("applied", "late", "carried", "skipped")
"""What becomes of a step."""

SECONDS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of buckets of times."""

COMMITS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
"""Upper bounds of buckets of staleness."""


def counted(values: Iterable[tuple[float, int]], bounds: Sequence[float]) -> tuple[int, ...]:
    """How many of `values`, each with how often it came, lie in each bucket."""
    counts = [0] * (len(bounds) + 1)
    for value, times in values:
        counts[bisect_left(bounds, value)] += times
    return tuple(counts)
