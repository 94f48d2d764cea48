"""`--health HOST:PORT`: two pages for the probes of a scheduler, in plain text.

`/live` answers 200 while the node's own parts answer. `/ready` answers 200 when the node can do its part, and
503 otherwise; the text is the reason. Nothing else is told, and nothing can be changed, so no secret is asked
for: a scheduler's probes have none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from headwater.errors import ConfigurationError, HeadwaterError
from headwater.loggers import logger
from headwater.observe.http_server import REQUEST_S, BoundedHTTPServer
from headwater.spec.words import option
from headwater.wire.addresses import split_place

_log = logger("headwater.health")

Readiness = Callable[[], tuple[bool, str]]
"""Whether a node can do its part, and why (not). Blocks for the node's parts."""


class ProbeServer:
    """Answers probes until it is closed. A context manager.

    Args:
        place: "HOST:PORT" to listen on; port 0 takes a free one.
        readiness: asked for every probe, in a thread of this server.

    Attributes:
        url: where the pages are, without their names.

    Raises:
        ConfigurationError: not a place, or a port in use.
    """

    def __init__(self, place: str, readiness: Readiness) -> None:
        host, port = _split(place)
        try:
            self._server = _Server(host, port, readiness)
        except OSError as error:
            raise ConfigurationError(
                f"{option('health', place)}: cannot listen there: {error}; pass another port, or 0 for a "
                "free one"
            ) from error
        named = f"[{host}]" if ":" in host else host
        self.url = f"http://{named}:{self._server.server_address[1]}"
        _log.info("health: %s/live and %s/ready", self.url, self.url)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="headwater-health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; idempotent."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> ProbeServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _split(place: object) -> tuple[str, int]:
    """Host and port; the port must be said."""
    if isinstance(place, str):
        host, colon, port = place.rpartition(":")
        if colon and host and port.isdigit():
            return split_place(f"{host}:{port}")
    raise ConfigurationError(f"{option('health')}: got {place!r}, expected HOST:PORT, such as 127.0.0.1:8080")


class _Server(BoundedHTTPServer):
    """Knows whom to ask."""

    def __init__(self, host: str, port: int, readiness: Readiness) -> None:
        self.readiness = readiness
        super().__init__(host, port, _Probe)


class _Probe(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    timeout = REQUEST_S
    server_version, sys_version = "headwater", ""

    def do_GET(self) -> None:
        if self.path not in ("/live", "/ready"):
            self._answer(404, "there are /live and /ready")
            return
        try:
            ready, why = self.server.readiness()
        except HeadwaterError as error:
            self._answer(503, str(error))
            return
        self._answer(200 if ready or self.path == "/live" else 503, why)

    do_HEAD = do_GET

    def _answer(self, status: int, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        """Probes come each second: they are not logged."""
