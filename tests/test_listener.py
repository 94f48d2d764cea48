"""Listening and dialling: addresses, admission, limits, and ends, on Unix sockets, TCP and TLS."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest
from connections import (
    DEADLINE,
    WITH_TLS,
    WITH_TOKEN,
    attended,
    linked,
    running,
    security,
    sockets,
    talk,
    undisturbed,
)
from waiting import wait_until

from headwater.errors import ConfigurationError, ConnectionLostError, RefusedError
from headwater.messages import Answer, Pull, Refused, Step
from headwater.wire.addresses import advertised
from headwater.wire.frames import encode
from headwater.wire.greeting import Greeting
from headwater.wire.handshake_pool import Capacity
from headwater.wire.listener import Listener, dial
from headwater.wire.refusals import RefusalLog
from headwater.wire.security import Security

PULL = Pull(number=1, models=(0,), have=4)
ANSWER = Answer(number=1, version=5)


@pytest.fixture(params=["unix", "tcp", "tls"])
def kind(request):
    return request.param


@pytest.fixture
def at(kind):
    with attended(kind, security=security(kind)) as at:
        yield at


def call(at, kind="tcp", **settings):
    """Dial an attended listener as its honest callers do; gives a channel that closes itself."""
    return contextlib.closing(dial(at.address, timeout=DEADLINE, security=security(kind), **settings))


def test_a_listener_can_be_dialled_by_its_address(kind, at):
    pattern = "unix:@hw-" if kind == "unix" else "tcp:127.0.0.1:"
    assert at.address.startswith(pattern)
    with call(at, kind) as here, contextlib.closing(at.next_channel()) as there:
        here.send(PULL, request=1)
        assert there.receive(timeout=DEADLINE).message == PULL
        there.send(ANSWER, request=1)
        assert here.receive(timeout=DEADLINE).message == ANSWER
        assert here.peer == (f"unix pid {os.getpid()}" if kind == "unix" else at.address)


def test_the_listening_side_may_speak_first(kind, at):
    with call(at, kind) as here, contextlib.closing(at.next_channel()) as there:
        there.send(ANSWER, request=1)
        there.send(PULL, request=2)
        assert here.receive(timeout=DEADLINE).message == ANSWER
        assert here.receive(timeout=DEADLINE).message == PULL


def test_closing_wakes_a_blocked_accept(kind):
    listener = Listener("unix" if kind == "unix" else "tcp", security=security(kind))
    entered = threading.Event()
    result = []

    def accept():
        entered.set()
        result.append(listener.accept())

    with running(accept):
        entered.wait(DEADLINE)
        listener.close()
    assert result == [None]
    assert listener.accept() is None
    listener.close()
    with pytest.raises(ConnectionLostError, match=listener.address):
        dial(listener.address, timeout=1.0)


def test_a_listener_may_be_closed_by_what_it_tells_of_a_refusal():
    reasons = []

    def close(reason):
        reasons.append(reason)
        listener.close()

    listener = Listener("tcp", on_refused=close)
    port = int(listener.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"x" * 100)
        assert listener.accept() is None
    assert len(reasons) == 1


def test_connections_that_nobody_took_are_closed_with_the_listener(kind):
    listener = Listener("unix" if kind == "unix" else "tcp", security=security(kind))
    with running(lambda: listener.accept().close()):
        channels = [dial(listener.address, timeout=DEADLINE, security=security(kind)) for _ in range(1)]
    listener.close()
    for channel in channels:
        assert channel.receive(timeout=DEADLINE) is None
        channel.close()


def test_two_listeners_never_share_a_name():
    with contextlib.closing(Listener("unix")) as one, contextlib.closing(Listener("unix")) as other:
        assert one.address != other.address
        assert len(one.address) == len("unix:@hw-") + 8


def test_a_refused_user_is_reported_and_the_next_one_accepted(monkeypatch):
    with attended("unix") as at:
        with monkeypatch.context() as patched:
            patched.setattr("headwater.wire.listener.Security.admit", refuse_once())
            first = contextlib.closing(socket.socket(socket.AF_UNIX))
            with first as bare:
                bare.connect("\0" + at.address.removeprefix("unix:@"))
                assert bare.recv(1) == b""
        assert at.next_refusal() == f"{at.address}: the first is never right"
        with call(at, "unix"):
            at.next_channel().close()


def refuse_once():
    def admit(self, connection):
        raise RefusedError("the first is never right")

    return admit


def test_another_user_is_refused_on_both_sides(monkeypatch):
    with contextlib.closing(Listener("unix")) as listener:
        monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
        with pytest.raises(RefusedError, match="belongs to user"):
            dial(listener.address, timeout=DEADLINE)
    with (
        sockets("unix") as (one, _),
        pytest.raises(RefusedError, match=f"process {os.getpid()} belongs to user"),
    ):
        Security().admit(one)


# ── addresses ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_listening_beyond_loopback_is_refused(host):
    with pytest.raises(ConfigurationError, match="not authenticated: give every node tls or a token"):
        Listener("tcp", host=host)


@pytest.mark.parametrize("allowed", [Security(token="x" * 16), Security(insecure=True)])
def test_listening_beyond_loopback_takes_a_token_or_an_explicit_word(allowed):
    with attended(host="0.0.0.0", security=allowed) as at:
        address = at.address.replace("0.0.0.0", "127.0.0.1")
        with contextlib.closing(dial(address, timeout=DEADLINE, security=allowed)):
            at.next_channel().close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_may_be_listened_on(host):
    Security().check_bind(host)


def test_a_port_that_is_taken_is_a_configuration_error():
    with (
        contextlib.closing(Listener("tcp")) as listener,
        pytest.raises(ConfigurationError, match=r"cannot listen on tcp:127\.0\.0\.1:"),
    ):
        Listener("tcp", port=int(listener.address.rpartition(":")[2]))


def needs_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 loopback")


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_ipv6_addresses_stand_in_brackets(kind):
    needs_ipv6()
    with attended(host="::1", security=security(kind)) as at:
        assert at.address.startswith("tcp:[::1]:")
        with call(at, kind) as channel:
            assert channel.peer == at.address
            at.next_channel().close()


def test_a_listener_on_all_addresses_takes_both_kinds():
    needs_ipv6()
    with attended(host="::", security=Security(insecure=True)) as at:
        for host in ("127.0.0.1", "[::1]", "localhost"):
            with contextlib.closing(dial(f"tcp:{host}:{at.port}", timeout=DEADLINE)):
                at.next_channel().close()


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_host_names_can_be_dialled(kind):
    with (
        attended(security=security(kind)) as at,
        contextlib.closing(dial(f"tcp:localhost:{at.port}", timeout=DEADLINE, security=security(kind))),
    ):
        at.next_channel().close()


@pytest.mark.parametrize(
    "address",
    [
        "",
        "unix:",
        "tcp:",
        "tcp:host",
        "tcp::80",
        "tcp:host:port",
        "tcp:h:70000",
        "x:y",
        "tcp:a..b:1",
        "tcp:.a:1",
    ],
)
def test_what_is_no_address_is_a_configuration_error(address):
    with pytest.raises(ConfigurationError, match=r"is not one of unix:@name, unix:/path, tcp:host:port"):
        dial(address, timeout=1.0)


@pytest.mark.parametrize("address", ["unix:@headwater-nobody", "tcp:127.0.0.1:1"])
def test_nobody_at_an_address_is_a_lost_connection(address):
    with pytest.raises(ConnectionLostError, match=f"cannot connect to {address}"):
        dial(address, timeout=5.0)


@pytest.mark.parametrize(
    ("bound", "settings", "expected"),
    [
        ("unix:@headwater-x", {"host": "node7"}, "unix:@headwater-x"),
        ("tcp:10.1.2.3:4000", {}, "tcp:10.1.2.3:4000"),
        ("tcp:0.0.0.0:4000", {"host": "node7"}, "tcp:node7:4000"),
        ("tcp:127.0.0.1:4000", {"host": "node7"}, "tcp:node7:4000"),
        ("tcp:[::]:4000", {"host": "fd00::7"}, "tcp:[fd00::7]:4000"),
        ("tcp:0.0.0.0:4000", {"towards": "tcp:127.0.0.1:9"}, "tcp:127.0.0.1:4000"),
    ],
)
def test_what_is_advertised_is_what_others_reach(bound, settings, expected):
    assert advertised(bound, **settings) == expected


def test_an_address_that_leads_nowhere_must_be_named():
    with pytest.raises(ConfigurationError, match="name a host to advertise"):
        advertised("tcp:0.0.0.0:4000", towards="tcp:name.invalid:9")


def test_keep_alive_is_on_at_both_ends():
    with attended() as at, call(at) as here, contextlib.closing(at.next_channel()) as there:
        for channel in (here, there):
            assert channel._stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert channel._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


def test_connections_beyond_the_limit_are_refused_and_closed_ones_make_room(kind):
    with attended(kind, security=security(kind), capacity=Capacity(connections=2)) as at:
        with call(at, kind) as one, call(at, kind):
            held = [at.next_channel(), at.next_channel()]
            for _ in range(3):
                refused_at(at, kind)
                assert at.next_refusal().endswith("2 connections are open already")
            one.send(PULL)
            assert held[0].receive(timeout=DEADLINE).message == PULL
            held[0].close()
            with call(at, kind):
                at.next_channel().close()
        held[1].close()


def refused_at(at, kind):
    """Dial a listener that is full; over TCP the caller is told while it dials."""
    if kind == "unix":
        with call(at, kind) as channel:
            refusal = channel.receive(timeout=DEADLINE).message
            assert refusal == Refused("RefusedError", "2 connections are open already")
            assert channel.receive(timeout=DEADLINE) is None
        return
    with pytest.raises(RefusedError, match="2 connections are open already"):
        dial(at.address, timeout=DEADLINE, security=security(kind))


def test_too_many_handshakes_push_out_the_oldest_and_never_an_honest_one():
    with attended(capacity=Capacity(handshakes=3)) as at, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(at)) for _ in range(6)]
        for _ in range(3):
            assert "of handshake, and others wait" in at.next_refusal()
        for one in silent[:3]:
            one.settimeout(5.0)  # half of what a silent handshake may take
            assert one.recv(100) == b""
        assert select.select(silent[3:], [], [], 0)[0] == []
        with call(at):
            at.next_channel().close()


def connected(at):
    stranger = socket.create_connection(("127.0.0.1", at.port))
    stranger.settimeout(DEADLINE)
    return stranger


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_hundreds_of_idle_connections_disturb_nobody(kind):
    with (
        attended(security=security(kind), capacity=Capacity(handshakes=300)) as at,
        contextlib.ExitStack() as stack,
    ):
        for number in range(300):
            stranger = stack.enter_context(connected(at))
            stranger.sendall(b"\x16\x03\x01"[: number % 4] if kind == "tls" else b"HWTR"[: number % 5])
        with call(at, kind) as here, contextlib.closing(at.next_channel()) as there:
            here.send(PULL)
            assert there.receive(timeout=DEADLINE).message == PULL


@pytest.mark.parametrize("given", [WITH_TOKEN, WITH_TLS], ids=["token", "tls"])
def test_thousands_of_connections_leave_the_listener_alive(given):
    """More than it takes at a time, in every state in which a stranger may leave them."""
    beginnings = [b"", b"HWTR", encode(Greeting(bytes(32), True)), b"\x16\x03\x01\x02\x00\x01", b"GET /"]
    with undisturbed(given, capacity=Capacity(connections=20, handshakes=50)) as at:
        for start in range(40):
            with contextlib.ExitStack() as stack:
                for number in range(60):
                    stranger = stack.enter_context(connected(at))
                    stranger.sendall(beginnings[(start + number) % len(beginnings)])
        with linked(at, given) as pair:
            talk(*pair)
        assert at.accepted.empty()
        assert len(at.listener._known) <= 20
        assert len(at.listener._reception._guests) <= 50


def test_a_process_without_descriptors_refuses_and_goes_on():
    program = """
import resource
from headwater.wire.listener import Listener
listener = Listener("tcp", on_refused=lambda reason: print(reason, flush=True))
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
print(listener.address, flush=True)
while True:
    channel = listener.accept()
    print("accepted", flush=True)
    channel.close()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ends(process):
        address = process.stdout.readline().strip()
        host, port = address.removeprefix("tcp:").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                with contextlib.suppress(ConnectionResetError):
                    stack.enter_context(socket.create_connection((host, int(port))))
            assert "no descriptors left for it" in process.stdout.readline()
        wait_until(lambda: is_let_in(address))  # it may still have to hear that the others are gone
        while (line := process.stdout.readline()) != "accepted\n":
            assert line  # of the others, why they were refused


@contextlib.contextmanager
def ends(process):
    """Kills the process however the body ends."""
    try:
        yield
    finally:
        process.kill()


def is_let_in(address):
    try:
        dial(address, timeout=DEADLINE).close()
    except (ConnectionLostError, RefusedError):
        return False
    return True


def test_a_flood_of_refusals_is_counted_instead_of_logged(caplog):
    now = [0.0]
    log = RefusalLog(clock=lambda: now[0])
    for _ in range(1000):
        log("no")
    assert len(caplog.records) == 21
    now[0] = 61.0
    log("yes")
    assert [record.getMessage() for record in caplog.records[21:]] == [
        "and 980 more connections were refused",
        "connection refused: yes",
    ]


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def test_a_forked_child_does_not_keep_the_connections_of_a_killed_parent_open():
    program = """
import os, sys
from headwater.messages import Step
from headwater.wire.channel import Channel
from headwater.wire.listener import Listener, dial
channel = dial(sys.argv[1], timeout=30)
listener = Listener("unix")
before = channel.fileno()
child = os.fork()
if child == 0:
    assert channel.fileno() == -1
    assert listener.accept() is None
    channel.close()
    listener.close()
    print("child", flush=True)
    sys.stdin.read()
    os._exit(0)
channel.send(Step(number=1, step=1, seen=0, carried=(), settings=(), read=False))
channel.receive()
"""
    with contextlib.closing(Listener("unix")) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", program, listener.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process, contextlib.closing(listener.accept()) as channel:
            assert isinstance(channel.receive(timeout=DEADLINE).message, Step)
            assert process.stdout.readline() == "child\n"
            assert channel.peer == f"unix pid {process.pid}"
            process.send_signal(signal.SIGKILL)
            process.wait(DEADLINE)
            assert channel.receive(timeout=DEADLINE) is None  # though the child lives on
            process.stdin.close()
            assert process.stdout.read() == ""  # and now has ended, without an error


def test_a_forked_child_does_not_keep_handshakes_of_its_parent_open():
    with attended() as at, connected(at) as stranger:
        stranger.sendall(b"HW")
        with call(at):
            at.next_channel().close()  # so the stranger's handshake has begun
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, bytes([len(at.listener._reception._guests)]))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 1) == b"\0"
        os.close(reading)
        os.close(writing)
        assert len(at.listener._reception._guests) == 1
