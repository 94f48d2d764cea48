"""Nodes as threads of this process: for debugging, tests and small things."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from headwater.engines.engine import Failure, Launch, Outcome, Process, run_worker
from headwater.messages import Assignment
from headwater.runtime.server import ServerNode
from headwater.wire.endpoint import Endpoint
from headwater.worker import Worker

_JOIN_S = 1.0


class InlineEngine:
    """Threads share the interpreter, so nothing runs faster than with one worker; nothing is pickled."""

    nearby = True

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._servers: list[ServerNode] = []
        self._threads: list[threading.Thread] = []

    def start_server(self, address: str, assignment: Assignment, reach: Endpoint) -> None:
        """Start a server or standby in threads."""
        node = ServerNode(address, assignment, reach)
        self._servers.append(node)
        self._start(assignment.role, assignment.index, node.start, report_end=False)

    def start_worker(self, address: str, rank: int, train: Callable[[Worker], Any]) -> None:
        """Run `train` in a thread."""
        self._start(
            "worker", rank, lambda: run_worker(address, rank, train, self._launch.security), report_end=True
        )

    def _start(self, role: str, index: int, run: Callable[[], Any], report_end: bool) -> None:
        def body() -> None:
            try:
                value = run()
            except BaseException as error:  # noqa: BLE001 - it is handed to the caller of `run`
                self._outcomes.put(Outcome(role, index, failure=Failure.of(error)))
            else:
                if report_end:
                    self._outcomes.put(Outcome.of(role, index, value))

        thread = threading.Thread(target=body, name=f"headwater-{role}-{index}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def end_process(self, process: Process, why: str) -> None:
        """Do nothing: threads cannot be ended, and this one's next call is refused."""

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next node ended."""
        try:
            return self._outcomes.get(timeout=timeout)
        except queue.Empty:
            return None

    def stop_servers(self) -> None:
        """Close the servers."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()

    def close(self) -> None:
        """Close the servers, which ends every exchange; a thread that computes on is left behind."""
        self.stop_servers()
        for thread in self._threads:
            thread.join(_JOIN_S)
