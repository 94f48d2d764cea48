"""Python processes forked from one warm interpreter: what a fresh one imports first, they have.

A test that starts ten nodes pays ten times for importing NumPy, numba and Headwater otherwise, which is
nearly all that it costs. `Popen` takes what `subprocess.Popen` takes, for `python -c CODE` and for
`python -m MODULE`, also behind `ip netns exec NAME`. The process gets the same arguments, environment, folder
and descriptors, and its end is reported in the same way.

Invariant: no thread runs in the warm interpreter, since none would run in what is forked from it. So it has
one thread for linear algebra.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
IMPORTED = (
    "pytest",  # by every test module whose functions go to workers
    "pydantic",  # by typer
    "headwater.cli.app",
    "headwater.cli.run",
    "headwater.cli.serve",
    "headwater.engines.child",
    "headwater.runtime.checkpointer",
    "headwater.runtime.coordinator",
    "headwater.standalone",
)
"""What most processes need, as far as it is installed: imported once."""

WARM = "import sys; sys.path[:0] = {path!r}; import forking; forking.serve({descriptor})"


class Popen:
    """A process that was forked, with the attributes and methods of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        command,
        *,
        stdin=None,
        stdout=None,
        stderr=None,
        pass_fds=(),
        env=None,
        cwd=None,
        text=False,
        start_new_session=False,
    ):
        self.args, self.returncode = command, None
        given, theirs = {}, []  # descriptor there → here
        self.stdin = self.stdout = self.stderr = None
        for number, name, wanted in ((0, "stdin", stdin), (1, "stdout", stdout), (2, "stderr", stderr)):
            if wanted == subprocess.PIPE:
                read, write = os.pipe()
                here, there = (write, read) if number == 0 else (read, write)
                stream = os.fdopen(here, "wb" if number == 0 else "rb")
                setattr(self, name, io.TextIOWrapper(stream, write_through=True) if text else stream)
                theirs.append(there)
            elif wanted == subprocess.STDOUT:
                there = given[1]
            elif wanted == subprocess.DEVNULL:
                there = os.open(os.devnull, os.O_RDWR)
                theirs.append(there)
            else:
                there = number if wanted is None else wanted
            given[number] = there
        given |= {number: number for number in pass_fds}
        self._status, status = os.pipe()
        theirs.append(status)
        namespace, command = (command[3], command[4:]) if command[0] == "ip" else (None, command)
        assert command[0] == sys.executable, command
        order = {
            "arguments": command[1:],
            "namespace": namespace,
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "numbers": list(given),
            "session": start_new_session,
        }
        try:
            _send(_warm()[1], order, [*given.values(), status])
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.pid = int(_line(self._status))
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        self.returncode = int(_line(self._status))
        os.close(self._status)
        self._ended.set()

    def poll(self):
        """The exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout=None):
        """The exit code; blocks until it has ended, for at most `timeout` seconds."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        """Send it a signal unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        """Tell it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """End it."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout=None):
        """Write `input` and close, read what it prints to the end, wait; returns (stdout, stderr)."""
        until = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                if input:
                    self.stdin.write(input)
                self.stdin.close()
        told = [stream.read() if stream is not None else None for stream in (self.stdout, self.stderr)]
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        return tuple(told)


spawn = subprocess.Popen
"""Starts Python processes of tests: `Popen` of this module unless a test wants fresh ones (conftest.py)."""


class Subprocess:
    """The module `subprocess`, whose `Popen` forks."""

    Popen = Popen

    def __getattr__(self, name):
        return getattr(subprocess, name)


def _line(descriptor):
    """The next line, a byte at a time, as nothing behind it may be taken."""
    line = b""
    while not line.endswith(b"\n"):
        read = os.read(descriptor, 1)
        if not read:
            raise RuntimeError("the warm interpreter has ended")
        line += read
    return line


# ── the warm interpreter ────────────────────────────────────────────────────────────────────────


@functools.cache
def _warm():
    """The warm interpreter of this process, which ends with it, and our end of the connection to it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        process = subprocess.Popen(
            [sys.executable, "-c", WARM.format(path=[str(HERE), *sys.path], descriptor=there.fileno())],
            pass_fds=(there.fileno(),),
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def end():
        here.close()
        process.wait()

    atexit.register(end)
    assert here.recv(1) == b"!"
    return process, here


def warm():
    """Id of the warm interpreter and number of the descriptor that leads to it; () where there is none."""
    return (_warm()[0].pid, _warm()[1].fileno()) if _warm.cache_info().currsize else ()


def _send(connection, order, descriptors):
    socket.send_fds(connection, [json.dumps(order).encode()], descriptors)


def serve(descriptor):
    """Fork what is asked for, until the other side has closed; returns only in a process that was forked."""
    import numpy as np

    from headwater.kernels import copy_out

    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    copy_out(np.zeros(0, np.float32), np.zeros(0, np.int64))  # loads the compiler and what is compiled
    gc.collect()
    gc.freeze()  # pages that a collection writes to are shared no longer

    connection = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads run where processes are forked"
    connection.send(b"!")
    while True:
        order, given, _, _ = socket.recv_fds(connection, 1 << 17, 64)
        if not order:
            os._exit(0)
        if os.fork() == 0:
            connection.close()
            return _keep(json.loads(order), given)
        for one in given:
            os.close(one)


def _reap():
    """Take leave of the keepers that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(order, given):
    """Fork the process itself, and report its id and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *given, status = given
    pid = os.fork()
    if pid == 0:
        os.close(status)
        return _run(order, given)
    for one in given:
        os.close(one)
    os.write(status, b"%d\n" % pid)
    _, code = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(code))
    os._exit(0)


def _run(order, given):
    """Be a Python process with these arguments."""
    if order["session"]:
        os.setsid()
    if order["namespace"]:
        _enter(order["namespace"])
    _place(dict(zip(order["numbers"], given, strict=True)))
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        setattr(sys, name, os.fdopen(number, mode, buffering=1, closefd=False))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        _execute([one for one in order["arguments"] if one != "-u"])
        code = 0
    except SystemExit as ended:
        if not isinstance(ended.code or 0, int):
            raise
        code = ended.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # taking all modules apart costs four times as much as the rest of a small program


def _execute(arguments):
    """Run the program that the command line names."""
    what, value, *rest = arguments
    sys.argv = [what, *rest]
    sys.path.insert(0, "")
    if what == "-m":
        runpy.run_module(value, run_name="__main__", alter_sys=True)
    else:
        assert what == "-c", arguments
        exec(compile(value, "<string>", "exec"), {"__name__": "__main__"})


def _enter(namespace):
    """Go on in a network namespace with a name."""
    with open(f"/run/netns/{namespace}") as opened:
        if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def _place(wanted):
    """Have each descriptor under the number that it has there."""
    high = {number: os.dup2(here, 200 + i) for i, (number, here) in enumerate(wanted.items())}
    os.closerange(3, 200)
    for number, here in high.items():
        os.dup2(here, number)
        os.close(here)
