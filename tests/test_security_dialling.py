"""What is dialled may be no node, pretend to be one, or stand between: a caller goes on with none of them."""

import contextlib
import http.server
import socket
import ssl
import threading

import numpy as np
import pytest
from connections import (
    DEADLINE,
    GREETING,
    HUGE,
    OTHER_VERSION,
    PLAIN,
    TOKEN,
    WITH_BOTH,
    WITH_TLS,
    WITH_TOKEN,
    everything,
    linked,
    running,
    stranger,
    talk,
    tls,
    undisturbed,
)

from headwater.errors import ConnectionLostError, ProtocolError, RefusedError
from headwater.messages import Refused
from headwater.wire.frames import encode
from headwater.wire.greeting import Accepted, Challenge, Proof
from headwater.wire.listener import dial

# ── strangers where we dial ─────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def hanging_up(data):
    """Give the address of somebody who hears something, says `data` and says no more."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.settimeout(DEADLINE)
                connection.recv(1000)
                connection.sendall(data)
                with contextlib.suppress(OSError):  # the caller may be gone already
                    connection.shutdown(socket.SHUT_WR)
                everything(connection)

        with running(serve):
            yield f"tcp:127.0.0.1:{server.getsockname()[1]}"


IMPOSTORS = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "the peer speaks HTTP"),
    "TLS": (b"\x15\x03\x03\x00\x02\x02\x0a", ProtocolError, "the peer speaks TLS"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", ProtocolError, "the peer is not a Headwater node"),
    "another version": (OTHER_VERSION, ProtocolError, "protocol version 2, expected 1"),
    "no proof": (encode(Accepted()), RefusedError, "did not prove that it knows the token"),
    "false proof": (
        encode(Challenge(bytes(32))) + encode(Proof(bytes(32))),
        RefusedError,
        "the listener has another token, or this one only pretends to be it",
    ),
    "proof without challenge": (encode(Proof(bytes(32))), ProtocolError, "said Proof out of turn"),
    "2^63 bytes": (HUGE, ProtocolError, "9223372036854775808 payload bytes"),
    "a rude refusal": (
        encode(Refused("RefusedError", "\x1b[2Jgo away\n")),
        RefusedError,
        r"refuses this node: \?\[2Jgo away\?$",
    ),
    "nothing more": (GREETING[:10], ConnectionLostError, "closed the connection during the handshake"),
}


@pytest.mark.parametrize("case", IMPOSTORS)
def test_what_is_no_honest_listener_is_told_from_one(case):
    data, kind, reason = IMPOSTORS[case]
    with hanging_up(data) as address, pytest.raises(kind, match=f"cannot connect to {address}: .*{reason}"):
        dial(address, timeout=DEADLINE, security=WITH_TOKEN)


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "the peer speaks HTTP"),
        (encode(Accepted()), ProtocolError, "speaks without TLS, which this node demands"),
        (encode(Challenge(bytes(32))), ProtocolError, "speaks without TLS, which this node demands"),
    ],
)
def test_a_node_with_tls_goes_on_with_nobody_who_has_none(data, kind, reason):
    with hanging_up(data) as address, pytest.raises(kind, match=reason):
        dial(address, timeout=DEADLINE, security=WITH_BOTH)


@pytest.mark.parametrize("security", [PLAIN, WITH_TLS], ids=["tcp", "tls"])
def test_a_real_web_server_is_told_from_a_node(security):
    class Quiet(http.server.BaseHTTPRequestHandler):
        timeout = 0.2

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(
            (ProtocolError, ConnectionLostError), match=r"Headwater node|closed the connection"
        ):
            dial(f"tcp:127.0.0.1:{server.server_port}", timeout=DEADLINE, security=security)
        thread.join(DEADLINE)


def test_a_listener_that_never_answers_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp:127.0.0.1:{silent.getsockname()[1]}"
        for security in (PLAIN, WITH_TLS):
            with pytest.raises(
                ConnectionLostError, match="no answer to the handshake in time: is it a Headwater"
            ):
                dial(address, timeout=0.5, security=security)


# ── eavesdroppers and men in the middle ─────────────────────────────────────────────────────────


@contextlib.contextmanager
def recorded(at):
    """Give the address of somebody in between, and what goes each way."""
    caller_said, listener_said = bytearray(), bytearray()

    def copy(source, target, record):
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                record.extend(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            caller, _ = server.accept()
            with (
                caller,
                stranger(at) as listener,
                running(lambda: copy(listener, caller, listener_said)),
            ):
                copy(caller, listener, caller_said)

        with running(serve):
            yield f"tcp:127.0.0.1:{server.getsockname()[1]}", caller_said, listener_said


def test_a_token_is_never_sent_and_what_was_sent_is_worth_nothing_again():
    with undisturbed(WITH_TOKEN) as at:
        with recorded(at) as (address, caller_said, listener_said):
            dial(address, timeout=DEADLINE, security=WITH_TOKEN).close()
            at.next_channel().close()
        assert TOKEN.encode() not in caller_said + listener_said
        with stranger(at) as replay:
            replay.sendall(caller_said)
            assert b"Proof" not in everything(replay)
            assert "the caller has another token" in at.next_refusal()
        assert at.accepted.empty()


def test_a_listeners_words_replayed_are_worth_nothing():
    with undisturbed(WITH_TOKEN) as at, recorded(at) as (address, _, listener_said):
        dial(address, timeout=DEADLINE, security=WITH_TOKEN).close()
        at.next_channel().close()
    with (
        hanging_up(bytes(listener_said)) as address,
        pytest.raises(RefusedError, match="the listener has another token, or this one only pretends"),
    ):
        dial(address, timeout=DEADLINE, security=WITH_TOKEN)


def test_with_tls_nothing_readable_is_sent():
    with undisturbed(WITH_BOTH) as at, recorded(at) as (address, caller_said, listener_said):
        with (
            contextlib.closing(dial(address, timeout=DEADLINE, security=WITH_BOTH)) as here,
            contextlib.closing(at.next_channel()) as there,
        ):
            talk(here, there)
        for readable in (b"HWTR", b"Pull", b"Greeting", np.arange(100, dtype=np.float32).tobytes()):
            assert readable not in caller_said + listener_said


def test_bytes_changed_on_the_way_end_a_connection_with_tls():
    with undisturbed(WITH_TLS) as at, linked(at, WITH_TLS) as (here, there):
        here._stream._socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ConnectionLostError, match="lost the connection"):
            there.receive(timeout=DEADLINE)


def test_a_token_is_not_passed_on_by_a_node_in_between_that_has_a_certificate():
    """It may talk to both, but what proves the token to it proves nothing to the other."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(tls().certificate, tls().key)
    theirs.load_verify_locations(tls().ca)
    theirs.verify_mode = ssl.CERT_REQUIRED
    ours = ssl.create_default_context(cafile=tls().ca)
    own = tls(names=("between.example", "127.0.0.1"))
    ours.load_cert_chain(own.certificate, own.key)
    with undisturbed(WITH_BOTH) as at, socket.create_server(("127.0.0.1", 0)) as server:

        def pass_on():
            connection, _ = server.accept()
            with (
                theirs.wrap_socket(connection, server_side=True) as caller,
                stranger(at) as bare,
                ours.wrap_socket(bare, server_hostname="localhost") as listener,
                contextlib.suppress(OSError),
            ):
                for source, target in ((caller, listener), (listener, caller)) * 2:
                    target.sendall(source.recv(4096))

        with running(pass_on):
            address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(RefusedError, match="the caller has another token"):
                dial(address, timeout=DEADLINE, security=WITH_BOTH)
        assert "the caller has another token" in at.next_refusal()
