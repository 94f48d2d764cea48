"""Hosts that are network namespaces of this machine, joined by a bridge; links that are cut, mended and slow.

Everything lies inside namespaces of fresh names, so that deleting those leaves nothing, and nothing of the
machine's own network is touched.
"""

import contextlib
import functools
import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import forking

LOCAL = Path(__file__).parent
WAIT_S = 90.0


def _ip(*words, check=True):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def impossible():
    """Why there can be no such hosts here; "" where there can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    try:
        with Network(1):
            return ""
    except OSError as error:
        return str(error)


class Network:
    """`hosts` namespaces with the addresses 10.99.0.1, 10.99.0.2, …, and a hub that joins them."""

    def __init__(self, hosts):
        self.hosts = hosts
        self._name = f"hw-{secrets.token_hex(4)}"
        self._hub = f"{self._name}-hub"

    def address(self, host):
        return f"10.99.0.{host}"

    def namespace(self, host):
        return f"{self._name}-{host}"

    def inside(self, host):
        """What starts a command there."""
        return ["ip", "netns", "exec", self.namespace(host)]

    def _made(self):
        return [self._hub, *(self.namespace(host) for host in range(1, self.hosts + 1))]

    def __enter__(self):
        try:
            for name in self._made():
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._hub, "link", "set", "bridge", "up")
            for host in range(1, self.hosts + 1):
                self._join(host)
        except BaseException:
            self._remove()
            raise
        return self

    def _join(self, host):
        name, port = self.namespace(host), f"port{host}"
        _ip("-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self._hub, "link", "set", port, "master", "bridge", "up")
        _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")

    def __exit__(self, *error):
        self._remove()

    def _remove(self):
        for name in self._made():
            _ip("netns", "delete", name, check=False)

    def cut(self, host):
        """Pull its cable."""
        _ip("-n", self._hub, "link", "set", f"port{host}", "down")

    def mend(self, host):
        """Plug it in again."""
        _ip("-n", self._hub, "link", "set", f"port{host}", "up")

    def slow(self, host, delay):
        """Delay what goes to the host, such as "50ms"; why not, where this machine cannot."""
        if shutil.which("tc") is None:
            return "there is no `tc` (iproute2)"
        qdisc = ["qdisc", "add", "dev", f"port{host}", "root", "netem", "delay", delay]
        done = subprocess.run(["tc", "-n", self._hub, *qdisc], capture_output=True, text=True, timeout=30)
        return done.stderr.strip()


class Node:
    """A Python process on a host. What it prints arrives line by line; it ends with the end of its input."""

    def __init__(self, network, host, code, *arguments):
        paths = os.pathsep.join([str(LOCAL.parent), str(LOCAL)])
        self._process = forking.spawn(
            [*network.inside(host), sys.executable, "-c", code, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        self.pid = self._process.pid
        self.lines = []
        self._answers = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("{"):
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def answer(self, timeout=WAIT_S):
        """The next object that it printed as one line of JSON."""
        found = self._answers.get(timeout=timeout)
        assert found is not None, "\n".join(["the node has ended:", *self.lines])
        return found

    def ask(self, line=""):
        """Write a line to it, and take the answer."""
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.answer()

    def kill(self):
        self._process.kill()
        self._process.wait(20)

    def close(self):
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)
        self._thread.join(20)
        self._process.stdout.close()
        print(*self.lines, sep="\n")
