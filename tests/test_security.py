"""Strangers, and nodes that were set up differently: each is refused for the right reason, others go on.

Real sockets over loopback throughout. `at` is a listener; a connection of an honest pair is open on it
before each case and still works after it.
"""

import contextlib
import socket
import ssl
import struct
import threading

import msgspec
import pytest
from connections import (
    DEADLINE,
    GREETING,
    HUGE,
    HUGE_HEADER,
    OTHER_VERSION,
    PLAIN,
    TOKEN,
    WITH_BOTH,
    WITH_TLS,
    WITH_TOKEN,
    attended,
    everything,
    linked,
    running,
    stranger,
    talk,
    tls,
    undisturbed,
)

from headwater.errors import ConfigurationError, ProtocolError, RefusedError
from headwater.messages import Ask, Refused
from headwater.wire.frames import Limits, encode
from headwater.wire.greeting import Greeting, Proof
from headwater.wire.handshake_pool import Capacity
from headwater.wire.listener import Listener, dial
from headwater.wire.security import TLS, Security

# ── honest nodes that fit ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "security", [PLAIN, WITH_TOKEN, WITH_TLS, WITH_BOTH], ids=["-", "token", "tls", "both"]
)
def test_nodes_that_were_given_the_same_talk(security):
    with (
        undisturbed(security) as at,
        contextlib.closing(dial(at.address, timeout=DEADLINE, security=security)),
    ):
        at.next_channel().close()


def test_each_node_may_have_a_certificate_of_its_own():
    other = Security(tls=tls(names=("another.example", "127.0.0.1")))
    with attended(security=WITH_TLS) as at, linked(at, other) as pair:
        talk(*pair)


def test_a_secret_shows_in_no_representation():
    assert TOKEN not in repr(WITH_BOTH)


def test_a_token_that_can_be_guessed_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="15 characters can be guessed, expected 16 or more"):
        Security(token="x" * 15)


# ── honest nodes that do not fit: both sides are told ───────────────────────────────────────────

WRONG_TOKEN = Security(token="another token, just as long")
WRONG_BOTH = Security(token=WRONG_TOKEN.token, tls=tls())
EXPIRED = Security(tls=tls(days=-1.0))
FOREIGN = Security(tls=tls(signed_by="theirs", believes="theirs"))
FOREIGN_SHOWN = Security(tls=tls(signed_by="theirs"))
ELSEWHERE = Security(tls=tls(names=("another.example",)))

MISFITS = {
    "wrong token": (WITH_TOKEN, WRONG_TOKEN, "the caller has another token", RefusedError),
    "wrong token under TLS": (WITH_BOTH, WRONG_BOTH, "the caller has another token", RefusedError),
    "no token": (WITH_TOKEN, PLAIN, "the caller has no token, this listener demands one", RefusedError),
    "no token under TLS": (WITH_BOTH, WITH_TLS, "the caller has no token", RefusedError),
    "token for a listener without": (PLAIN, WITH_TOKEN, "this listener has none", RefusedError),
    "plain caller, TLS listener": (WITH_TLS, PLAIN, "the caller comes without TLS", RefusedError),
    "plain token caller, TLS listener": (WITH_BOTH, WITH_TOKEN, "the caller comes without TLS", RefusedError),
    "TLS caller, plain listener": (
        PLAIN,
        WITH_TLS,
        "the peer speaks TLS, which this node was not given",
        RefusedError,
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_nodes_that_were_given_different_things_are_both_told(case):
    listening, calling, reason, kind = MISFITS[case]
    with undisturbed(listening) as at:
        with pytest.raises(kind, match=f"cannot connect to {at.address}: .*{reason}"):
            dial(at.address, timeout=DEADLINE, security=calling)
        assert reason in at.next_refusal()


SHOWN = {
    "expired caller": (
        WITH_TLS,
        EXPIRED,
        "the caller's certificate is not accepted: certificate has expired",
    ),
    "foreign caller": (
        WITH_TLS,
        FOREIGN_SHOWN,
        "the caller's certificate is not accepted: .*the same ca file",
    ),
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_caller_whose_certificate_is_not_accepted_hears_of_it(case):
    listening, calling, reason = SHOWN[case]
    with undisturbed(listening) as at:
        with pytest.raises(RefusedError, match="the listener refuses this node's certificate or TLS, saying"):
            dial(at.address, timeout=DEADLINE, security=calling)
        assert_matches(reason, at.next_refusal())


LISTENERS_SHOWN = {
    "expired listener": (EXPIRED, WITH_TLS, "certificate has expired: make a new one"),
    "foreign listener": (FOREIGN, WITH_TLS, "the same ca file"),
    "another host": (ELSEWHERE, WITH_TLS, "IP address mismatch.*make it with `--host`"),
}


@pytest.mark.parametrize("case", LISTENERS_SHOWN)
def test_a_listener_whose_certificate_is_not_accepted_gets_no_connection(case):
    listening, calling, reason = LISTENERS_SHOWN[case]
    with attended(security=listening) as at:
        with pytest.raises(RefusedError, match=f"the listener's certificate is not accepted: .*{reason}"):
            dial(at.address, timeout=DEADLINE, security=calling)
        assert_matches("refuses this node's certificate|went away during the handshake", at.next_refusal())


def assert_matches(pattern, text):
    with pytest.raises(RefusedError, match=pattern):
        raise RefusedError(text)


def test_a_host_name_must_be_in_the_certificate():
    by_address = Security(tls=tls(names=("127.0.0.1",)))
    with (
        attended(security=by_address) as at,
        pytest.raises(RefusedError, match=r"Hostname mismatch.*`--host` and the name that others dial"),
    ):
        dial(f"tcp:localhost:{at.port}", timeout=DEADLINE, security=WITH_TLS)


@pytest.mark.parametrize("missing", ["ca", "certificate", "key"])
def test_a_file_that_cannot_be_used_is_a_configuration_error(missing, tmp_path):
    (tmp_path / "empty").write_text("")
    for path in (tmp_path / "missing", tmp_path / "empty"):
        files = {name: getattr(tls(), name) for name in ("ca", "certificate", "key")} | {missing: path}
        broken = Security(tls=TLS(**files))
        with pytest.raises(ConfigurationError, match=str(path)):
            Listener("tcp", security=broken)
        with pytest.raises(ConfigurationError, match=str(path)):
            dial("tcp:127.0.0.1:1", timeout=1.0, security=broken)


def test_a_key_of_another_certificate_is_a_configuration_error():
    files = TLS(tls().ca, tls().certificate, tls(days=-1.0).key)
    with pytest.raises(ConfigurationError, match=r"cannot use certificate .* with key"):
        Listener("tcp", security=Security(tls=files))


# ── strangers at our port ───────────────────────────────────────────────────────────────────────

NOT_A_WORD = encode(Ask())
OUT_OF_TURN = encode(Proof(bytes(32)))
SHORT_NONCE = encode(Greeting(b"short", False))

STRANGERS = {
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "the peer speaks HTTP"),
    "noise": (b"\x00\x01\x02\x03", "the peer is not a Headwater node"),
    "another version": (
        OTHER_VERSION,
        "protocol version 2, expected 1: run the same headwater on every node",
    ),
    "2^63 bytes": (HUGE, "announces 10 header bytes, 9223372036854775808 payload bytes"),
    "4 GiB of header": (HUGE_HEADER, "announces 4294967295 header bytes"),
    "no word": (NOT_A_WORD, "is no known word"),
    "a word out of turn": (OUT_OF_TURN, "the caller said Proof out of turn"),
    "a short nonce": (SHORT_NONCE, "a nonce of 5 bytes, expected 32"),
    "nothing": (b"", "it went away during the handshake"),
    "half a word": (GREETING[:40], "it went away during the handshake"),
}


@pytest.mark.parametrize("security", [WITH_TOKEN, WITH_BOTH], ids=["token", "tls"])
@pytest.mark.parametrize("case", STRANGERS)
def test_a_stranger_is_refused_with_the_reason_in_the_log(case, security):
    sent, reason = STRANGERS[case]
    if security.tls is not None and case in ("a word out of turn", "a short nonce"):
        reason = "the caller comes without TLS"
    with undisturbed(security) as at, stranger(at) as bare:
        bare.sendall(sent)
        bare.shutdown(socket.SHUT_WR)
        told = everything(bare)
        assert reason in at.next_refusal()
        assert at.accepted.empty()
        assert not told or b"Refused" in told


def test_a_node_of_another_version_is_told_in_the_frame_that_all_versions_share():
    with undisturbed(PLAIN) as at, stranger(at) as bare:
        bare.sendall(OTHER_VERSION)
        told = everything(bare)
        assert told[:6] == b"HWTR\x01\x00"
        assert "protocol version 2, expected 1" in msgspec.msgpack.decode(told[28:], type=Refused).reason


def test_a_caller_that_trickles_is_cut_off_in_time():
    with undisturbed(WITH_TOKEN, capacity=Capacity(handshake_s=1.0)) as at, stranger(at) as bare:
        stop = threading.Event()

        def trickle():
            for byte in GREETING[:-1]:
                with contextlib.suppress(OSError):
                    bare.send(bytes([byte]))
                if stop.wait(0.02):
                    return

        with running(trickle):
            assert "no whole handshake within 1 s" in at.next_refusal()
            stop.set()


@pytest.mark.parametrize("kind", ["no certificate", "TLS 1.2"])
def test_tls_of_other_programs_is_refused(kind):
    context = ssl.create_default_context(cafile=tls().ca)
    if kind == "TLS 1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    with undisturbed(WITH_TLS) as at, stranger(at) as bare:
        with (
            contextlib.suppress(ssl.SSLError, OSError),
            context.wrap_socket(bare, server_hostname="localhost") as wrapped,
        ):
            wrapped.sendall(b"GET / HTTP/1.1\r\n\r\n")
            wrapped.recv(100)
        reason = "showed no certificate" if kind == "no certificate" else "unsupported protocol"
        assert reason in at.next_refusal()


def test_a_caller_inside_tls_must_still_speak_our_protocol():
    context = ssl.create_default_context(cafile=tls().ca)
    context.load_cert_chain(tls().certificate, tls().key)
    with undisturbed(WITH_TLS) as at, stranger(at) as bare:
        with context.wrap_socket(bare, server_hostname="localhost") as wrapped:
            wrapped.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"Refused" in wrapped.recv(1000)
        assert "the peer speaks HTTP" in at.next_refusal()


@pytest.mark.parametrize("security", [PLAIN, WITH_TLS], ids=["tcp", "tls"])
def test_an_admitted_node_that_announces_too_much_ends_its_connection_only(security):
    with undisturbed(security) as at:
        for prefix in (HUGE, HUGE_HEADER):
            with linked(at, security) as (here, there):
                here._stream.send(prefix)
                with pytest.raises(ProtocolError, match="announces"):
                    there.receive(timeout=DEADLINE)


def test_a_header_takes_no_more_memory_than_came_of_it():
    prefix = struct.pack("<6sHIQQ", GREETING[:6], 0, Limits().header, 0, 0)
    with undisturbed(PLAIN) as at, linked(at, PLAIN) as (here, there):
        here._stream.send(prefix + bytes(100_000))
        with pytest.raises(TimeoutError):
            there.receive(timeout=0.2)
        assert len(there._incoming._buffer) <= 256 << 10
