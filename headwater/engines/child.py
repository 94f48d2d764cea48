"""The main function of a process that the local engine started."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any

import cloudpickle

from headwater.engines.packing import pack_outcome
from headwater.engines.roles import run_role


def main(result: int) -> None:
    """Run what the parent sends over standard input; write how it ended to descriptor `result`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parent = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(result, False)
    role, rules, start = cloudpickle.load(parent)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    outcome = run_role(role, rules, start)
    with os.fdopen(result, "wb") as pipe:
        pipe.write(pack_outcome(*outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with(parent: Any) -> None:
    """End this process when the parent closes the pipe or dies."""
    parent.read()
    os._exit(0)
