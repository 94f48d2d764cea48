"""The user's `output` callback, called so that whatever it raises stops neither a run nor the thread that
calls it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from headwater.loggers import logger

_log = logger("headwater.engine")


class Output:
    """Calls `output` with a line at a time, from any thread, never from two at once.

    Characters that its stream cannot encode are escaped. After any other exception of `output` the line is
    lost; the first one is logged with its traceback.
    """

    def __init__(self, output: Callable[[str], None]) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._failed = False

    def __call__(self, line: str) -> None:
        """Hand on one line; blocks while `output` does."""
        try:
            with self._lock:
                self._encoded(line)
        except BaseException:  # noqa: BLE001 - whatever a user's callback raises, SystemExit too
            if not self._failed:
                self._failed = True
                _log.warning("output raised; training goes on, the line is lost: %r", line, exc_info=True)

    def _encoded(self, line: str) -> None:
        try:
            self._output(line)
        except UnicodeEncodeError as error:
            self._output(line.encode(error.encoding, "backslashreplace").decode(error.encoding))


def prefixed(role: str, index: int, line: bytes) -> str:
    """A line as a person sees it: with the name of the node, once."""
    name, text = f"{role} {index}", line.decode(errors="replace").rstrip()
    return f"[{name}] {text.removeprefix(f'{name}: ')}"
