"""The main function of a process that the local engine started.

It ends with its parent: by the end of its standard input where it is told to end, and where the parent is
killed by the kernel's signal too, which also ends a process that is stopped, or whose pipe another process of
the parent's holds open.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import cloudpickle

from headwater.engines.packing import pack_outcome
from headwater.engines.roles import run_role

_PR_SET_PDEATHSIG = 1
_AT_EXIT_S = 5.0
"""How long functions that were registered with `atexit` may take, in seconds."""

_ending = threading.Lock()
"""Taken by the thread that ends the process, and never given back."""


def main(result: int, parent: int, modules: Sequence[str]) -> None:
    """Run what the parent sends over standard input; write how it ended to descriptor `result`.

    `modules`: imported until it is sent, as far as they can be.
    """
    _end_with(parent)
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):  # both are our own pipe, whatever the user's locale is
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    orders = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(result, False)
    for name in modules:
        with contextlib.suppress(Exception):  # whoever needs it will say so
            importlib.import_module(name)
    try:
        role, rules, start, logs = cloudpickle.load(orders)
    except EOFError:
        os._exit(0)  # it was told to end before it was told what to be
    logs.use()
    threading.Thread(target=_obey, args=(orders,), name="headwater-orders", daemon=True).start()
    outcome = pack_outcome(*run_role(role, rules, start))
    late = f"functions registered with atexit have not returned for {_AT_EXIT_S:g} s: the process ends"
    timer = threading.Timer(_AT_EXIT_S, _end, (result, outcome, late))
    timer.daemon = True
    timer.start()
    atexit._run_exitfuncs()
    _end(result, outcome)


def _end_with(parent: int) -> None:
    """Be killed when the thread that started this process ends, which lives as long as the parent does."""
    before = os.getppid()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(parent, 0)
    except ProcessLookupError:
        os._exit(0)
    if os.getppid() != before:  # it ended before the kernel was asked
        os._exit(0)


def _obey(orders: Any) -> None:
    """End this process when the parent closes the pipe or dies."""
    orders.read()
    os._exit(0)


def _end(result: int, outcome: bytes, why: str = "") -> None:
    """Tell the outcome, after everything that was printed, and end whatever else still runs."""
    with _ending:
        with contextlib.suppress(Exception):  # the user may have replaced or closed them
            if why:
                print(why, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        with os.fdopen(result, "wb") as pipe:
            pipe.write(len(outcome).to_bytes(8) + outcome)
        os._exit(0)
