"""What a process that an engine started does: it is a server, or a worker that runs `train`."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import numpy as np

from headwater.engines.by_value import hand_on_by_value
from headwater.engines.engine import Failure, run_worker
from headwater.kernels import copy_out
from headwater.messages import Assignment
from headwater.runtime.server import ServerNode
from headwater.spec.registry import load_rules
from headwater.wire.endpoint import Endpoint

_SWITCH_S = 0.0005
"""Threads of a server hand the interpreter over quickly: they wait for each other all the time."""


def run_role(role: str, rules: tuple[str, ...], start: Any) -> tuple[Any, Failure | None]:
    """Be a "server" of (coordinator's address, assignment, endpoint), or a "worker" of (address, rank, packed
    train, security), until it ends.

    Returns what `train` returned, or what was raised; a server's end is always a failure.
    """
    try:
        for module in rules:
            load_rules(module)
        if role == "server":
            _serve(*start)
            return None, None
        hand_on_by_value()
        address, rank, train, security = start
        return run_worker(address, rank, cloudpickle.loads(train), security), None
    except BaseException as error:  # noqa: BLE001 - it is handed to the caller of `run`
        return None, Failure.of(error)


def prepare_server() -> None:
    """Have this process serve well: its threads take turns quickly, and the compiler is loaded."""
    sys.setswitchinterval(_SWITCH_S)
    copy_out(np.zeros(0, np.float32), np.zeros(0, np.int64))  # before a worker waits for it


def _serve(address: str, assignment: Assignment, reach: Endpoint) -> None:
    prepare_server()
    node = ServerNode(address, assignment, reach)
    node.start()
    node.wait()
