"""Connected sockets and channels of every kind, listeners that are attended, and certificates, for tests."""

import atexit
import contextlib
import functools
import queue
import shutil
import socket
import struct
import tempfile
import threading
from pathlib import Path

import numpy as np

from headwater.messages import Ask, Pull
from headwater.wire.certificates import new_authority, new_node, write_new
from headwater.wire.channel import Channel
from headwater.wire.encryption import load
from headwater.wire.frames import encode
from headwater.wire.greeting import Greeting
from headwater.wire.handshake import Handshake
from headwater.wire.listener import Listener, dial
from headwater.wire.security import TLS, Security

DEADLINE = 30.0  # seconds; far more than any wait of these tests takes
TOKEN = "a token that all nodes of the tests share"
NAMES = ("localhost", "127.0.0.1", "::1")


@functools.cache
def folder():
    """A folder of this process for certificates, removed at its end."""
    made = Path(tempfile.mkdtemp(prefix="headwater-tests-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def authority(name="ours"):
    """An authority by name, always the same, whose certificate is `folder() / name.pem`."""
    made = new_authority()
    write_new(made, folder() / f"{name}.pem", folder() / f"{name}.key")
    return made


@functools.cache
def tls(*, signed_by="ours", believes="ours", names=NAMES, days=1.0):
    """The TLS files of a node, made once for each set of arguments."""
    authority(believes)
    node = new_node(authority(signed_by), names, days)
    path = folder() / f"{signed_by}-{'-'.join(names).replace(':', '.')}-{days}"
    if not Path(f"{path}.pem").exists():
        write_new(node, Path(f"{path}.pem"), Path(f"{path}.key"))
    return TLS(folder() / f"{believes}.pem", f"{path}.pem", f"{path}.key")


def security(kind):
    """What both sides of a connection of that kind are given."""
    return Security(tls=tls() if kind == "tls" else None)


@contextlib.contextmanager
def sockets(kind):
    """Give two connected sockets."""
    if kind == "unix":
        first, second = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            first = socket.create_connection(server.getsockname())
            second, _ = server.accept()
    with first, second:
        yield first, second


def encrypted(first, second):
    """Make a TLS handshake between two connected sockets; return what frames then travel over."""
    caller = Handshake(None, load(tls(), listening=False), "localhost")
    host = Handshake(None, load(tls(), listening=True), None)
    while not (caller.done and host.done):
        for side, own, other in ((caller, first, second), (host, second, first)):
            data = side.take()
            if data:
                own.sendall(data)
                (host if side is caller else caller).receive(other.recv(len(data), socket.MSG_WAITALL))
    return caller.stream(first), host.stream(second)


@contextlib.contextmanager
def channels(kind, limits=None):
    """Give two connected channels."""
    with sockets(kind) as pair:
        streams = encrypted(*pair) if kind == "tls" else pair
        both = [Channel(stream, limits) for stream in streams]
        yield both
        for channel in both:
            channel.close()


@contextlib.contextmanager
def running(*functions):
    """Run functions in threads while the body runs, and raise what they raised."""
    failures = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


class Attended:
    """A listener whose connections a thread accepts.

    `accepted` and `refused` are queues of channels and reasons.
    """

    def __init__(self, listener, refused):
        self.listener = listener
        self.address = listener.address
        self.port = int(listener.address.rpartition(":")[2]) if ":@" not in listener.address else None
        self.accepted = queue.Queue()
        self.refused = refused

    def accept_all(self):
        while (channel := self.listener.accept()) is not None:
            self.accepted.put(channel)

    def next_channel(self):
        return self.accepted.get(timeout=DEADLINE)

    def next_refusal(self):
        return self.refused.get(timeout=DEADLINE)


@contextlib.contextmanager
def attended(kind="tcp", **settings):
    """Give an `Attended` listener; `settings` as of Listener."""
    refused = queue.Queue()
    listener = Listener("unix" if kind == "unix" else "tcp", on_refused=refused.put, **settings)
    at = Attended(listener, refused)
    with running(at.accept_all):
        try:
            yield at
        finally:
            listener.close()
    while not at.accepted.empty():
        at.accepted.get().close()


@contextlib.contextmanager
def linked(at, security):
    """Give both ends of a connection to an attended listener."""
    with (
        contextlib.closing(dial(at.address, timeout=DEADLINE, security=security)) as here,
        contextlib.closing(at.next_channel()) as there,
    ):
        yield here, there


@contextlib.contextmanager
def undisturbed(security, **settings):
    """Give a listener on which an honest pair talks before and after the body."""
    with attended(security=security, **settings) as at, linked(at, security) as pair:
        talk(*pair)
        yield at
        talk(*pair)


def talk(here, there):
    """Send a payload one way and a message the other."""
    values, got = np.arange(30_000, dtype=np.float32), np.zeros(30_000, np.float32)
    here.send(Pull(1, (0,), 0), buffers=[values])
    there.receive(lambda message, length: [got], timeout=DEADLINE)
    assert np.array_equal(values, got)
    there.send(Ask())
    assert here.receive(timeout=DEADLINE).message == Ask()


@contextlib.contextmanager
def stranger(at):
    """Give a bare socket that is connected to an attended listener."""
    with socket.create_connection(("127.0.0.1", at.port)) as bare:
        bare.settimeout(DEADLINE)
        yield bare


def everything(bare):
    """What the other side says before the connection ends."""
    told = b""
    with contextlib.suppress(ConnectionResetError):
        while data := bare.recv(4096):
            told += data
    return told


PLAIN = Security()
WITH_TOKEN = Security(token=TOKEN)
WITH_TLS = Security(tls=tls())
WITH_BOTH = Security(token=TOKEN, tls=tls())
GREETING = encode(Greeting(bytes(range(32)), False))
OTHER_VERSION = GREETING[:4] + struct.pack("<H", 2) + GREETING[6:]
HUGE = struct.pack("<6sHIQQ", GREETING[:6], 0, 10, 2**63, 0)
HUGE_HEADER = struct.pack("<6sHIQQ", GREETING[:6], 0, 2**32 - 1, 0, 0)
