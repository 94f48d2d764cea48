"""Nodes as processes of this machine: fresh interpreters that end with their parent.

What a child runs comes over its standard input, a pipe from its parent alone, which is therefore the
one place where something is unpickled. Its end-of-file is the parent's end, however it came about.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

import cloudpickle

from headwater.engines.engine import Failure, Launch, Outcome
from headwater.engines.packing import pack_train
from headwater.errors import EngineError
from headwater.runtime.server import ServerSettings
from headwater.worker import Worker

_STOP_S = 1.0
"""How long children may take to end before they are killed, in seconds."""

_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; from headwater.engines.child import main; main({result})"


class _Child:
    """One process, the threads that read its output and its result, and its prefix."""

    def __init__(
        self, role: str, index: int, start: bytes, launch: Launch, done: Callable[[Outcome], None]
    ) -> None:
        self.role, self.index = role, index
        self._output = launch.output
        self._done = done
        self._stopping = False
        receive, send = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOTSTRAP.format(path=sys.path, result=send)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(send,),
                env=_environment(launch.workers),
                start_new_session=True,
            )
        except OSError as error:
            os.close(receive)
            raise EngineError(f"cannot start {role} {index}: {error}") from error
        finally:
            os.close(send)
        self._result = os.fdopen(receive, "rb")
        self._threads = [
            threading.Thread(target=self._relay, name=f"headwater-output-{role}-{index}", daemon=True),
            threading.Thread(target=self._watch, name=f"headwater-watch-{role}-{index}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._hand_over(start)

    def _hand_over(self, start: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(start)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died at once: `_watch` reports how

    def _relay(self) -> None:
        stream: IO[bytes] | None = self._process.stdout
        assert stream is not None
        for line in stream:
            self._output(f"[{self.role} {self.index}] {line.decode(errors='replace').rstrip()}")

    def _watch(self) -> None:
        result = self._result.read()
        code = self._process.wait()
        self._threads[0].join()
        if not self._stopping:
            self._done(self._outcome(result, code))

    def _outcome(self, result: bytes, code: int) -> Outcome:
        if not result:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Outcome(
                self.role, self.index, failure=Failure(f"its process ended with {how}", "", None, died=True)
            )
        value, failure = cloudpickle.loads(result)
        return Outcome.of(self.role, self.index, value, failure)

    def stop(self) -> None:
        """Tell it to end, by the end of its standard input; its end is not reported."""
        self._stopping = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already

    def join(self, until: float) -> None:
        """Block until it has ended; kill it at `until` (monotonic seconds)."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
        for thread in self._threads:
            thread.join()
        self._result.close()
        assert self._process.stdout is not None
        self._process.stdout.close()


class LocalEngine:
    """Processes; the train function travels by cloudpickle, functions of `__main__` by value."""

    nearby = True

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._children: list[_Child] = []

    def start_server(self, settings: ServerSettings) -> None:
        """Start the process of a server or standby."""
        self._start(settings.role, settings.index, ("server", self._launch.rules, settings))

    def start_worker(self, address: str, rank: int, train: Callable[[Worker], Any]) -> None:
        """Start a worker process."""
        argument = address, rank, pack_train(train), self._launch.security
        self._start("worker", rank, ("worker", self._launch.rules, argument))

    def _start(self, role: str, index: int, start: tuple[Any, ...]) -> None:
        child = _Child(role, index, cloudpickle.dumps(start), self._launch, self._outcomes.put)
        self._children.append(child)

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next process ended."""
        try:
            return self._outcomes.get(timeout=timeout)
        except queue.Empty:
            return None

    def stop_servers(self) -> None:
        """End the processes of servers and standbys."""
        self._end([child for child in self._children if child.role != "worker"])

    def close(self) -> None:
        """End all processes; those that do not within a second are killed."""
        self._end(list(self._children))

    def _end(self, children: list[_Child]) -> None:
        until = time.monotonic() + _STOP_S
        for child in children:
            child.stop()
        for child in children:
            child.join(until)
            self._children.remove(child)


def _environment(workers: int) -> dict[str, str]:
    """The children's environment: torch and NumPy share the cores out, unless the user said otherwise."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}
