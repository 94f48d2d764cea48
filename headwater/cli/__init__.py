"""The command `headwater`: run a script, ask a cluster how it is, measure this machine."""

from __future__ import annotations

import importlib
import signal

__all__ = ["main"]


def main() -> None:
    """Entry point. Until a command is at work there is nothing to end in order: Ctrl-C just ends the
    process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    importlib.import_module("headwater.cli.app").app()
