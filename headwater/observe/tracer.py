"""Collects a trace from a running cluster into a file."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

from headwater.errors import ConfigurationError, ConnectionLostError, HeadwaterError, ProtocolError
from headwater.loggers import logger
from headwater.messages import Acknowledged, CollectTrace, Finished, Refused, TraceChunk
from headwater.observe.trace_file import TraceFile
from headwater.spec.seconds import seconds as length_of_time
from headwater.spec.words import option
from headwater.wire.channel import Channel
from headwater.wire.listener import dial
from headwater.wire.security import PLAIN, Security

_log = logger("headwater.trace")

_DIAL_S = 10.0
_LAST_S = 10.0
"""How long nothing may come once the time is over, in seconds."""
_EVER_S = 1e8
_STRANGER = "no trace comes from this address"


def collect(
    address: str, seconds: float, path: str | os.PathLike[str], security: Security = PLAIN
) -> TraceFile:
    """Write what all nodes do for so many seconds to `path`; blocks. Returns what was written.

    Raises:
        ConfigurationError: the file cannot be written.
        HeadwaterError: the coordinator cannot be asked.
    """
    tracer = Tracer(address, path, seconds=length_of_time(option("seconds"), seconds), security=security)
    return tracer.wait()


class Tracer:
    """A trace that is being written, in a thread of its own.

    Args:
        seconds: how long; for ever by default, until `close`.

    Raises:
        ConfigurationError: the file cannot be written.
        HeadwaterError: the coordinator cannot be asked.
    """

    def __init__(
        self,
        address: str,
        path: str | os.PathLike[str],
        *,
        seconds: float = math.inf,
        security: Security = PLAIN,
    ) -> None:
        self._path = Path(path)
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - the thread closes it
        except OSError as error:
            raise ConfigurationError(f"{option('trace')}: cannot write to {path}: {error}") from error
        self._seconds = min(seconds, _EVER_S)
        self._error: HeadwaterError | None = None
        try:
            self._channel: Channel = dial(address, timeout=_DIAL_S, security=security)
            self._channel.send(CollectTrace(self._seconds), timeout=_DIAL_S)
            self._trace = TraceFile(self._file)
        except BaseException:
            self._file.close()
            raise
        self._thread = threading.Thread(target=self._run, name="headwater-tracer", daemon=True)
        self._thread.start()

    def wait(self) -> TraceFile:
        """Block until the time is over and all is written.

        Raises:
            HeadwaterError: the coordinator is gone, or is none.
            ConfigurationError: the file could not be written to its end, as on a full disk.
        """
        self._thread.join(self._seconds)
        written = -1
        while self._thread.is_alive() and self._trace.events > written:  # as long as there is more
            written = self._trace.events
            self._thread.join(_LAST_S)
        self._channel.close()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._trace

    def close(self) -> None:
        """Have everybody tell the last, and write it; blocks for that, for a few seconds at most. Idempotent.

        What went wrong is only logged: what was traced has gone on.
        """
        self._seconds = 0.0
        try:
            self._channel.send(CollectTrace(0.0), timeout=_DIAL_S)
        except ConnectionLostError:
            pass  # it is over already
        try:
            self.wait()
        except HeadwaterError as error:
            _log.warning("the trace in %s is not whole: %s", self._path, error)

    def _run(self) -> None:
        try:
            self._take_all()
        except HeadwaterError as error:
            self._error = error
        except OSError as error:
            self._error = ConfigurationError(
                f"the trace in {self._path} ends before its time: {error}; what was written can be opened"
            )
        finally:
            self._channel.close()
            try:
                self._file.close()
            except OSError:
                pass  # said above

    def _take_all(self) -> None:
        ended = False
        while not ended and (received := self._channel.receive()) is not None:
            message = received.message
            if isinstance(message, TraceChunk):
                self._trace.add(message)
                self._channel.send(Acknowledged(), timeout=_DIAL_S)
            elif isinstance(message, Acknowledged | Finished | Refused):
                ended = True
            else:
                raise ProtocolError(f"{_STRANGER}, which sent {type(message).__name__}")
        self._trace.close()
        if not ended:
            raise ConnectionLostError(f"{_STRANGER}, which ended the connection: is it the coordinator's?")
