"""One node as a process of this machine: its pipes, the threads that serve them, and how it ended.

What the child runs comes over its standard input, a pipe from this process alone, which is therefore the one
place where something is unpickled. The end of that pipe is the child's order to end.

Invariants:
- A node has ended when it has told its outcome, or when its process has ended. Whoever else holds its pipes
  (a process that `train` started, a child that it forked) may go on printing, and nobody waits for it.
- The pipes are this process's alone: a process that it forks closes them.
- The end is reported once, whatever happens in the thread that waits for it.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from headwater.engines.engine import Failure, Outcome, Process
from headwater.engines.lines import LineSplitter
from headwater.engines.output import Output, prefixed
from headwater.engines.packing import unpack_outcome
from headwater.errors import EngineError
from headwater.wire.fork import close_in_child

_BOOTSTRAP = (
    "import sys; sys.path[:] = {path!r}; from headwater.engines.child import main; main({outcome}, {parent})"
)

_READ = 65_536
_PIPE = 1 << 20
"""Bytes that a pipe can hold at most, unless root has changed that."""
_LENGTH = 8
"""Bytes of the length that goes before an outcome."""
_ENDING_S = 1.0
"""How long a process whose connections have ended may take to end by itself, in seconds."""
_GONE_S = 5.0
"""How long a killed process, and the callback that takes its lines, may take to end, in seconds."""


class NodeProcess:
    """A child process that is a node. Started by a thread that lives as long as this process, as the child
    ends with the thread that started it (see `child`).

    Args:
        start: what the child reads, of any size.
        report: told of the node's end, from a thread of this object, unless `stop` was called before.

    Attributes:
        process: pid and host name.

    Raises:
        EngineError: the process cannot be started.
    """

    def __init__(
        self,
        role: str,
        index: int,
        start: bytes,
        *,
        environment: dict[str, str],
        output: Output,
        report: Callable[[Outcome], None],
    ) -> None:
        self.role, self.index = role, index
        self._output = output
        self._report = report
        self._unsent = memoryview(start)
        self._told = bytearray()
        self._lines = LineSplitter()
        self._reported = self._stopping = self._closing = False
        self._ended = threading.Event()
        self._killed = ""
        self._ready = selectors.PollSelector()
        self._process = self._start(environment)
        self.process: Process = self._process.pid, socket.gethostname()
        close_in_child(self)
        self._threads = [
            threading.Thread(target=self._serve, name=f"headwater-output-{role}-{index}", daemon=True),
            threading.Thread(target=self._wait, name=f"headwater-watch-{role}-{index}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        (stdin, self._input), (self._printed, stdout), (self._result, result), (self._woken, self._wakes) = (
            os.pipe() for _ in range(4)
        )
        path = [os.fspath(place) for place in sys.path if isinstance(place, str | os.PathLike)]
        bootstrap = _BOOTSTRAP.format(path=path, outcome=result, parent=os.getpid())
        try:
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", bootstrap],
                stdin=stdin,
                stdout=stdout,
                stderr=stdout,
                pass_fds=(result,),
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self.close_descriptors()
            raise EngineError(f"cannot start {self.role} {self.index}: {error}") from error
        finally:
            for theirs in (stdin, stdout, result):
                os.close(theirs)
        os.set_blocking(self._input, False)
        self._ready.register(self._input, selectors.EVENT_WRITE, self._send)
        for ours, take in (
            (self._printed, self._print),
            (self._result, self._receive),
            (self._woken, self._wake_up),
        ):
            os.set_blocking(ours, False)
            self._ready.register(ours, selectors.EVENT_READ, take)
        return process

    def kill(self, why: str) -> None:
        """End the process, unless it ends by itself; its end is reported, with this reason where it was this.

        Blocks for a moment: the connections of a process that was killed end before it is gone.
        """
        if not self._ended.wait(_ENDING_S):
            self._killed = why
            self._process.kill()

    def is_gone(self) -> bool:
        """Whether its process has ended, and nobody prints to its pipe any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Tell it to end; its end is not reported."""
        self._stopping = True
        self._wake()

    def join(self, until: float) -> None:
        """Block until it has ended; kill it at `until` (monotonic seconds)."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._closing = True
        self._wake()
        for thread in self._threads:
            thread.join(max(0.0, until + _GONE_S - time.monotonic()))
        if self.is_gone():
            self.close_descriptors()

    def close_descriptors(self) -> None:
        """A forked child would keep the pipes open, and so the node alive, when this process has ended."""
        for descriptor in (self._input, self._printed, self._result, self._woken, self._wakes):
            if descriptor >= 0:
                os.close(descriptor)
        self._input = self._printed = self._result = self._woken = self._wakes = -1

    def _wake(self) -> None:
        try:
            os.write(self._wakes, b"\0")
        except OSError:
            pass  # it is awake for good: its thread has ended

    # ── in its threads ──────────────────────────────────────────────────────────────────────────

    def _wait(self) -> None:
        self._process.wait()
        self._ended.set()
        self._wake()

    def _serve(self) -> None:
        """Send what the node starts with, show what it prints, report how it ends."""
        try:
            while not (self._closing or (self._reported and self._is_silent())):
                for key, _ in self._ready.select(self._timeout()):
                    key.data()
                self._show(self._lines.tick(time.monotonic()))
                if not self._reported and (self._ended.is_set() or self._is_told()):
                    self._drain()
                    self._tell(self._outcome())
            self._drain()
        except BaseException as error:
            self._tell(Outcome(self.role, self.index, failure=Failure.of(error), process=self.process))
            raise

    def _tell(self, outcome: Outcome) -> None:
        if not self._reported:
            self._reported = True
            if not self._stopping:
                self._report(outcome)

    def _timeout(self) -> float | None:
        due = self._lines.due
        return None if due is None else max(0.0, due - time.monotonic())

    def _drain(self) -> None:
        """Take what has been written until now; another process may go on printing."""
        while self._receive():
            pass
        for _ in range(_PIPE // _READ):
            if not self._print():
                break
        self._show(self._lines.end())

    def _outcome(self) -> Outcome:
        if self._is_told():
            value, failure = unpack_outcome(bytes(self._told[_LENGTH:]))
            self._told.clear()
            return Outcome.of(self.role, self.index, value, failure, process=self.process)
        code = self._process.wait()
        how = self._killed if self._killed and code == -signal.SIGKILL else _how(code)
        return Outcome(self.role, self.index, failure=Failure(how, "", None, died=True), process=self.process)

    def _is_told(self) -> bool:
        return len(self._told) >= _LENGTH and len(self._told) == _LENGTH + int.from_bytes(
            self._told[:_LENGTH]
        )

    def _is_silent(self) -> bool:
        return self._printed not in self._ready.get_map()

    def _show(self, lines: list[bytes]) -> None:
        for line in lines:
            self._output(prefixed(self.role, self.index, line))

    # what the selector calls

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._input, self._unsent[: 16 * _READ]) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = self._unsent[:0]  # it died at once: how is reported
        if not self._unsent:
            self._ready.unregister(self._input)

    def _print(self) -> bool:
        data = self._read(self._printed)
        if data:
            self._show(self._lines.feed(data, time.monotonic()))
        return bool(data)

    def _receive(self) -> bool:
        data = self._read(self._result)
        self._told += data
        return bool(data)

    def _wake_up(self) -> bool:
        if self._stopping and self._input >= 0:
            if self._input in self._ready.get_map():
                self._ready.unregister(self._input)
            os.close(self._input)
            self._input = -1
        return bool(self._read(self._woken))

    def _read(self, descriptor: int) -> bytes:
        """What is there; b"" where nothing is, or nothing comes any more."""
        if descriptor not in self._ready.get_map():
            return b""
        try:
            data = os.read(descriptor, _READ)
        except BlockingIOError:
            return b""
        if not data:
            self._ready.unregister(descriptor)
        return data


def _how(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    try:
        return f"its process ended with signal {signal.Signals(-code).name}"
    except ValueError:
        return f"its process ended with signal {-code}"
