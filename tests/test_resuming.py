"""Whole runs that end and go on: resumed, stopped for too long, with too few workers, with late ones."""

import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoints import small_disk
from noting import check, noting, stop
from waiting import wait_until

import headwater as hw
from headwater.checkpoint import list_checkpoints
from headwater.engines.local import LocalEngine
from headwater.errors import CheckpointError, ConfigurationError, RegistrationError
from headwater.runtime import server as node
from headwater.runtime.dialling import dial_member

DATA = np.random.default_rng(0).standard_normal((240, 6)).astype(np.float32)


__all__ = ["small_disk"]


def fit(stop_at, folder, worker):
    """Regress; `stop_at`: the run is killed as a whole at this version, once `folder` has a checkpoint."""
    model = worker.model(
        "net", {"w": np.zeros(6, np.float32), "wide": np.zeros(5000, np.float32)}, hw.Adam(lr=0.1)
    )
    table = worker.table("rows", 2, hw.Adagrad(lr=0.1), initializer=hw.Normal(std=1))
    for batch in worker.batches(DATA, 10, epochs=3, shuffle=True, seed=4):
        if worker.version == stop_at:
            wait_until(lambda: list_checkpoints(folder))
            os.kill(os.getppid(), signal.SIGKILL)
            threading.Event().wait()
        w = model.pull()["w"]
        model.push({"w": batch.T @ (batch @ w - batch.sum(axis=1)), "wide": np.full(5000, batch.sum())})
        ids = (batch[:, 0] * 5).astype(np.int64)
        table.push(ids, table.pull(ids))
        worker.step()
    return table.pull(np.arange(-20, 20)).tobytes()


def bits(result):
    tensors = result.parameters["net"]
    return {name: array.tobytes() for name, array in tensors.items()}, result.values


@pytest.mark.parametrize("servers", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(servers, tmp_path):
    whole = hw.run(functools.partial(fit, -1, ""), workers=2, servers=2, engine="inline")
    code = (
        f"import sys, functools; sys.path.insert(0, {str(Path(__file__).parent)!r}); import headwater as hw;"
        f"import test_resuming as t;"
        f"hw.run(functools.partial(t.fit, 25, {str(tmp_path)!r}), workers=2, servers=2,"
        f"checkpoint={str(tmp_path)!r}, every=10)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = hw.run(
        functools.partial(fit, -1, ""),
        workers=2,
        servers=servers,
        engine="inline",
        checkpoint=tmp_path,
        resume=True,
    )
    assert resumed.version == whole.version == 36
    assert bits(resumed) == bits(whole)
    assert "g001-v000000036" in resumed.checkpoint


# ── directories ─────────────────────────────────────────────────────────────────────────────────


def count(worker):
    model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
    model.push({"a": np.ones(3)})
    worker.step()


def inline(train, **options):
    return hw.run(train, **{"workers": 1, "engine": "inline", "patience": 5, "deadline": 30, **options})


def test_where_there_is_no_checkpoint_yet_training_begins_and_the_same_call_goes_on_later(tmp_path, caplog):
    """One command line for every start, as a scheduler has it."""
    first = inline(count, checkpoint=tmp_path, resume=True)
    assert f"{tmp_path} holds no checkpoint yet: training begins at the start" in caplog.text
    caplog.clear()
    second = inline(count, checkpoint=tmp_path, resume=True)
    assert "holds no checkpoint" not in caplog.text
    assert second.version >= first.version > 0


def test_damaged_checkpoints_are_named_and_none_is_used(tmp_path):
    path = Path(inline(count, checkpoint=tmp_path).checkpoint)
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=file.name):
        inline(count, checkpoint=tmp_path, resume=True)


def test_training_goes_on_over_a_full_disk_and_checkpoints_are_written_again_once_there_is_room(
    small_disk, caplog
):
    """A file system of 512 KB, a model of 64 KB and a checkpoint at every step."""
    ballast = small_disk / "ballast"

    def train(worker):
        model = worker.model("sums", {"a": np.zeros(16_384, np.float32)}, hw.Accumulate())

        def step_until(condition):
            while not condition():
                model.push({"a": np.ones(16_384)})
                worker.step()

        def has_no_room():
            with contextlib.suppress(OSError):  # an older checkpoint may have been removed since
                while file.write(b"x" * 4096):
                    pass
            return "No space left on device" in caplog.text

        step_until(lambda: list_checkpoints(small_disk))
        with open(ballast, "wb", buffering=0) as file:
            step_until(has_no_room)
        refused = worker.version
        ballast.unlink()
        step_until(lambda: any(found.version > refused for found in list_checkpoints(small_disk)))
        return model.pull()["a"][[0, -1]].tolist() == [worker.version] * 2

    result = inline(train, checkpoint=small_disk, every=1, keep=1)
    assert result.values == [True]
    assert "no checkpoint of version" in caplog.text
    assert hw.load_checkpoint(result.checkpoint)["sums"]["a"].tolist() == [result.version] * 16_384


def test_another_model_of_the_same_name_cannot_go_on_from_a_checkpoint(tmp_path):
    inline(count, checkpoint=tmp_path)

    def other(worker):
        with pytest.raises(RegistrationError, match="exists with other tensors"):
            worker.model("sums", {"b": np.zeros(4, np.float32)}, hw.Accumulate())

    inline(other, checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": "often"}, "every"),
        ({"every": 0}, "every"),
        ({"keep": 0}, "keep"),
        ({"resume": True}, "resume=True has no effect without checkpoints: pass checkpoint=DIR"),
        ({"on_server_loss": "rewind"}, "checkpoint=DIR"),
        ({"on_server_loss": "wait"}, "on_server_loss"),
        ({"replicas": 2}, "replicas"),
        ({"min_workers": 2}, "min_workers"),
        ({"restarts": -1}, "restarts"),
        ({"lease": 0}, "lease"),
        ({"every": "10steps"}, "every=10steps has no effect without checkpoints"),
        ({"deadline": math.inf}, "deadline must be > 0 seconds and at most a year"),
        ({"patience": "10"}, "patience must be a number of seconds, got .10"),
        ({"workers": "2"}, "workers must be an integer ≥ 1, got '2'"),
        ({"workers": True}, "workers"),
        ({"rules": "my_rules"}, "rules: got 'my_rules', expected a list of module names"),
        ({"checkpoint": 3}, "checkpoint: got 3, expected a directory or URL"),
        ({"resume": "yes", "checkpoint": "runs"}, "resume must be True or False"),
        ({"sync": 3}, "sync: got 3, expected"),
        ({"transport": "pigeon"}, "transport must be 'unix' or 'tcp', got 'pigeon'"),
        ({"output": "print"}, "output: got 'print', expected a function"),
        ({"watch": 3}, "watch: got 3, expected a function"),
        ({"started": "x"}, "started"),
        ({"token": b"a token of bytes, not of text"}, "token must be a text, got a bytes"),
        ({"tls": "certs"}, "tls must be a headwater.TLS of three files, got a str"),
        ({"settings": {"path": Path()}}, "settings"),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(options, text):
    with pytest.raises(ConfigurationError, match=text):
        inline(count, **options)


# ── workers that stop, are late, or are too few ─────────────────────────────────────────────────


@pytest.fixture
def nobody_is_killed(monkeypatch):
    """As under a scheduler that leaves those alone that were declared dead: they wake up later."""
    monkeypatch.setattr(LocalEngine, "end_process", lambda self, process, why: None)


def test_a_stopped_worker_is_started_again_by_run_and_what_it_does_later_ends_nothing(tmp_path):
    def train(worker):
        model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
        first = worker.rank == 1 and not (tmp_path / "stopped").exists()
        model.push({"a": np.ones(3)})
        worker.step()
        if first:
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return first

    result = hw.run(train, workers=2, sync="async", lease=3.0, deadline=30, output=lambda line: None)
    assert result.values == [False, False]
    assert result.parameters["sums"]["a"].tolist() == [3.0] * 3


STOPS = {"engine": "local", "patience": 1.0, "deadline": 60.0, "lease": 3.0, "output": lambda line: None}


def trains(cluster, folder):
    """Have two workers note their steps; blocks until they are well under way and standbys have caught up."""
    for rank in range(2):
        cluster.start_worker(rank, noting(folder, 2))
    wait_until(
        lambda: cluster.statistics().version > 10 and not cluster.statistics().unreplicated, watch=cluster
    )


def goes_on(cluster, more=10):
    """Block until that many more commits have been made."""
    before = cluster.statistics().version
    wait_until(lambda: cluster.statistics().version > before + more, watch=cluster)


@contextlib.contextmanager
def stopped(pid):
    """It stands still while the body runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.usefixtures("nobody_is_killed")
def test_a_worker_that_was_stopped_is_named_then_retired_and_refused_when_it_wakes_up(tmp_path):
    def node(rank):
        nodes = [n for n in cluster.statistics().nodes if n.role == "worker" and n.rank == rank]
        return nodes[0] if nodes else None

    with hw.Cluster(workers=2, servers=2, **STOPS) as cluster:
        trains(cluster, tmp_path)
        with stopped(node(1).pid):
            wait_until(lambda: "worker 1" in (node(0).waits_for or ""), watch=cluster)
            wait_until(lambda: node(1) is None, watch=cluster)
            goes_on(cluster)
        outcome = cluster.next_outcome(30)
        assert outcome.index == 1
        assert "declared dead" in outcome.failure.summary or "retired" in outcome.failure.summary
        stop(tmp_path)
        assert cluster.next_outcome(30).failure is None
        _, parameters = cluster.parameters()
        check(cluster.address, parameters, tmp_path, 2, {0: 0, 1: 1})


@pytest.mark.usefixtures("nobody_is_killed")
def test_a_server_that_was_stopped_loses_its_place_and_changes_nothing_when_it_wakes_up(tmp_path):
    with hw.Cluster(workers=2, servers=2, replicas=1, **STOPS) as cluster:
        trains(cluster, tmp_path)

        def server():
            return next(n for n in cluster.statistics().nodes if n.role == "server" and n.index == 1)

        pid = server().pid
        with stopped(pid):
            wait_until(lambda: server().pid != pid, watch=cluster)
            goes_on(cluster)
        goes_on(cluster)
        stop(tmp_path)
        assert [cluster.next_outcome(30).failure for _ in range(2)] == [None, None]
        _, parameters = cluster.parameters()
        check(cluster.address, parameters, tmp_path, 2, {0: 0, 1: 0})


def step_and_compare(folder, worker):
    """Every element is what all rounds of two workers add up to, after every step."""
    model = worker.model("sums", {"a": np.zeros(4 << 20, np.float32)}, hw.Accumulate())
    pushed = np.ones(4 << 20, np.float32)
    while not worker.sum(told=float((folder / "stop").exists()))["told"]:
        model.push({"a": pushed})
        worker.step()
        values = model.pull()["a"]
        assert values.min() == values.max() == 2 * worker.version


def stop_in_the_middle_of_a_pass(pid):
    """SIGSTOP at a moment when a thread computes: none of the others is outside of a system call."""

    def computing():
        calls = (Path(f"/proc/{pid}/task/{thread}/syscall") for thread in os.listdir(f"/proc/{pid}/task"))
        return any(call.read_text().startswith("-1") for call in calls)

    def caught():
        os.kill(pid, signal.SIGSTOP)
        if computing():
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    wait_until(caught)


@pytest.mark.usefixtures("nobody_is_killed")
def test_a_server_stopped_in_the_middle_of_a_pass_writes_to_no_window_that_is_used_when_it_wakes_up(tmp_path):
    if not os.access("/proc/self/syscall", os.R_OK):
        pytest.skip("this system does not tell what a thread is doing")
    with hw.Cluster(workers=2, servers=1, replicas=1, **STOPS) as cluster:
        for rank in range(2):
            cluster.start_worker(rank, functools.partial(step_and_compare, tmp_path))

        def server():
            return next(n for n in cluster.statistics().nodes if n.role == "server")

        wait_until(
            lambda: cluster.statistics().version > 10 and not cluster.statistics().unreplicated, watch=cluster
        )
        pid = server().pid
        stop_in_the_middle_of_a_pass(pid)
        with stopped(pid):
            wait_until(lambda: server().pid != pid, watch=cluster)
            goes_on(cluster, 5)
        goes_on(cluster, 20)
        stop(tmp_path)
        outcomes = [cluster.next_outcome(30) for _ in range(2)]
        assert [outcome.failure for outcome in outcomes] == [None, None]


def test_a_standby_follows_one_connection_however_many_rosters_come_while_it_is_dialled(monkeypatch):
    """A second one would be followed beside the first, and what is promoted be either."""
    joined, dialled = threading.Event(), []

    def slow_dial(member, **options):
        if member.role == "standby":
            dialled.append(member.id)
            joined.wait(20)
        return dial_member(member, **options)

    monkeypatch.setattr(node, "dial_member", slow_dial)
    with hw.Cluster(workers=2, servers=1, replicas=1, deadline=30) as cluster:
        workers = [cluster.worker() for _ in range(2)]  # each is a roster of its own
        joined.set()
        wait_until(lambda: not cluster.statistics().unreplicated)
        assert len(dialled) == 1
        for worker in workers:
            worker.leave()


def test_a_late_update_is_answered_with_current_values_and_applied_nowhere():
    together = threading.Barrier(2)

    def work(worker):
        model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
        if worker.rank == 0:
            together.wait(20)
        model.push({"a": np.full(3, worker.rank + 1)})
        first = worker.step()
        seen = model.pull(copy=True)["a"].tolist()
        if worker.rank == 1:
            together.wait(20)
            return first.applied, first.version, seen
        model.push({"a": np.full(3, 10)})
        second = worker.step()
        return first.applied, first.version, seen, second.applied, second.version, model.pull()["a"].tolist()

    result = hw.run(
        work, workers=2, servers=2, engine="inline", sync="sync:quorum=1", patience=5, deadline=30
    )
    assert result.values[1] == (True, 1, [2.0] * 3)
    assert result.values[0] == (False, 1, [2.0] * 3, True, 2, [12.0] * 3)
    assert (result.parameters["sums"]["a"] == 12).all()
    assert result.version == 2


def test_with_too_few_workers_nothing_is_committed_and_every_wait_says_so():
    with hw.Cluster(workers=2, min_workers=2, patience=0.2, deadline=20) as cluster:
        first, second = cluster.worker(), cluster.worker()
        second._session.interrupt()  # it dies
        wait_until(lambda: len([n for n in cluster.statistics().nodes if n.role == "worker"]) == 1)
        steps = []
        stepping = threading.Thread(target=lambda: steps.append(first.step()))
        stepping.start()
        wait_until(lambda: any("min_workers is 2" in (n.waits_for or "") for n in cluster.statistics().nodes))
        assert not steps
        third = cluster.worker()
        leaving = threading.Thread(target=lambda: (third.step(), third.leave()))
        leaving.start()
        stepping.join(20)
        leaving.join(20)
        assert steps[0].version == 1
        first.leave()
        second._session.close()
        second._close()
