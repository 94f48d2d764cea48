"""A small HTTP server beside a node: a thread for each of a few connections, and no more than that."""

from __future__ import annotations

import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from headwater.loggers import logger

_log = logger("headwater.http")

REQUEST_S = 10.0
"""How long a client may take over its request, in seconds."""
CLIENTS = 16
"""Connections served at a time; more are closed at once."""


class BoundedHTTPServer(socketserver.ThreadingMixIn, HTTPServer):
    """Listens from its construction on; a subclass says what a request may ask of it.

    Raises:
        OSError: it cannot listen there.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self._slots = threading.Semaphore(CLIENTS)
        super().__init__(found[4][:2], handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """As TCPServer does: HTTPServer also asks for this machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, where there are not too many already."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve, and make room for the next."""
        try:
            request.settimeout(REQUEST_S)
            super().process_request_thread(self.secured(request), client_address)
        except OSError:  # ssl.SSLError and timeouts are some
            self.handle_error(request, client_address)
            self.shutdown_request(request)
        finally:
            self._slots.release()

    def secured(self, request: socket.socket) -> socket.socket:
        """The connection that is served instead of the one that came; called where it holds up nobody else.

        Raises:
            OSError: it is not to be served.
        """
        return request

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is nothing to worry about."""
        _log.info("a connection of %s ended early", client_address, exc_info=True)
