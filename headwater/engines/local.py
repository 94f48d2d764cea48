"""Nodes as processes of this machine: fresh interpreters that end with their parent."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import cloudpickle

from headwater.engines.early import sharing_cores, take
from headwater.engines.engine import Launch, Outcome, Process
from headwater.engines.logs import Logs
from headwater.engines.output import Output
from headwater.engines.packing import pack_train
from headwater.engines.process import Child, LaunchContext, NodeProcess
from headwater.engines.spawner import Spawner
from headwater.errors import EngineError
from headwater.messages import Assignment
from headwater.wire.endpoint import Endpoint
from headwater.worker import Worker

_STOP_S = 1.0
"""How long children may take to end before they are killed, in seconds."""


class LocalEngine:
    """Processes; the train function travels by cloudpickle, functions of `__main__` by value."""

    nearby = True

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._output = Output(launch.output)
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._nodes: list[NodeProcess] = []
        self._spawner = Spawner()

    def start_server(self, address: str, assignment: Assignment, reach: Endpoint) -> None:
        """Start the process of a server or standby."""
        self._start(assignment.role, assignment.index, "server", (address, assignment, reach))

    def start_worker(self, address: str, rank: int, train: Callable[[Worker], Any]) -> None:
        """Start a worker process."""
        self._start("worker", rank, "worker", (address, rank, pack_train(train), self._launch.security))

    def _start(self, role: str, index: int, part: str, argument: Any) -> None:
        start = cloudpickle.dumps((part, self._launch.rules, argument, Logs.here()))
        self._forget_the_gone()

        def spawn() -> None:
            context = LaunchContext.here(sharing_cores(self._launch.workers))
            try:
                child = take(part, context) or Child(context)
            except (OSError, ValueError) as error:
                raise EngineError(f"cannot start {role} {index}: {error}") from error
            node = NodeProcess(
                role, index, start, child=child, output=self._output, report=self._outcomes.put
            )
            with self._lock:
                self._nodes.append(node)

        self._spawner.call(spawn)

    def _forget_the_gone(self) -> None:
        """Give back what nodes held whose processes have ended, and that nobody prints to any more."""
        with self._lock:
            gone = [node for node in self._nodes if node.is_gone()]
            self._nodes = [node for node in self._nodes if node not in gone]
        for node in gone:
            node.join(0.0)

    def end_process(self, process: Process, why: str) -> None:
        """Kill the process of a node that is no member any more; its end is reported."""
        with self._lock:
            nodes = [node for node in self._nodes if node.process == process]
        for node in nodes:
            node.kill(why)

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next process ended."""
        try:
            return self._outcomes.get(timeout=timeout)
        except queue.Empty:
            return None

    def stop_servers(self) -> None:
        """End the processes of servers and standbys."""
        self._end(lambda node: node.role != "worker")

    def close(self) -> None:
        """End all processes; those that do not within a second are killed."""
        self._end(lambda node: True)
        self._spawner.close()
        self._end(lambda node: True)  # what was being started

    def _end(self, chosen: Callable[[NodeProcess], bool]) -> None:
        with self._lock:
            nodes = [node for node in self._nodes if chosen(node)]
            self._nodes = [node for node in self._nodes if node not in nodes]
        until = time.monotonic() + _STOP_S
        for node in nodes:
            node.stop()
        for node in nodes:
            node.join(until)
