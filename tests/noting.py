"""Workers that note in a file what they have done, and the proof that the cluster did that and no more.

Every worker adds 1 to a tensor of its rank's, to one that spans all servers, and to rows of a table; it
notes each step once `step` has returned. What was noted must be there, and nothing else but, for each worker
that died or was struck off, at most the one step that it could not note any more.
"""

import functools
import os
from collections import Counter

import numpy as np

import headwater as hw

EVERYBODY = range(100)


def noting(folder, workers):
    """A function for workers, which train until there is a file `stop`."""
    return functools.partial(_train, folder, workers)


def _train(folder, workers, worker):
    shapes = {"all": (9000,), **{f"rank{rank}": (3,) for rank in range(workers)}}
    model = worker.model("sums", {n: np.zeros(s, np.float32) for n, s in shapes.items()}, hw.Accumulate())
    table = worker.table("rows", 2, hw.Accumulate())
    own = f"rank{worker.rank}"
    ones = {name: np.ones(shapes[name], np.float32) for name in ("all", own)}
    ids = [-1, *EVERYBODY, 1000 + worker.rank]
    rows = np.ones((len(ids), 2), np.float32)
    with open(folder / f"{worker.rank}-{os.getpid()}", "ab", buffering=0) as noted:
        while not (folder / "stop").exists():
            model.push(ones)
            table.push(ids, rows)
            result = worker.step()
            assert result.applied or "quorum" in worker.sync
            if result.applied:
                noted.write(b".")


def stop(folder):
    """Let all workers end by themselves."""
    (folder / "stop").touch()


def noted(folder):
    """Steps noted by rank."""
    counts = Counter()
    for path in folder.glob("*-*"):
        counts[int(path.name.partition("-")[0])] += path.stat().st_size
    return counts


def check(address, parameters, folder, workers, killed):
    """Whether the cluster at `address` has taken the steps that were noted; returns how many by rank.

    `killed`: how many workers with each rank could not note their last step.
    """
    sums = {name: np.unique(values) for name, values in parameters["sums"].items()}
    assert all(len(values) == 1 for values in sums.values()), f"servers differ: {sums}"
    steps = {rank: int(sums[f"rank{rank}"][0]) for rank in range(workers)}
    assert sums["all"][0] == sum(steps.values())
    counts = noted(folder)
    for rank in range(workers):
        assert counts[rank] <= steps[rank] <= counts[rank] + killed[rank], (rank, counts, steps, killed)
    with hw.connect(address) as reader:
        table = reader.table("rows", 2, hw.Accumulate())
        assert (table.pull([-1, *EVERYBODY]) == sum(steps.values())).all()
        own = table.pull([1000 + rank for rank in range(workers)])[:, 0]
        assert own.tolist() == list(steps.values())
    return steps
