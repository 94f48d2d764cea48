"""The other end of a plain socket copy: on every connection, takes some bytes and sends as many back.

Run by its path as a program of its own, with the standard library alone, so that it is a limit and not
Headwater: `peer.py tcp|unix|tls BYTES` prints its address and ends at the end of its standard input. For
TLS the paths of the authority's certificate, its own and its key follow.
"""

from __future__ import annotations

import os
import secrets
import socket
import ssl
import sys
import threading


def main(kind: str, size: int, *files: str) -> None:
    """Serve until standard input ends."""
    listening = _listen(kind)
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, *files) if kind == "tls" else None
    print(_name(listening), flush=True)
    threading.Thread(target=_accept, args=(listening, size, context), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


def _listen(kind: str) -> socket.socket:
    if kind != "unix":
        return socket.create_server(("127.0.0.1", 0))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(f"\0headwater-bench-{secrets.token_hex(16)}")
    listening.listen()
    return listening


def _name(listening: socket.socket) -> str:
    name = listening.getsockname()
    return f"@{name[1:].decode()}" if isinstance(name, bytes) else f"{name[0]}:{name[1]}"


def tls_context(side: int, ca: str, certificate: str, key: str) -> ssl.SSLContext:
    """TLS as nodes have it: 1.3, and a certificate of the authority demanded from the other side."""
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ca)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _accept(listening: socket.socket, size: int, context: ssl.SSLContext | None) -> None:
    while True:
        connection, _ = listening.accept()
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        threading.Thread(target=_echo, args=(connection, size), daemon=True).start()


def _echo(connection: socket.socket, size: int) -> None:
    memory = memoryview(bytearray(size))
    while receive_all(connection, memory):
        connection.sendall(memory)


def receive_all(connection: socket.socket, memory: memoryview) -> bool:
    """Fill `memory`; False where the connection ended first."""
    got = 0
    while got < len(memory):
        count = connection.recv_into(memory[got:])
        if not count:
            return False
        got += count
    return True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
