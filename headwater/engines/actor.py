"""What runs in the process of an actor: one node, whose printed lines and end are handed to the driver."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import cloudpickle

from headwater.engines.engine import Failure
from headwater.engines.packing import pack_outcome
from headwater.engines.roles import run_role

Message: TypeAlias = tuple[str, int] | list[str] | bytes
"""First where the process is: `machine()` and its number. Then lines it printed, last its packed outcome."""

_AHEAD = 1024
"""Lines that wait here to be sent; then whoever prints waits too, as for any pipe."""
_AT_ONCE = 256
_DRAIN_S = 1.0
"""How long a process that the node started may keep its output open once the node has ended, in seconds."""


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
        yield machine(), os.getpid()
        messages: queue.Queue[str | bytes] = queue.Queue(_AHEAD)
        threading.Thread(target=_node, args=(start, messages.put), name="headwater-node", daemon=True).start()
        lines: list[str] = []
        while isinstance(message := messages.get(), str):
            lines.append(message)
            if messages.empty() or len(lines) == _AT_ONCE:
                yield lines
                lines = []
        if lines:
            yield lines
        yield message


def _node(start: bytes, put: Callable[[str | bytes], None]) -> None:
    """Put an outcome last, whatever happens: the driver waits for it."""
    outcome: tuple[Any, Failure | None]
    try:
        with _captured(put):
            logging.basicConfig(level=logging.WARNING, format="%(message)s")
            path, role, rules, argument = cloudpickle.loads(start)
            sys.path.extend(place for place in path if place not in sys.path)
            outcome = run_role(role, rules, argument)
    except BaseException as error:  # noqa: BLE001 - it is handed to the caller of `run`
        outcome = None, Failure.of(error)
    put(pack_outcome(*outcome))


@contextlib.contextmanager
def _captured(put: Callable[[str], None]) -> Iterator[None]:
    """Hand over line by line what this process prints, and the processes that it starts.

    What the interpreter says while it crashes could not be handed over any more: it stays in Ray's own log.
    """
    kept = os.dup(1), os.dup(2)
    faulthandler.enable(kept[1])
    receive, send = os.pipe()
    _redirect(send, send)
    os.close(send)
    relay = threading.Thread(target=_relay, args=(receive, put), name="headwater-output", daemon=True)
    relay.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        _redirect(*kept)
        relay.join(_DRAIN_S)


def _redirect(output: int, errors: int) -> None:
    os.dup2(output, 1)
    os.dup2(errors, 2)


def _relay(receive: int, put: Callable[[str], None]) -> None:
    with os.fdopen(receive, "rb") as stream:
        for line in stream:
            put(line.decode(errors="replace").rstrip())
