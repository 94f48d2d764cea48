"""What runs in the process of an actor: one node, whose printed lines and end are handed to the driver."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import cloudpickle

from headwater.engines.engine import Failure
from headwater.engines.lines import LineSplitter
from headwater.engines.packing import pack_outcome
from headwater.engines.roles import run_role

Message: TypeAlias = tuple[str, int, str] | list[bytes] | bytes
"""First where the process is: `machine()`, its number and its host's name. Then lines it printed, last its
packed outcome."""

_AHEAD = 1024
"""Lines that wait here to be sent; then whoever prints waits too, as for any pipe."""
_AT_ONCE = 256
_READ = 65_536


def machine() -> str:
    """The same for processes that know each other by number: of one boot and one container. "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{boot.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


class NodeActor:
    """A node. Its method is called once, and the actor is killed afterwards, so nothing is put back."""

    def run(self, start: bytes) -> Iterator[Message]:
        """Be what `start` says."""
        yield machine(), os.getpid(), socket.gethostname()
        messages: queue.Queue[_Line | bytes] = queue.Queue(_AHEAD)
        threading.Thread(target=_node, args=(start, messages.put), name="headwater-node", daemon=True).start()
        lines: list[bytes] = []
        while isinstance(message := messages.get(), _Line):
            lines.append(message.text)
            if messages.empty() or len(lines) == _AT_ONCE:
                yield lines
                lines = []
        if lines:
            yield lines
        yield message


@dataclass(frozen=True, slots=True)
class _Line:
    text: bytes


def _node(start: bytes, put: Callable[[_Line | bytes], None]) -> None:
    """Put an outcome last, whatever happens: the driver waits for it."""
    outcome: tuple[Any, Failure | None]
    try:
        with _captured(put):
            path, role, rules, argument, logs = cloudpickle.loads(start)
            logs.use()
            sys.path.extend(place for place in path if place not in sys.path)
            outcome = run_role(role, rules, argument)
    except BaseException as error:  # noqa: BLE001 - it is handed to the caller of `run`
        outcome = None, Failure.of(error)
    put(pack_outcome(*outcome))


@contextlib.contextmanager
def _captured(put: Callable[[_Line], None]) -> Iterator[None]:
    """Hand over line by line what this process prints, and the processes that it starts.

    What the interpreter says while it crashes could not be handed over any more: it stays in Ray's own log.
    """
    kept = os.dup(1), os.dup(2)
    faulthandler.enable(kept[1])
    receive, send = os.pipe()
    ended, end = os.pipe()
    _redirect(send, send)
    os.close(send)
    relay = threading.Thread(target=_relay, args=(receive, ended, put), name="headwater-output", daemon=True)
    relay.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        _redirect(*kept)
        os.write(end, b"\0")  # not closed: a process that the node forked holds it too
        relay.join()
        os.close(end)


def _redirect(output: int, errors: int) -> None:
    os.dup2(output, 1)
    os.dup2(errors, 2)


def _relay(receive: int, ended: int, put: Callable[[_Line], None]) -> None:
    """Hand over what can be read, until `ended` is written to: processes that the node started are not waited
    for."""
    lines = LineSplitter()
    os.set_blocking(receive, False)
    over = False
    while not over:
        due = lines.due
        wait = None if due is None else max(0.0, due - time.monotonic())
        over = ended in select.select([receive, ended], [], [], wait)[0]
        with contextlib.suppress(BlockingIOError):
            for text in lines.feed(os.read(receive, _READ), time.monotonic()):
                put(_Line(text))
        for text in lines.tick(time.monotonic()):
            put(_Line(text))
    for text in lines.end():
        put(_Line(text))
