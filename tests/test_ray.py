"""Nodes as actors of Ray: where they are put, what is lost with Ray's nodes, and what a person does wrong.

That the engine keeps the contract of all engines is shown by `test_engines.py`.
"""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from connections import TOKEN, tls
from hypothesis import given
from hypothesis import strategies as st
from rays import REASON, actors, share

import headwater as hw
from headwater.engines.seating import BundleSlots, seats_of_shards
from headwater.errors import ConfigurationError, EngineError, WorkerError

ONES = {"v": np.ones(3, np.float32)}


def places_reserved():
    from ray.util.placement_group import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


# ── seats ───────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=12).filter(lambda places: len(places) % 2 == 0))
def test_a_standby_is_apart_from_its_server_unless_one_machine_has_most_places(machines):
    shards = len(machines) // 2
    seats = seats_of_shards(machines, shards)
    assert sorted(place for pair in seats for place in pair) == list(range(len(machines)))
    if max(machines.count(machine) for machine in machines) <= shards:
        assert all(machines[server] != machines[standby] for server, standby in seats)


def test_servers_lie_on_as_many_machines_as_their_standbys():
    seats = seats_of_shards(["a", "b", "a", "b"], 2)
    assert [(["a", "b", "a", "b"][server]) for server, _ in seats] == ["a", "b"]
    assert seats_of_shards(["a", "a", "b"], 3) == [(0,), (1,), (2,)]


def test_a_node_waits_until_a_place_of_its_own_is_free_or_it_is_cancelled():
    seats, cancelled, taken = BundleSlots([(0, 1), (2,)]), threading.Event(), []
    assert [seats.take(0), seats.take(0), seats.take(0), seats.take(1)] == [0, 1, None, 2]
    waiting = threading.Thread(target=lambda: taken.append(seats.wait(0, cancelled)))
    waiting.start()
    seats.release(2)
    seats.release(1)
    waiting.join(30)
    assert taken == [1]
    cancelled.set()
    assert seats.wait(0, cancelled) is None


# ── wrong calls ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"address": "ray://10.0.0.1:10001"}, "a Ray Client.*ray job submit"),
        ({"address": "somewhere"}, "address: got 'somewhere', expected host:port"),
        ({"address": "host:0"}, "expected host:port"),
        ({"strategy": "TIGHT"}, "strategy must be 'PACK' or 'SPREAD', got 'TIGHT'"),
        ({"worker_resources": {"num_cpus": 0}}, "worker_resources: got .* reserves nothing"),
        ({"server_resources": {}}, "server_resources: got .* reserves nothing"),
        ({"server_resources": {"num_cpus": "2"}}, "num_cpus must be a finite number ≥ 0, got '2'"),
        ({"server_resources": {"CPU": 2}}, "server_resources: got 'CPU', expected 'num_cpus'"),
        ({"timeout": 0}, "timeout must be > 0 seconds"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options, text):
    with pytest.raises(ConfigurationError, match=text):
        hw.RayEngine(**options)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[ray\]'"):
        hw.Cluster(workers=1, engine="ray")


def test_more_than_the_cluster_has_is_an_error_in_time_and_leaves_nothing_reserved(ray_nodes):
    unknown = share(worker_resources={"num_cpus": 1, "telescopes": 2}, timeout=1)
    with pytest.raises(EngineError, match=r"no places for 2 × .*telescopes.* within 1 s: the Ray"):
        hw.run(lambda worker: None, workers=2, engine=unknown)
    assert not places_reserved()


def test_another_address_than_the_one_in_use_is_refused(ray_nodes):
    with pytest.raises(ConfigurationError, match=f"uses Ray at {ray_nodes.address} already"):
        hw.Cluster(workers=1, engine=share(address="10.0.0.1:6379"))


@pytest.mark.parametrize("where", [{"working_dir": "/tmp"}, {"py_modules": ["/tmp"]}])
def test_local_modules_are_for_the_call_that_connects_to_ray(ray_nodes, where):
    with pytest.raises(ConfigurationError, match="is local, and this process uses Ray already"):
        hw.Cluster(workers=1, engine=share(runtime_env=where))
    with pytest.raises(ConfigurationError, match="runtime_env"):
        hw.Cluster(workers=1, engine=share(runtime_env={"working_dir": 3}))


def test_nodes_on_hosts_that_a_unix_socket_does_not_reach_are_refused(ray_nodes, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(ConfigurationError, match=r"cannot reach this cluster.*on elsewhere.*bind='0.0.0.0'"):
        hw.Cluster(workers=1, engine=share())
    assert not places_reserved()


def test_servers_on_other_hosts_cannot_listen_at_an_address_of_this_one(ray_nodes, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(ConfigurationError, match=r"bind='127.0.0.1' is an address of elsewhere.*'0.0.0.0'"):
        hw.Cluster(workers=1, engine=share(), bind="127.0.0.1", token=TOKEN)
    assert not places_reserved()


@pytest.mark.long
def test_actors_join_over_tcp_with_the_proofs_of_the_cluster(ray_nodes):
    def train(worker):
        model = worker.model("sums", {"a": np.zeros(5000, np.float32)}, hw.Accumulate())
        model.push({"a": np.ones(5000, np.float32)})
        worker.step()
        return next(iter(worker._session._member._channels.values())).peer, float(model.pull()["a"].sum())

    options = {"bind": "127.0.0.1", "token": TOKEN, "tls": tls()}
    result = hw.run(train, workers=2, servers=2, engine=share(), **options)
    assert [total for _, total in result.values] == [10000.0] * 2
    assert all(peer.startswith("tcp:127.0.0.1:") for peer, _ in result.values)


# ── in a Ray job ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_a_running_ray_is_used_and_left_as_it_was(ray_nodes):
    import ray

    assert hw.run(lambda worker: worker.rank, workers=2, servers=2, engine=share()).values == [0, 1]
    assert ray.is_initialized()
    assert not places_reserved()


@pytest.mark.long
def test_a_task_of_a_ray_job_can_train(ray_nodes):
    import ray

    @ray.remote(num_cpus=0)
    def job(engine):
        return hw.run(lambda worker: worker.rank, workers=2, engine=engine).values

    assert ray.get(job.remote(share()), timeout=100) == [0, 1]


@pytest.mark.long
def test_workers_have_as_many_threads_as_reserved_cores_unless_the_environment_says_otherwise(
    ray_nodes, monkeypatch
):
    def threads(worker):
        return os.environ["OMP_NUM_THREADS"]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    wide = share(worker_resources={"num_cpus": 1.9})
    assert hw.run(threads, workers=1, engine=wide).values == ["1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert hw.run(threads, workers=1, engine=wide).values == ["7"]


@pytest.mark.long
def test_a_worker_that_dies_too_often_ends_the_run_with_what_ray_says(ray_nodes, caplog):
    def train(worker):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerError, match="worker 0: its actor ended: ActorDiedError"):
        hw.run(train, workers=1, engine=share(), restarts=1)
    assert caplog.text.count("it is started again") == 1


# ── scripts ─────────────────────────────────────────────────────────────────────────────────────

SCRIPT = """
import stars

def train(worker):
    print("stars from", stars.__file__)
    while worker.settings.get("wait"):
        pass
    return stars.COUNT
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "stars.py").write_text("COUNT = 7\n")
    return tmp_path / "script.py"


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
    )


def command(script, *more):
    share_of = [option for kind in ("server", "worker") for option in (f"--{kind}-resource", "num_cpus=0.01")]
    options = ["--engine", "ray", "--working-dir", script.parent, *share_of]
    return ["headwater", "run", script, "--workers", "1", *options, *more]


@pytest.mark.long
def test_the_command_brings_a_script_and_its_modules_to_the_workers(ray_nodes, script):
    done = run(*command(script, "--ray-address", ray_nodes.address))
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "[worker 0] stars from" in line)
    assert str(script.parent) not in line  # but from the directory that Ray unpacked


@pytest.mark.long
def test_without_any_ray_the_command_starts_one_that_ends_with_the_run(script):
    pytest.importorskip("ray", reason=REASON)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        done = run(*command(script), RAY_TMPDIR=folder, RAY_ADDRESS="")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[worker 0] stars from" in done.stdout
        processes = psutil.process_iter(["cmdline"])
        rays = [one for one in processes if folder in " ".join(one.info["cmdline"] or ())]
        _, alive = psutil.wait_procs(rays, timeout=30)
        assert not alive


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_actors_end_with_their_driver_however_it_ends(ray_nodes, script, how):
    with subprocess.Popen(
        [sys.executable, "-m", *command(script, "--ray-address", ray_nodes.address, "--set", "wait=true")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as driver:
        while "stars from" not in driver.stdout.readline():
            pass
        nodes = actors()
        assert len(nodes) == 2
        driver.send_signal(how)
        driver.wait(timeout=60)
    _, alive = psutil.wait_procs(nodes, timeout=60)
    assert not alive


def test_options_of_ray_go_with_the_engine_ray(script):
    done = run("headwater", "run", script, "--ray-address", "10.0.0.1:6379")
    assert (done.returncode, done.stdout) == (2, "")
    assert "go with --engine ray, got --engine local" in done.stderr


def test_an_address_where_nobody_answers_is_an_error_within_seconds(script):
    pytest.importorskip("ray", reason=REASON)
    done = run("headwater", "run", script, "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert done.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:1: " in done.stderr


@pytest.mark.long
def test_the_page_on_ray_tells_the_truth(ray_nodes):
    page = (Path(__file__).parent.parent / "docs" / "ray.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # the other one needs several hosts
    scope = {}
    exec(code, scope)
    assert scope["result"].version == 10
    np.testing.assert_allclose(scope["result"].values, [[-1.0, -0.5]] * 2, rtol=1e-6)
    first_cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    documented = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert {field.name for field in dataclasses.fields(hw.RayEngine)} <= documented


# ── nodes that are lost ─────────────────────────────────────────────────────────────────────────


def once(action):
    """Calls `action` the first time only; `done` says whether it has."""
    called = []

    def call():
        if not called:
            called.append(True)
            action()

    call.called = called
    return call


@pytest.mark.long
def test_digits_reaches_97_percent_though_a_node_with_a_worker_is_killed(ray_nodes, caplog):
    torch = pytest.importorskip("torch")
    from test_examples import module

    digits = module("digits")
    first, second = (ray_nodes.add({"work": 1}) for _ in range(2))
    kill = once(lambda: ray_nodes.kill(second))

    def watch(statistics):
        if all(progress.steps > 20 for progress in statistics.progress) and len(statistics.progress) == 2:
            kill()

    engine = share(server_resources={"head": 0.01}, worker_resources={"work": 0.01}, strategy="SPREAD")
    try:
        result = hw.run(
            digits.train, workers=2, servers=2, engine=engine, settings={"epochs": 20}, watch=watch
        )
    finally:
        ray_nodes.kill(first)
    assert kill.called
    assert caplog.text.count("it is started again") == 1
    net = digits.network()
    net.load_state_dict({name: torch.tensor(value) for name, value in result.parameters["model"].items()})
    *_, images, labels = digits.data()
    with torch.no_grad():
        right = (net(images).argmax(dim=1) == labels).float().mean().item()
    assert right >= 0.97


def wait_until_replicated(cluster):
    for _ in range(600):
        if not cluster.statistics().unreplicated:
            return
        assert cluster.next_outcome(0.1) is None
    raise AssertionError(f"after a minute {cluster.statistics().unreplicated} have no standby")


@pytest.mark.long
def test_updates_are_exact_and_replicated_again_though_a_node_with_servers_is_killed(ray_nodes):
    first, second = (ray_nodes.add({"serve": 1}) for _ in range(2))
    engine = share(server_resources={"serve": 0.01})
    try:
        with (
            hw.Cluster(workers=1, servers=2, replicas=1, engine=engine) as cluster,
            cluster.worker() as worker,
        ):
            model = worker.model("v", {"v": np.zeros(5000, np.float32)}, hw.Accumulate())
            wait_until_replicated(cluster)
            before = {node.pid for node in cluster.statistics().nodes}
            for step in range(1, 101):
                model.push({"v": np.full(5000, step, np.float32)})
                worker.step()
                if step == 50:
                    ray_nodes.kill(second)
            assert set(model.pull()["v"]) == {100 * 101 / 2}
            wait_until_replicated(cluster)
            after = {node.pid for node in cluster.statistics().nodes}
            assert len(after - before) == 2  # a new standby for each server that lost one of its two
            assert worker.version == 100
    finally:
        ray_nodes.kill(first)
