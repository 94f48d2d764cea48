"""`--health HOST:PORT`: two pages for the probes of a scheduler, in plain text.

`/live` answers 200 while the node's own parts answer. `/ready` answers 200 when the node can do its part, and
503 otherwise; the text is the reason. Nothing else is told, and nothing can be changed, so no secret is asked
for: a scheduler's probes have none.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from headwater.errors import ConfigurationError, HeadwaterError
from headwater.spec.words import option
from headwater.wire.addresses import split_place

_log = logging.getLogger("headwater.health")

_REQUEST_S = 5.0
_CLIENTS = 8
"""Probes that are answered at a time; further ones are closed."""

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


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    """A thread for each probe, of which there are few."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, host: str, port: int, readiness: Readiness) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self.readiness = readiness
        self._slots = threading.Semaphore(_CLIENTS)
        super().__init__(found[4][:2], _Probe)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """As TCPServer does: HTTPServer also asks for this machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that went away is nobody's concern."""
        _log.debug("a probe of %s ended early", client_address)


class _Probe(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    timeout = _REQUEST_S
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
