"""The main function of a process that the local engine started."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any

import cloudpickle
import numpy as np

from headwater.engines.engine import Failure, run_worker
from headwater.kernels import copy_out
from headwater.nodes.server import ServerNode, ServerSettings
from headwater.rules import load_rules

_SWITCH_S = 0.0005
"""Threads of a server hand the interpreter over quickly: they wait for each other all the time."""


def main(result: int) -> None:
    """Run what the parent sends over standard input; write how it ended to descriptor `result`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parent = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(result, False)
    role, rules, start = cloudpickle.load(parent)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    outcome = _run(role, rules, start)
    with os.fdopen(result, "wb") as pipe:
        pipe.write(_dump(*outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with(parent: Any) -> None:
    """End this process when the parent closes the pipe or dies."""
    parent.read()
    os._exit(0)


def _run(role: str, rules: tuple[str, ...], start: Any) -> tuple[Any, Failure | None]:
    try:
        for module in rules:
            load_rules(module)
        if role == "server":
            _serve(start)
            return None, None
        address, rank, train = start
        return run_worker(address, rank, cloudpickle.loads(train)), None
    except BaseException as error:  # noqa: BLE001 - it is handed to the caller of `run`
        return None, Failure.of(error)


def _serve(settings: ServerSettings) -> None:
    sys.setswitchinterval(_SWITCH_S)
    copy_out(np.zeros(0, np.float32), np.zeros(0, np.int64))  # load the compiler before a worker waits for it
    node = ServerNode(settings)
    node.start()
    node.wait()


def _dump(value: Any, failure: Failure | None) -> bytes:
    """Pickle the outcome; an exception or a value that cannot be pickled becomes its text."""
    try:
        dumped: bytes = cloudpickle.dumps((value, failure))
        cloudpickle.loads(dumped)
    except Exception as error:  # noqa: BLE001 - whatever a user's object raises while it is pickled
        if failure is None:
            failure = Failure(f"the value that train returned cannot be pickled: {error}", "", None)
        dumped = cloudpickle.dumps((None, Failure(failure.summary, failure.trace, None)))
    return dumped
