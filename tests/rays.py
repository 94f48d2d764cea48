"""Ray for tests: on the loopback address, with this run's own token, and gone when the module's tests end."""

import contextlib
import os
import secrets
import shutil
import tempfile

import forking
import psutil
import pytest

import headwater as hw

os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # despite its name: Ray then binds 127.0.0.1 alone
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_USAGE_STATS_ENABLED="0",
)

REASON = "needs Ray: the extra `ray`"
OBJECTS = 80 << 20
"""Bytes of shared memory that each of Ray's nodes may take: nearly the least it accepts."""

_started: set[int] = set()


def is_rays_own(process):
    """Whether it belongs to a Ray that a fixture started, and is no node of a cluster of ours."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = {process.pid, *(parent.pid for parent in process.parents())}
        return bool(family & _started) and "NodeActor" not in " ".join(process.cmdline())
    return True


def actors():
    """The processes of our nodes in a Ray that a fixture started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "NodeActor" in " ".join(process.info["cmdline"] or ()):
                found += [process] * bool(_started & {parent.pid for parent in process.parents()})
    return found


def wait_for_actors():
    """Block until actors have ended that Ray says are dead: their processes may take a moment more."""
    if _started:
        psutil.wait_procs(actors(), timeout=10)


def rays_descriptors():
    """Numbers, as text, of the connections of a fixture's Ray: its own are all IPv6, ours are not."""
    connections = psutil.Process().net_connections("tcp6") if _started else ()
    return {str(connection.fd) for connection in connections}


def note_rays_processes():
    """What this process has started besides its nodes is Ray's; called when Ray has started something."""
    _started.update({child.pid for child in psutil.Process().children()} - {*forking.warm()[:1]})


@contextlib.contextmanager
def started(start, stop):
    """What `start()` returns, whose processes are Ray's; after `stop()` none of them may be left."""
    pytest.importorskip("ray", reason=REASON)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets must be short
    os.environ["RAY_TMPDIR"] = folder
    everything = []
    try:
        try:
            value = start()
            note_rays_processes()
            yield value
        finally:
            everything = [one for one in psutil.Process().children(recursive=True) if is_rays_own(one)]
            stop()
            _, alive = psutil.wait_procs(everything, timeout=30)
            assert not alive, f"Ray left {alive}"
    finally:
        del os.environ["RAY_TMPDIR"]
        _started.clear()
        shutil.rmtree(folder, ignore_errors=True)


def share(**options):
    """The engine with small shares, so that many nodes fit where there are few cores."""
    small = {"num_cpus": 0.01}
    return hw.RayEngine(**{"server_resources": small, "worker_resources": small, "timeout": 60, **options})


@pytest.fixture(scope="module")
def ray_engine():
    """An engine in the Ray of this process, which has one node."""
    ray = pytest.importorskip("ray", reason=REASON)

    def start():
        ray.init(num_cpus=1, object_store_memory=OBJECTS, include_dashboard=False, log_to_driver=False)
        return share()

    with started(start, ray.shutdown) as engine:
        yield engine


class Nodes:
    """A Ray cluster on this machine, to which nodes are added and of which nodes are killed."""

    def __init__(self):
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        # a node that was killed is noticed within two seconds, not half a minute
        checks = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
        self.add(
            {"head": 1},
            num_cpus=2,
            include_dashboard=False,
            _system_config={"health_check_initial_delay_ms": 0, "health_check_timeout_ms": 1000, **checks},
        )
        ray.init(address=self.address, log_to_driver=False)

    @property
    def address(self):
        return self._cluster.address

    def add(self, resources, **options):
        """A node with resources of these names, for shares of `share(…)`."""
        options = {"num_cpus": 0, "object_store_memory": OBJECTS, **options}
        node = self._cluster.add_node(resources=resources, node_ip_address="127.0.0.1", **options)
        note_rays_processes()
        return node

    def kill(self, node):
        """All its processes die without a word, those of our nodes as well."""
        raylets = [psutil.Process(one.process.pid) for one in node.all_processes["raylet"]]
        actors = [child for raylet in raylets for child in raylet.children(recursive=True)]
        for process in [*raylets, *actors]:
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self):
        import ray

        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def ray_nodes():
    """A Ray cluster whose first node is called "head"; this process is its driver."""
    made = []

    def start():
        made.append(Nodes())
        return made[0]

    with started(start, lambda: [nodes.close() for nodes in made]) as nodes:
        yield nodes
