"""Nodes that `headwater serve` started, as any scheduler would: processes of their own, which tests end."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

import forking
import numpy as np
from coordinators import asked
from waiting import wait_until

import headwater as hw
from headwater.checkpoint import list_checkpoints
from headwater.errors import HeadwaterError

ROOT = Path(__file__).parent.parent

COUNT = """
import os, pathlib
import numpy as np
import headwater as hw

FOLDER = pathlib.Path(__file__).parent

def train(worker):
    model = worker.model("sums", {"a": np.zeros(9000, np.float32)}, hw.Accumulate())
    ones, steps = {"a": np.full(9000, worker.rank + 1, np.float32)}, 0
    try:
        while not (FOLDER / "stop").exists():
            model.push(ones)
            worker.step()
            steps += 1
    finally:
        (FOLDER / f"steps-{worker.rank}-{os.getpid()}").write_text(str(steps))
"""
"""Adds rank + 1 with every step until there is a file `stop`, and writes down how often."""


class Node:
    """A process `headwater serve …`, which the command `inside` starts."""

    def __init__(self, folder, *arguments, inside=(), **environment):
        command = [*inside, sys.executable, "-m", "headwater", "serve", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        self.what = " ".join(map(str, arguments[:3]))
        self.lines = []
        self.process = forking.spawn(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def pid(self):
        return self.process.pid

    @property
    def text(self):
        return "".join(list(self.lines))

    def says(self, *words):
        """Block until it has printed a line with all of these."""
        return wait_until(
            lambda: (
                any(all(word in line for word in words) for line in list(self.lines))
                or self.process.poll() is not None
            )
        ) and any(all(word in line for word in words) for line in list(self.lines))

    def metrics_url(self):
        """Where it says that it is scraped."""
        lines = wait_until(lambda: [line for line in list(self.lines) if "metrics: http" in line])
        return lines[0].split("metrics: ")[1].strip()

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        assert self.code() == -signal.SIGKILL

    def code(self, seconds=90):
        """How it ended; blocks until it has."""
        code = self.process.wait(seconds)
        self._reader.join(20)
        self.process.stdout.close()
        return code


class Site:
    """The nodes of one cluster in one folder."""

    def __init__(self, folder, address):
        self.folder = folder
        self.address = address
        self.nodes = []
        (folder / "count.py").write_text(COUNT)

    def start(self, *arguments, **environment):
        node = Node(self.folder, *arguments, HEADWATER_COORDINATOR=self.address, **environment)
        self.nodes.append(node)
        return node

    def coordinator(self, *options):
        """Started again with the same options where they are left out."""
        self._options = options or self._options
        return self.start("coordinator", "--bind", self.address, *self._options)

    def server(self, *options):
        return self.start("server", *options)

    def worker(self, *options, script="count.py"):
        return self.start("worker", script, *options)

    def statistics(self):
        return asked(self.address)

    def pids(self, *roles):
        """Of the members with these roles, by index or rank; () while there is no coordinator."""
        with contextlib.suppress(HeadwaterError):
            nodes = [node for node in self.statistics().nodes if node.role in roles]
            places = [(node.rank if node.role == "worker" else node.index, node.pid) for node in nodes]
            return tuple(pid for _, pid in sorted(places))
        return ()

    def version(self):
        with contextlib.suppress(HeadwaterError):
            return self.statistics().version
        return 0

    def later_checkpoint(self):
        """Block until there is a checkpoint that is not there yet."""
        before = self.checkpoints()[-1:]
        wait_until(lambda: self.checkpoints()[-1:] > before)

    def goes_on(self, more=10):
        """Block until that many more commits have been made."""
        before = wait_until(self.version)
        wait_until(lambda: self.version() >= before + more)

    def checkpoints(self):
        """Names of the complete ones: a draft has a manifest too, until it gets its name."""
        runs = self.folder / "runs"
        return sorted(Path(found.path).name for found in list_checkpoints(runs)) if runs.exists() else []

    def stop(self):
        """Have the scripts end."""
        (self.folder / "stop").touch()

    def counted(self):
        """Sum that all workers together have pushed, as they say."""
        files = self.folder.glob("steps-*")
        return sum((int(path.name.split("-")[1]) + 1) * int(path.read_text()) for path in files)

    def summed(self):
        """The distinct sums of the last checkpoint."""
        return np.unique(hw.load_checkpoint(self.folder / "runs")["sums"]["a"]).tolist()

    def close(self):
        for node in self.nodes:
            if node.process.poll() is None:
                node.process.kill()
        for node in self.nodes:
            node.process.wait(20)
            print(f"── {node.what} (pid {node.pid}): {node.process.returncode}\n{node.text}")
            node.process.stdout.close()


@contextlib.contextmanager
def site(folder):
    made = Site(folder, f"unix:@headwater-{secrets.token_hex(8)}")
    try:
        yield made
    finally:
        made.close()


def codes(*nodes):
    return [node.code() for node in nodes]


def values(folder, model, tensor):
    """Of the last checkpoint in this folder."""
    return hw.load_checkpoint(folder / "runs")[model][tensor]
