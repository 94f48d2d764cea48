"""Checkpoints on demand, and at the end: when training finishes, is told to end, or the disk is full."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from waiting import wait_until

import headwater as hw
from headwater import driver
from headwater.checkpoint import direct
from headwater.cli.app import app
from headwater.cli.summary import summarize
from headwater.errors import CheckpointError, ClusterEndedError, ConfigurationError, HeadwaterError
from headwater.spec.cluster import ClusterConfig
from headwater.standalone import StandaloneCluster, StandaloneServer
from headwater.standalone import cluster as cluster_module


def count(worker, steps=5):
    model = worker.model("sums", {"a": np.zeros(2000, np.float32)}, hw.Accumulate())
    for _ in range(steps):
        model.push({"a": np.ones(2000)})
        worker.step()
    return "hours of work"


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_the_end_costs_the_checkpoint_and_not_the_values(tmp_path, monkeypatch):
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


def test_a_worker_and_the_command_line_have_one_written_and_hear_where_it_is(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["checkpoint", "now", *arguments], env={"COLUMNS": "200"})

    with hw.Cluster(workers=1, checkpoint=tmp_path, every="1000s", deadline=30) as cluster:
        with cluster.worker() as worker:
            count(worker, 3)
            path = worker.checkpoint()
            assert hw.load_checkpoint(path)["sums"]["a"].tolist() == [3.0] * 2000
            assert run(cluster.address).output == f"{path}\n", "nothing has changed"
            count(worker, 1)
            told = run(cluster.address)
        assert told.exit_code == 0
        assert hw.load_checkpoint(told.output.strip())["sums"]["a"].tolist() == [4.0] * 2000
    assert run(cluster.address).exit_code == 1
    with hw.Cluster(workers=1) as cluster, cluster.worker() as worker:
        with pytest.raises(ConfigurationError, match="checkpoint=DIR"):
            worker.checkpoint()
        told = run(cluster.address)
        assert told.exit_code == 2
        assert "a checkpoint needs a directory" in told.output


@contextlib.contextmanager
def served(tmp_path, **options):
    """A cluster as `headwater serve` has it, with its server in a thread; its worker is the caller's."""
    config = ClusterConfig(workers=1, checkpoint=str(tmp_path / "runs"), every="1000s", **options)
    cluster = StandaloneCluster(config)

    def serve():
        with contextlib.suppress(HeadwaterError):
            StandaloneServer(cluster.address).run()

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield cluster
    finally:
        cluster.close()
        server.join(30)


def test_a_served_cluster_that_is_told_to_end_on_a_full_disk_says_so_and_ends(tmp_path, monkeypatch, caplog):
    with served(tmp_path, deadline=30) as cluster:
        worker = hw.connect(cluster.address)
        count(worker, 2)
        monkeypatch.setattr(direct, "_create", full)
        cluster.interrupt(signal.SIGTERM)
        assert cluster.run() == signal.SIGTERM
        with pytest.raises(ClusterEndedError, match="the cluster is closed"):
            worker.leave()
    assert any("no last checkpoint" in line and "No space left" in line for line in caplog.messages)


@pytest.mark.parametrize("room", [True, False])
def test_what_a_served_cluster_trained_is_kept_until_the_disk_has_room_or_the_deadline_is_over(
    room, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(cluster_module, "_AGAIN_S", 0.05)
    create, refused = direct._create, threading.Event()

    def full_at_first(path):
        if room and refused.is_set():
            return create(path)
        refused.set()
        return full(path)

    monkeypatch.setattr(direct, "_create", full_at_first)
    with served(tmp_path, deadline=30) as cluster:
        monkeypatch.setattr(cluster, "_deadline", 30 if room else 0.2)

        def work():
            with contextlib.suppress(HeadwaterError):
                worker = hw.connect(cluster.address)
                count(worker, 3)
                worker.finish()

        working = threading.Thread(target=work)
        working.start()
        if room:
            assert cluster.run() == 0
        else:
            with pytest.raises(CheckpointError, match="No space left"):
                cluster.run()
        working.join(30)
    assert any("the servers keep what was trained so long: make room" in line for line in caplog.messages)
    if room:
        assert hw.load_checkpoint(tmp_path / "runs")["sums"]["a"].tolist() == [3.0] * 2000


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


HANGS = """
import signal, sys, threading
import headwater as hw
from headwater.runtime.checkpointer import Checkpointer

def for_ever(self):
    print("writing", flush=True)
    threading.Event().wait()

Checkpointer.take_last = for_ever

def train(worker):
    print("begun", flush=True)
    threading.Event().wait()

hw.run(train, workers=1, engine=sys.argv[1], checkpoint=sys.argv[2], every="1000s", deadline=60, output=print)
"""


@pytest.mark.parametrize(
    ("number", "engine"),
    [
        (signal.SIGINT, "inline"),
        pytest.param(signal.SIGTERM, "inline", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "local", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "local", marks=pytest.mark.long),
    ],
)
def test_a_second_signal_ends_a_run_at_once_though_its_last_checkpoint_hangs(number, engine, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HANGS, engine, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        wait_for_line(child, "begun")
        child.send_signal(number)
        wait_for_line(child, "writing")
        child.send_signal(number)
        child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -number


def wait_for_line(child, word):
    assert any(word in line for line in child.stdout)


def test_a_ctrl_c_that_comes_in_a_callback_of_the_interpreter_is_noted(monkeypatch):
    """What such a callback raises is told to nobody, a KeyboardInterrupt too."""
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: lost.append(told.exc_type))
    with driver._interrupts() as interrupted:
        thing = threading.Event()
        _reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
    assert lost == [KeyboardInterrupt]
    assert interrupted.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
