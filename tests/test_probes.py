"""`headwater serve … --health`: live, and ready with the reason."""

import socket
import urllib.error
import urllib.request

import pytest
from serving import codes, site
from waiting import wait_until

from headwater.cli.probes import ProbeServer
from headwater.errors import ConfigurationError, ConnectionLostError
from headwater.observe.http_server import CLIENTS


def asked(url, method="GET"):
    """Status and text."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode().strip()


def test_a_node_that_waits_is_live_and_not_ready():
    state = [False, "waits"]
    with ProbeServer("127.0.0.1:0", lambda: tuple(state)) as probes:
        assert asked(f"{probes.url}/live") == (200, "waits")
        assert asked(f"{probes.url}/ready") == (503, "waits")
        state[:] = [True, "server 0"]
        assert asked(f"{probes.url}/ready") == (200, "server 0")
        assert asked(f"{probes.url}/ready", "HEAD") == (200, "")
        assert asked(f"{probes.url}/metrics")[0] == 404
        assert asked(f"{probes.url}/ready", "POST")[0] == 501


def test_a_node_whose_parts_do_not_answer_is_not_live():
    def fails():
        raise ConnectionLostError("the coordinator is closed")

    with ProbeServer("127.0.0.1:0", fails) as probes:
        assert asked(f"{probes.url}/live") == (503, "the coordinator is closed")


def test_a_probe_that_was_answered_or_went_away_leaves_its_place_to_the_next():
    with ProbeServer("127.0.0.1:0", lambda: (True, "here")) as probes:
        host, port = probes.url.removeprefix("http://").split(":")
        for _ in range(CLIENTS + 1):
            socket.create_connection((host, int(port))).close()
            assert wait_until(lambda: answered(f"{probes.url}/ready")) == (200, "here")


def answered(url):
    """What it answers; None where it has no place for another now."""
    try:
        return asked(url)
    except OSError:
        return None


@pytest.mark.parametrize("place", ["8080", "localhost", "", ":8080", "localhost:http", None])
def test_what_is_no_place_is_told(place):
    with pytest.raises(ConfigurationError, match="expected HOST:PORT"):
        ProbeServer(place, lambda: (True, ""))


def test_a_port_in_use_is_told():
    with ProbeServer("127.0.0.1:0", lambda: (True, "")) as probes:
        place = probes.url.removeprefix("http://")
        with pytest.raises(ConfigurationError, match="pass another port"):
            ProbeServer(place, lambda: (True, ""))


def url(node):
    """Where a node says that it answers."""
    lines = wait_until(lambda: [line for line in list(node.lines) if "/live" in line])
    return lines[0].split("health: ")[1].split("/live")[0]


def test_the_nodes_of_a_cluster_say_when_they_are_ready_and_why_not(tmp_path):
    with site(tmp_path) as cluster:
        probed = ("--health", "127.0.0.1:0")
        coordinator = cluster.coordinator("--workers", 1, "--servers", 1, *probed)
        assert asked(f"{url(coordinator)}/live")[0] == 200
        assert asked(f"{url(coordinator)}/ready") == (503, "not ready: server 0 is not there")
        server = cluster.server(*probed)
        wait_until(lambda: asked(f"{url(coordinator)}/ready") == (200, "ready"))
        assert asked(f"{url(server)}/ready")[1].startswith("server 0, at version ")
        spare = cluster.server(*probed)
        assert asked(f"{url(spare)}/live")[0] == 200
        assert asked(f"{url(spare)}/ready")[0] == 503
        worker = cluster.worker(*probed)
        wait_until(lambda: asked(f"{url(worker)}/ready")[0] == 200)
        cluster.stop()
        assert codes(coordinator, server, spare, worker) == [0, 0, 0, 0]
