"""Loggers of this package. Their handlers are the user's, and what one raises ends nothing of ours.

`logging` hands an exception of a handler's `emit` on to whoever logs. Here that would be the thread of a
connection, of a lease or of a process that is watched, and training would end, or stand still, for a line.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback

_making = threading.Lock()


class _Logger(logging.Logger):
    """A line whose handler raises is lost, and the first such exception is shown on standard error."""

    _told = False

    def handle(self, record: logging.LogRecord) -> None:
        try:
            super().handle(record)
        except Exception:  # noqa: BLE001 - whatever a user's handler or filter raises
            if not _Logger._told and sys.stderr is not None:
                _Logger._told = True
                print(f"a handler of the logger {self.name!r} raised; its line is lost:", file=sys.stderr)
                traceback.print_exc()


def logger(name: str) -> logging.Logger:
    """The logger of this name, below "headwater"."""
    with _making:
        before = logging.getLoggerClass()
        logging.setLoggerClass(_Logger)
        try:
            found = logging.getLogger(name)
        finally:
            logging.setLoggerClass(before)
    if type(found) is logging.Logger:  # the user was first to ask for it
        found.__class__ = _Logger
    return found
