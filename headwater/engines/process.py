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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headwater.engines.engine import Failure, Outcome, Process
from headwater.engines.lines import LineSplitter
from headwater.engines.output import Output, prefixed
from headwater.engines.packing import unpack_outcome
from headwater.wire.fork import close_in_child

_BOOTSTRAP = (
    "import sys; sys.path[:] = {path!r}; from headwater.engines.child import main; "
    "main({outcome}, {parent}, {modules!r})"
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


@dataclass(frozen=True)
class LaunchContext:
    """What a child has of this process: where it finds modules, its environment, its folder."""

    path: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str

    @classmethod
    def here(cls, environment: Mapping[str, str], *first: str) -> LaunchContext:
        """Those of now, with more `environment` where the user says nothing else; `first` leads the path."""
        path = (os.fspath(place) for place in sys.path if isinstance(place, str | os.PathLike))
        return cls((*first, *path), {**environment, **os.environ}, os.getcwd())


class Child:
    """A process that has begun and does not know yet what it is to be; it imports `modules` meanwhile.

    Started by a thread that lives as long as this process, as the child ends with the thread that started it
    (see `child`).

    Raises:
        OSError, ValueError: it cannot be started.
    """

    def __init__(self, context: LaunchContext, modules: Sequence[str] = ()) -> None:
        self.context = context
        (stdin, self.input), (self.printed, stdout), (self.result, result) = (os.pipe() for _ in range(3))
        path = list(context.path)
        bootstrap = _BOOTSTRAP.format(path=path, outcome=result, parent=os.getpid(), modules=tuple(modules))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", bootstrap],
                stdin=stdin,
                stdout=stdout,
                stderr=stdout,
                pass_fds=(result,),
                env=dict(context.environment),
                start_new_session=True,
            )
        except BaseException:
            self.close_descriptors()
            raise
        finally:
            for theirs in (stdin, stdout, result):
                os.close(theirs)
        close_in_child(self)

    def discard(self) -> None:
        """End it, as it is not needed; blocks until it has ended."""
        self.process.kill()
        self.process.wait()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """A forked child would keep the pipes open, and so the node alive, when this process has ended."""
        for descriptor in (self.input, self.printed, self.result):
            if descriptor >= 0:
                os.close(descriptor)
        self.input = self.printed = self.result = -1


class NodeProcess:
    """A child process that is a node.

    Args:
        child: the process, which this object owns from now on.
        start: what the child reads, of any size.
        report: told of the node's end, from a thread of this object, unless `stop` was called before.

    Attributes:
        process: pid and host name.
    """

    def __init__(
        self,
        role: str,
        index: int,
        start: bytes,
        *,
        child: Child,
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
        self._child, self._process = child, child.process
        self.process: Process = self._process.pid, socket.gethostname()
        self._listen()
        close_in_child(self)
        self._threads = [
            threading.Thread(target=self._serve, name=f"headwater-output-{role}-{index}", daemon=True),
            threading.Thread(target=self._wait, name=f"headwater-watch-{role}-{index}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        self._woken, self._wakes = os.pipe()
        child = self._child
        os.set_blocking(child.input, False)
        self._ready.register(child.input, selectors.EVENT_WRITE, self._send)
        for ours, take in (
            (child.printed, self._print),
            (child.result, self._receive),
            (self._woken, self._wake_up),
        ):
            os.set_blocking(ours, False)
            self._ready.register(ours, selectors.EVENT_READ, take)

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
        self._child.close_descriptors()
        for descriptor in (self._woken, self._wakes):
            if descriptor >= 0:
                os.close(descriptor)
        self._woken = self._wakes = -1

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
        return self._child.printed not in self._ready.get_map()

    def _show(self, lines: list[bytes]) -> None:
        for line in lines:
            self._output(prefixed(self.role, self.index, line))

    # what the selector calls

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._child.input, self._unsent[: 16 * _READ]) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = self._unsent[:0]  # it died at once: how is reported
        if not self._unsent:
            self._ready.unregister(self._child.input)

    def _print(self) -> bool:
        data = self._read(self._child.printed)
        if data:
            self._show(self._lines.feed(data, time.monotonic()))
        return bool(data)

    def _receive(self) -> bool:
        data = self._read(self._child.result)
        self._told += data
        return bool(data)

    def _wake_up(self) -> bool:
        if self._stopping and self._child.input >= 0:
            if self._child.input in self._ready.get_map():
                self._ready.unregister(self._child.input)
            os.close(self._child.input)
            self._child.input = -1
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
