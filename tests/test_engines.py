"""One contract for every engine, and what only processes can show."""

import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
from waiting import wait_until

import headwater as hw
from headwater.engines import ENGINES
from headwater.engines.engine import Failure, Trained
from headwater.engines.packing import pack_outcome, unpack_outcome

ONES = {"v": np.ones(3, np.float32)}
RAY = pytest.param("ray", marks=pytest.mark.long)
EVERY = [RAY if name == "ray" else name for name in ENGINES]


@pytest.fixture(scope="module", params=EVERY)
def engine(request):
    """Every engine, with shares of Ray's resources that fit on a small machine."""
    return request.getfixturevalue("ray_engine") if request.param == "ray" else request.param


@pytest.fixture(scope="module", params=[one for one in EVERY if one != "inline"])
def processes(request):
    """Every engine whose nodes are processes."""
    return request.getfixturevalue("ray_engine") if request.param == "ray" else request.param


def add_rank(worker):
    """By reference: this module can be imported."""
    model = worker.model("v", ONES, hw.Accumulate())
    model.push({"v": np.full(3, worker.rank + 1)})
    worker.step()
    return worker.rank, worker.settings, model.pull()["v"].tolist()


# ── every engine ────────────────────────────────────────────────────────────────────────────────


def test_values_come_back_by_rank_and_parameters_as_of_the_last_version(engine):
    result = hw.run(add_rank, workers=2, servers=2, engine=engine, settings={"epochs": 3})
    assert result.values == [(rank, {"epochs": 3}, [4.0] * 3) for rank in range(2)]
    assert result.parameters["v"]["v"].tolist() == [4.0] * 3
    assert result.version == 1
    assert [progress.steps for progress in result.statistics.progress] == [1, 1]


def test_an_exception_in_train_reaches_the_caller_with_rank_and_traceback(engine):
    def train(worker):
        worker.model("v", ONES, hw.Accumulate())
        if worker.rank == 1:
            raise KeyError("no such column")
        worker.step()

    with pytest.raises(hw.errors.WorkerError, match="worker 1: KeyError: 'no such column'") as caught:
        hw.run(train, workers=2, engine=engine)
    assert caught.value.rank == 1
    assert 'raise KeyError("no such column")' in caught.value.remote_traceback
    assert isinstance(caught.value.__cause__, KeyError)


def test_waits_that_wait_for_each_other_are_an_error_at_once(engine):
    def train(worker):
        if worker.rank == 0:
            worker.barrier()
        else:
            worker.sum(x=1)

    with pytest.raises(
        hw.errors.WorkerError, match=r"StalledError.*worker 0 waits in barrier.*worker 1 waits in sum"
    ):
        hw.run(train, workers=2, engine=engine)


def test_a_wait_past_the_deadline_names_whom_it_waits_for(engine):
    def train(worker):
        model = worker.model("v", ONES, hw.Accumulate())
        if worker.rank == 0:
            worker.step()
        while True:
            model.pull()

    with pytest.raises(
        hw.errors.WorkerError, match=r"step 1 had no answer for 2 s: step 1 waits for worker 1"
    ):
        hw.run(train, workers=2, engine=engine, patience=0.2, deadline=2)


def test_users_rules_are_loaded_from_the_named_module_only(engine, tmp_path, monkeypatch):
    (tmp_path / "doubling_rule.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            import headwater as hw

            def doubling(value, gradient):
                return value + 2 * gradient

            @hw.register
            @dataclass(frozen=True, slots=True)
            class Doubling(hw.Rule):
                def states(self):
                    return {}

                def function(self):
                    return doubling

                def scalars(self, updates, count):
                    return ()
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)

    def train(worker):
        import doubling_rule

        model = worker.model("v", ONES, doubling_rule.Doubling())
        model.push(ONES)
        worker.step()
        return model.pull()["v"].tolist()

    assert hw.run(train, workers=1, engine=engine, rules=["doubling_rule"]).values == [[3.0] * 3]
    with pytest.raises(hw.errors.ConfigurationError, match="no_such_module"):
        hw.Cluster(workers=1, engine=engine, rules=["no_such_module"])


def test_a_closed_cluster_refuses_calls(engine):
    cluster = hw.Cluster(workers=1, engine=engine)
    worker = cluster.worker()
    cluster.close()
    cluster.close()
    with pytest.raises(hw.errors.ClosedError, match="closed"):
        cluster.worker()
    with pytest.raises(hw.errors.ConnectionLostError):
        worker.barrier()
    with pytest.raises(hw.errors.ClosedError):
        worker.step()
    worker.leave()


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_is_killed_ends_the_run_with_its_signal():
    def train(worker):
        if worker.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        worker.barrier()
        worker.barrier()
        return worker.rank

    with pytest.raises(hw.errors.WorkerError, match="worker 1: its process ended with signal SIGKILL"):
        hw.run(train, workers=2)


def test_a_process_that_was_killed_has_died_of_its_signal_though_its_connections_ended_first():
    with hw.Cluster(workers=1, engine="local") as cluster:
        cluster.start_worker(0, lambda worker: signal.pause())
        workers = wait_until(lambda: [one for one in cluster.statistics().nodes if one.role == "worker"])
        pid = workers[0].pid
        os.kill(pid, signal.SIGKILL)
        cluster._engine.end_process((pid, socket.gethostname()), "it was declared dead")
        assert cluster.next_outcome(30).failure.summary == "its process ended with signal SIGKILL"


@pytest.mark.fresh
def test_a_server_that_is_killed_ends_the_run_with_its_index():
    with hw.Cluster(workers=1, servers=2, engine="local") as cluster:
        worker = cluster.worker()
        worker.model("v", ONES, hw.Accumulate())
        nodes = cluster.statistics().nodes
        victim = next(node for node in nodes if node.role == "server" and node.index == 1)
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(hw.errors.EngineError, match="server 1: its process ended with signal SIGKILL"):
            cluster.next_outcome(30)
        with pytest.raises(hw.errors.ConnectionLostError):
            worker.step()
        worker.leave()


def leave_much_behind(worker):
    import logging
    import multiprocessing

    print("█" * 3)
    logging.getLogger("mine").info("told")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    forked = os.fork()
    if not forked:
        signal.pause()
    for comes_back_with in (99, ValueError("of a child")):
        returned = os.fork()
        if not returned:
            if isinstance(comes_back_with, ValueError):
                raise comes_back_with
            return comes_back_with  # a child that comes back from `train` is not this worker
        os.waitpid(returned, 0)
    return child.pid, forked, multiprocessing.parent_process() is None


def test_processes_that_train_leaves_behind_keep_nobody_waiting(monkeypatch):
    """They hold the pipes of the worker: its standard output, and the one its result comes through."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setattr(sys, "path", [*sys.path, Path("a_path_as_an_object")])
    lines = []
    ((*left, _),) = hw.run(leave_much_behind, workers=1, output=lines.append).values
    try:
        assert all(psutil.pid_exists(pid) for pid in left)
        assert lines[0] == "[worker 0] ███"
        assert lines[-1] == "[worker 0] ValueError: of a child"
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)


def test_a_worker_logs_as_its_parent_does_unless_it_is_told_otherwise(monkeypatch):
    def train(worker):
        import logging

        log = logging.getLogger("mine")
        log.info("as the parent")
        logging.basicConfig(level=logging.DEBUG)
        log.debug("as train says")

    root, lines = logging.getLogger(), []
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s <%(name)s> %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(root, "level", logging.INFO)
    hw.run(train, workers=1, output=lines.append)
    assert "[worker 0] INFO <mine> as the parent" in lines
    assert "[worker 0] DEBUG:mine:as train says" in lines


class OnlyThere:
    """Its module is gone where it is read."""


class Broken(Exception):
    """As well."""


def packed_by_a_process_with_a_module_of_its_own(monkeypatch, value, failure):
    with monkeypatch.context() as there:
        gone = types.ModuleType("only_in_the_worker")
        gone.OnlyThere, gone.Broken = OnlyThere, Broken
        there.setitem(sys.modules, "only_in_the_worker", gone)
        there.setattr(OnlyThere, "__module__", "only_in_the_worker")
        there.setattr(Broken, "__module__", "only_in_the_worker")
        return pack_outcome(value, failure)


def test_a_value_that_the_parent_cannot_read_is_an_error_that_names_it(monkeypatch):
    packed = packed_by_a_process_with_a_module_of_its_own(monkeypatch, Trained(OnlyThere(), 0), None)
    value, failure = unpack_outcome(packed)
    assert value is None
    assert "a only_in_the_worker.OnlyThere, cannot be read" in failure.summary
    assert "ModuleNotFoundError" in failure.summary


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def test_an_exception_that_cannot_say_its_text_arrives_with_its_type():
    try:
        raise Silent
    except Silent as error:
        _, failure = unpack_outcome(pack_outcome(None, Failure.of(error)))
    assert failure.summary == "Silent: its text cannot be told (RuntimeError)"
    assert "raise Silent" in failure.trace


def test_an_exception_that_the_parent_cannot_read_arrives_as_its_text(monkeypatch):
    failure = Failure("Broken: no such file", "Traceback: here", Broken("no such file"))
    value, failure = unpack_outcome(packed_by_a_process_with_a_module_of_its_own(monkeypatch, None, failure))
    assert (value, failure) == (None, Failure("Broken: no such file", "Traceback: here", None))


def test_a_worker_that_was_declared_dead_has_died_whatever_its_program_says_of_it():
    assert Failure.of(hw.errors.DeclaredDeadError("nothing was heard of it")).died
    assert not Failure.of(hw.errors.RefusedError("its rank is taken")).died


def test_functions_that_no_interpreter_could_import_run_too(processes):
    module = types.ModuleType("not_on_any_path")
    exec("factor = 3\ndef train(worker):\n    return worker.rank * factor", module.__dict__)
    module.train.__module__ = module.__name__
    sys.modules[module.__name__] = module
    try:
        assert hw.run(module.train, workers=2, engine=processes).values == [0, 3]
    finally:
        del sys.modules[module.__name__]


def test_functions_of_a_file_that_was_loaded_under_a_name_of_its_own_run_too(processes, tmp_path):
    (tmp_path / "train.py").write_text("factor = 5\ndef train(worker):\n    return worker.rank * factor")
    spec = importlib.util.spec_from_file_location("loaded_by_hand", tmp_path / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        assert hw.run(module.train, workers=2, engine=processes).values == [0, 5]
    finally:
        del sys.modules[spec.name]


def test_what_cannot_be_pickled_is_named(processes):
    lock = threading.Lock()
    with pytest.raises(hw.errors.EngineError, match="train cannot be sent to a worker process"):
        hw.run(lambda worker: lock.locked(), workers=1, engine=processes)
    with pytest.raises(hw.errors.WorkerError, match="the value that train returned cannot be pickled"):
        hw.run(lambda worker: (i for i in range(3)), workers=1, engine=processes)


def test_output_of_every_process_is_prefixed_with_its_name(processes):
    lines = []
    hw.run(lambda worker: print("hello from", worker.rank), workers=2, output=lines.append, engine=processes)
    assert sorted(lines) == ["[worker 0] hello from 0", "[worker 1] hello from 1"]


SCRIPT = """
import os
import signal
import sys
import headwater as hw

FACTOR = 2

def train(worker):
    if worker.settings["wait"]:
        print("here", flush=True)
        if worker.rank == 0:
            worker.barrier()
        while True:
            pass
    return worker.rank * FACTOR

def show(line):
    # A process of the parent's own, that has all that the parent has open and outlives it.
    forked = os.fork()
    if not forked:
        signal.pause()
    print(forked, flush=True)

print(hw.run(train, workers=2, servers=2, settings={"wait": "--wait" in sys.argv}, output=show).values)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_needs_no_guard(script):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0, 2]\n", done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_children_end_with_their_parent_however_it_ends(script, how):
    """One of them is stopped, and others that the parent has forked hold all its pipes open."""
    with subprocess.Popen(
        [sys.executable, script, "--wait"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        forked = [int(parent.stdout.readline()) for _ in range(2)]
        try:
            family = psutil.Process(parent.pid).children(recursive=True)
            children = [child for child in family if child.pid not in forked]
            assert len(children) == 4
            children[-1].suspend()
            parent.send_signal(how)
            parent.wait(timeout=30)
            _, alive = psutil.wait_procs(children, timeout=30)
            assert not alive
        finally:
            for pid in forked:
                os.kill(pid, signal.SIGKILL)
