"""What every engine does: start servers and workers, report how each ended, stop all of them."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeAlias

from headwater.errors import DeclaredDeadError, RewoundError, WorkerError
from headwater.loggers import logger
from headwater.messages import Assignment
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import PLAIN, Security
from headwater.worker import Worker

Process: TypeAlias = tuple[int, str]
"""Pid and host name, as the coordinator has them of a member."""

_OWN = ("headwater.engines.", "headwater.standalone.")

_log = logger("headwater.worker")


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start nodes. `rules`: modules with users' rules, loaded by every node.

    `workers`, `servers`, and `replicas` of every server: how many there will be. `output`: takes each line
    a node printed, with its prefix; called from several threads. `security`: what workers must prove.
    """

    workers: int
    rules: tuple[str, ...] = ()
    output: Callable[[str], None] = print
    servers: int = 1
    replicas: int = 0
    security: Security = PLAIN


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended a node, in a form that crosses processes.

    `died`: its process, without an exception; or its membership, for its silence. Its program did nothing
    wrong.
    """

    summary: str
    trace: str
    error: BaseException | None
    died: bool = False

    @staticmethod
    def of(error: BaseException) -> Failure:
        """Describe `error`, which is being handled; the engine's own frames are left out of its traceback."""
        frames = error.__traceback__
        while frames is not None and _module(frames).startswith(_OWN):
            frames = frames.tb_next
        trace = "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
        died = isinstance(error, DeclaredDeadError)
        return Failure(words_of(error), trace, error, died)


def words_of(error: BaseException) -> str:
    """An exception's type and text; a user's own may not be able to say its text."""
    try:
        text = str(error)
    except Exception as raised:  # noqa: BLE001 - whatever a user's exception raises
        text = f"its text cannot be told ({type(raised).__name__})"
    return f"{type(error).__name__}: {text}"


def _module(frames: TracebackType) -> str:
    """The module of a frame; a function that `exec` made may have none."""
    return str(frames.tb_frame.f_globals.get("__name__", ""))


@dataclass(frozen=True, slots=True)
class Trained:
    """What `train` returned, and the generation of the log in which it did."""

    value: Any
    generation: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a node ended: a worker with the value `train` returned, or anything with a failure.

    `role`: "worker", "server" or "standby", as it was started. `generation`: in which `train` returned.
    `process`: its process; None where it had none of its own, or never began.
    """

    role: str
    index: int
    value: Any = None
    failure: Failure | None = None
    generation: int = 0
    process: Process | None = None

    @staticmethod
    def of(
        role: str,
        index: int,
        trained: Trained | None,
        failure: Failure | None = None,
        *,
        process: Process | None = None,
    ) -> Outcome:
        """Of a node that ended with either."""
        if trained is None:
            return Outcome(role, index, failure=failure, process=process)
        return Outcome(role, index, trained.value, failure, trained.generation, process)

    def as_error(self) -> WorkerError:
        """The failure of a worker, to raise in the caller; the original is its cause."""
        assert self.failure is not None
        error = WorkerError(self.index, self.failure.summary, self.failure.trace)
        error.__cause__ = self.failure.error
        return error


class Engine(Protocol):
    """Starts nodes and watches them. After `close` nothing it started is left.

    Attributes:
        nearby: whether every node it starts is on this machine.
    """

    nearby: bool

    def start_server(self, address: str, assignment: Assignment, reach: Endpoint) -> None:
        """Start a server or standby that joins the coordinator at `address` and listens at `reach`; does not
        wait until it has joined."""

    def start_worker(self, address: str, rank: int, train: Callable[[Worker], Any]) -> None:
        """Start a worker that joins the coordinator at `address` and runs `train`."""

    def end_process(self, process: Process, why: str) -> None:
        """Kill the process of a node that is no member any more, where this engine started it: it may be
        stopped, or busy, and would keep its place and its memory. Its end is reported, with the reason
        `why`."""

    def stop_servers(self) -> None:
        """Stop all servers and standbys within two seconds; nothing is reported of them."""

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next node ended; None after `timeout` seconds. A server's end is always a failure."""

    def close(self) -> None:
        """Stop everything within two seconds; idempotent."""


def run_worker(address: str, rank: int, train: Callable[[Worker], Any], security: Security) -> Trained:
    """What a worker's process or thread does: again from the start when training begins anew."""
    cluster = ""
    while True:
        try:
            with Worker(address, rank, security=security, cluster=cluster) as worker:
                cluster = worker.cluster
                return Trained(called(train, worker), worker.generation)
        except RewoundError as error:
            _log.warning("worker %d: %s", rank, error)


def called(train: Callable[[Worker], Any], worker: Worker) -> Any:
    """What `train` returns or raises in this process. One that it forked, and that comes back from it too, is
    not this worker: it ends here, as a child of `multiprocessing` does, and nothing is told of it."""
    process = os.getpid()
    try:
        return train(worker)
    finally:
        if os.getpid() != process:
            _end_forked(sys.exc_info()[1])


def _end_forked(error: BaseException | None) -> NoReturn:
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        code = 1
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user may have closed or replaced it
            stream.flush()
    os._exit(code)
