"""How served nodes end, and what a scheduler that starts them again finds: signals, exit codes, texts."""

import signal

import pytest
from checkpoints import python
from serving import codes, site
from typer.testing import CliRunner
from waiting import wait_until

from headwater.cli.app import app

CHECKPOINTS = ("--checkpoint", "runs", "--every", "20steps")


def begun(cluster, workers=1):
    """Block until training is under way."""
    wait_until(lambda: len(cluster.pids("worker")) == workers)
    cluster.goes_on()


def test_ctrl_c_ends_the_cluster_with_a_last_checkpoint_and_its_nodes_may_be_started_again(tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 1, "--checkpoint", "runs", "--every", "1000s")
        server, spare, worker = cluster.server(), cluster.server(), cluster.worker()
        begun(cluster)
        wait_until(lambda: cluster.statistics().spares == 1)
        coordinator.signal(signal.SIGINT)
        assert codes(coordinator, server, spare, worker) == [130, 75, 75, 75]
        assert "the cluster is closed" in worker.text
        (sum_,) = cluster.summed()
        assert 0 < sum_ <= cluster.counted() + 1


def test_a_terminated_coordinator_with_a_journal_ends_alone_and_is_started_again(tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 1, "--journal", "journal", *CHECKPOINTS)
        server, worker = cluster.server(), cluster.worker()
        begun(cluster)
        coordinator.signal(signal.SIGTERM)
        assert coordinator.code() == 143
        assert "start it again on its journal" in coordinator.text
        coordinator = cluster.coordinator()
        begun(cluster)
        assert cluster.pids("server", "worker") == (server.pid, worker.pid)
        cluster.stop()
        assert codes(coordinator, server, worker) == [0, 0, 0]
        assert cluster.summed() == [float(cluster.counted())]


def test_a_cluster_that_was_killed_whole_goes_on_from_its_last_checkpoint_with_the_same_commands(tmp_path):
    with site(tmp_path) as cluster:
        cluster.coordinator("--workers", 1, "--servers", 2, "--journal", "journal", *CHECKPOINTS)
        nodes = [cluster.server(), cluster.server(), cluster.worker()]
        begun(cluster)
        wait_until(cluster.checkpoints)
        for node in list(cluster.nodes):
            node.kill()
        kept = cluster.summed()[0]
        coordinator = cluster.coordinator()
        nodes = [cluster.server(), cluster.server(), cluster.worker()]
        begun(cluster)
        cluster.stop()
        assert codes(coordinator, *nodes) == [0] * 4
        assert cluster.checkpoints()[-1].startswith("g001")
        assert cluster.summed() == [kept + cluster.counted()]


def test_a_new_cluster_with_resume_begins_where_the_last_one_ended_and_the_first_with_nothing(tmp_path):
    with site(tmp_path) as cluster:
        for generation in range(2):
            coordinator = cluster.coordinator("--workers", 1, "--resume", *CHECKPOINTS)
            nodes = [cluster.server(), cluster.worker()]
            begun(cluster)
            cluster.stop()
            assert codes(coordinator, *nodes) == [0] * 3
            assert cluster.checkpoints()[-1].startswith(f"g00{generation}")
            assert cluster.summed() == [float(cluster.counted())]
            (tmp_path / "stop").unlink()


def test_a_rewind_takes_no_checkpoint_of_another_training_that_used_the_directory_before(tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 1, "--checkpoint", "runs", "--every", "1000s")
        nodes = [cluster.server(), cluster.worker()]
        begun(cluster)
        cluster.stop()
        assert codes(coordinator, *nodes) == [0] * 3
        for left in (tmp_path / "stop", *tmp_path.glob("steps-*")):
            left.unlink()
        coordinator = cluster.coordinator()
        lost, worker = cluster.server(), cluster.worker()
        begun(cluster)
        spare = cluster.server()
        assert spare.says("it waits as a spare")
        lost.kill()
        assert coordinator.says("training begins anew from the start")
        begun(cluster)
        cluster.stop()
        assert codes(coordinator, spare, worker) == [0] * 3
        assert cluster.checkpoints()[-1].startswith("g002")
        assert cluster.summed() == [float(cluster.counted())]


def test_a_server_that_ends_before_all_are_there_leaves_its_place_to_the_next(tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 1, "--servers", 2, *CHECKPOINTS)
        first = cluster.server("--index", 1)
        wait_until(lambda: cluster.pids("server"))
        first.kill()
        wait_until(lambda: not cluster.pids("server"))
        servers = [cluster.server("--index", 1), cluster.server("--index", 0)]
        worker = cluster.worker()
        begun(cluster)
        cluster.stop()
        assert codes(coordinator, worker, *servers) == [0] * 4


def test_without_checkpoints_the_loss_of_a_server_ends_the_cluster_and_every_node_says_which(tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 1, "--servers", 2)
        lost, other, worker = cluster.server(), cluster.server(), cluster.worker()
        begun(cluster)
        index = cluster.pids("server").index(lost.pid)
        lost.signal(signal.SIGTERM)
        assert codes(lost, coordinator, other, worker) == [143, 1, 75, 75]
        for node in (coordinator, other, worker):
            assert f"server {index} (pid {lost.pid}) is gone, and nobody else has its shard" in node.text


def test_a_worker_whose_function_raises_says_so_and_another_may_take_its_place(tmp_path):
    (tmp_path / "fails.py").write_text("def train(worker):\n    raise LookupError('no such file')\n")
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 1, *CHECKPOINTS)
        server, failing = cluster.server(), cluster.worker(script="fails.py")
        assert failing.code() == 1
        assert "worker 0: LookupError: no such file" in failing.text
        assert 'fails.py", line 2, in train' in failing.text
        assert "headwater/served" not in failing.text
        worker = cluster.worker()
        begun(cluster)
        cluster.stop()
        assert codes(coordinator, server, worker) == [0] * 3


def test_every_option_can_be_an_environment_variable(tmp_path):
    with site(tmp_path) as cluster:
        told = {"WORKERS": "1", "SERVERS": "2", "SYNC": "ssp:3", "SET": "a=1 b=two", "CHECKPOINT": "runs"}
        told |= {"BIND": cluster.address, "MIN_WORKERS": "1", "JOURNAL": "journal"}
        coordinator = cluster.start("coordinator", **{f"HEADWATER_{name}": at for name, at in told.items()})
        servers = [cluster.start("server", HEADWATER_INDEX=str(index)) for index in (1, 0)]
        script = "def fit(worker):\n    print(worker.sync, worker.rank, worker.settings)\n"
        (tmp_path / "says.py").write_text(script)
        worker = cluster.start("worker", HEADWATER_SCRIPT="says.py:fit", HEADWATER_RANK="0")
        assert codes(coordinator, worker, *servers) == [0] * 4
        assert "ssp:3 0 {'a': 1, 'b': 'two'}" in worker.text


def test_impossible_places_are_refused_with_the_reason(tmp_path):
    with site(tmp_path) as cluster:
        cluster.coordinator("--workers", 1, "--servers", 2)
        tall, standby = cluster.server("--index", 2), cluster.server("--role", "standby")
        assert codes(tall, standby) == [2, 2]
        assert "there can be no server 2: this cluster has 2, counted from 0" in tall.text
        assert "no standbys: start its coordinator with --replicas 1" in standby.text


WRONG = [
    (["server"], "of which cluster? Pass --coordinator ADDRESS"),
    (["worker", "count.py"], "or set HEADWATER_COORDINATOR"),
    (["worker", "absent.py", "--coordinator", "unix:@x"], "cannot read the script absent.py"),
    (["server", "--coordinator", "unix:@x", "--role", "worker"], "expected server or standby"),
    (["server", "--coordinator", "nowhere"], "nowhere"),
    (["server", "--coordinator", "unix:@x", "--rules", "no.such"], "no.such"),
    (["coordinator"], "--workers"),
    (["coordinator", "--workers", "2", "--min-workers", "3"], "--min-workers must be at most --workers 2"),
    (["coordinator", "--workers", "2", "--sync", "often"], "often"),
    (["coordinator", "--workers", "2", "--resume"], "--resume has no effect without checkpoints"),
    (["coordinator", "--workers", "2", "--journal", "j"], "pass --bind HOST:PORT with a port, or unix:/path"),
    (["coordinator", "--workers", "2", "--journal", "j", "--bind", "127.0.0.1"], "with a port"),
    (["coordinator", "--workers", "2", "--bind", "0.0.0.0"], "--insecure listens all the same"),
]


@pytest.mark.parametrize(("arguments", "text"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_arguments_are_named(arguments, text):
    result = CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert text in " ".join(result.output.replace("│", " ").split())


def test_a_coordinator_that_never_comes_is_waited_for_and_then_named(tmp_path):
    with site(tmp_path) as cluster:
        for node in (cluster.server("--wait", "0.3"), cluster.worker("--wait", "0.3")):
            assert node.code() == 75
            assert f"cannot connect to {cluster.address}" in node.text
            assert "(tried for 0.3 s)" in node.text


def test_one_that_is_told_to_end_while_it_waits_does(tmp_path):
    with site(tmp_path) as cluster:
        nodes = [cluster.server(), cluster.worker()]
        for node in nodes:
            assert node.says("tries again")
            node.signal(signal.SIGTERM)
        assert codes(*nodes) == [143, 143]
        coordinator = cluster.coordinator("--workers", 1)
        wait_until(lambda: coordinator.lines)
        coordinator.signal(signal.SIGTERM)
        assert coordinator.code() == 143


IN_THE_MIDDLE = """
import io, logging, os, signal, sys
from headwater.cli.serving import _end
from headwater.cli.signals import signals_to

class Raw(io.FileIO):
    def write(self, data):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().write(data)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw(2, "wb")), write_through=True)
with signals_to(_end):
    logging.warning("a line")
"""


def test_a_server_ends_though_the_signal_comes_while_it_writes_a_log_line():
    process = python(IN_THE_MIDDLE)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (143, "headwater: ended by signal 15\n")


REWOUND_ONCE = """
from headwater.errors import ConnectionLostError, RewoundError
from headwater.standalone import worker

answers = [RewoundError("everything begins anew"), ConnectionLostError("not there yet"), None]

class Joined:
    rank = 0
    workers = 1
    sync = "sync"
    cluster = "c1"
    def __init__(self, *arguments, **options):
        answer = answers.pop(0)
        if answer is not None:
            raise answer
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def finish(self):
        print("finished")

worker.Worker = Joined
worker.StandaloneWorker(lambda worker: print("trains"), "unix:@nobody").run()
"""


def test_a_worker_whose_join_meets_a_rewind_joins_again():
    process = python(REWOUND_ONCE)
    assert process.communicate(timeout=60)[0] == "trains\nfinished\n"
