"""Checkpoints on demand, and at the end: when training finishes, is told to end, or the disk is full."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
from headwater.checkpoint import direct
from headwater.cli.summary import summarize
from headwater.errors import CheckpointError, ConfigurationError


def count(worker, steps=5):
    model = worker.model("sums", {"a": np.zeros(2000, np.float32)}, hw.Accumulate())
    for _ in range(steps):
        model.push({"a": np.ones(2000)})
        worker.step()
    return "hours of work"


def test_a_disk_that_is_full_at_the_end_costs_the_checkpoint_and_not_the_values(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(direct, "_create", full)
    result = hw.run(count, workers=1, engine="inline", checkpoint=tmp_path, deadline=30)
    assert result.values == ["hours of work"]
    assert result.parameters["sums"]["a"].tolist() == [5.0] * 2000
    assert isinstance(result.checkpoint_error, CheckpointError)
    assert result.checkpoint is None
    assert any("No space left" in line for line in summarize(result))


def test_a_checkpoint_is_written_when_it_is_asked_for(tmp_path):
    with hw.Cluster(workers=1, checkpoint=tmp_path, every="1000s", deadline=30) as cluster:
        with cluster.worker() as worker:
            count(worker, 3)
            first = cluster.checkpoint()
            assert cluster.checkpoint() == first, "nothing has changed"
            count(worker, 2)
            second = cluster.checkpoint()
        assert cluster.last_checkpoint == second
    assert hw.load_checkpoint(first)["sums"]["a"].tolist() == [3.0] * 2000
    assert hw.load_checkpoint(second)["sums"]["a"].tolist() == [5.0] * 2000
    with hw.Cluster(workers=1) as cluster, pytest.raises(ConfigurationError, match="checkpoint=DIR"):
        cluster.checkpoint()


SCRIPT = """
import sys, pathlib
import numpy as np
import headwater as hw

def train(worker):
    model = worker.model("sums", {"a": np.zeros(10, np.float32)}, hw.Accumulate())
    while True:
        model.push({"a": np.ones(10)})
        worker.step()
        pathlib.Path(sys.argv[1], "begun").touch()

hw.run(train, workers=1, engine="inline", checkpoint=sys.argv[1] + "/runs", every="1000s", deadline=60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_run_that_is_told_to_end_writes_a_last_checkpoint(number, code, tmp_path):
    root = str(Path(__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: (tmp_path / "begun").exists())
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == code
    assert "writing a last checkpoint, for at most 60 s" in said
    assert len(set(hw.load_checkpoint(tmp_path / "runs")["sums"]["a"].tolist())) == 1
