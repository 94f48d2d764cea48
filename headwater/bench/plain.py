"""The limits: memory and sockets without any protocol, in as many processes."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.bench import peer

Array = NDArray[np.float32]


def shared_vectors(count: int, elements: int) -> list[Array]:
    """`count` vectors of float32[elements] in such memory as windows are; mapped while any of them lives."""
    descriptor = os.memfd_create("headwater-bench")
    try:
        os.posix_fallocate(descriptor, 0, 4 * count * elements)
        memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
    flat = np.frombuffer(memory, dtype=np.float32)
    return [flat[i * elements : (i + 1) * elements] for i in range(count)]


def new_meeting_name() -> str:
    """An abstract socket name that nobody else has."""
    return f"\0headwater-bench-{secrets.token_hex(16)}"


def make_meeting(name: str, rank: int, listening: Callable[[], Any]) -> Callable[[], None]:
    """A function in which two processes wait for each other.

    `listening` is called when rank 0 listens and must return in rank 1 only after it was called in rank 0.
    """
    if rank == 0:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(name)
            server.listen()
            listening()
            other, _ = server.accept()
    else:
        listening()
        other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        other.connect(name)

    def meet() -> None:
        other.sendall(b"x")
        other.recv(1)

    return meet


@contextmanager
def peers(kind: str, count: int, size: int, files: Sequence[str] = ()) -> Iterator[list[tuple[str, int]]]:
    """Addresses and pids of `count` processes that echo `size` bytes, while the block runs.

    `files`: for TLS, of the authority, the certificate and the key.
    """
    with started([sys.executable, "-S", str(Path(peer.__file__)), kind, str(size), *files], count) as told:
        yield told


@contextmanager
def started(command: Sequence[str], count: int) -> Iterator[list[tuple[str, int]]]:
    """The first line and the pid of `count` processes that run `command`, and end with the block."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        yield [(process.stdout.readline().strip(), process.pid) for process in processes if process.stdout]
    finally:
        for process in processes:
            process.communicate()


def connect_peer(address: str) -> socket.socket:
    """A connection to one of `peers`."""
    if address.startswith("@"):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(f"\0{address[1:]}")
        return connection
    host, _, port = address.partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def make_socket_copy(
    addresses: list[str], size: int, context: ssl.SSLContext | None = None
) -> Callable[[], None]:
    """A function that sends `size` bytes to each peer and takes them back, all peers at once."""
    connections = [connect_peer(address) for address in addresses]
    if context is not None:
        connections = [context.wrap_socket(one, server_hostname="localhost") for one in connections]
    outgoing, incoming = ([memoryview(bytearray(size)) for _ in addresses] for _ in range(2))
    pool = ThreadPoolExecutor(len(addresses))

    def there_and_back(index: int) -> None:
        connections[index].sendall(outgoing[index])
        peer.receive_all(connections[index], incoming[index])

    def copy() -> None:
        for _ in pool.map(there_and_back, range(len(addresses))):
            pass  # its errors are raised here

    return copy
