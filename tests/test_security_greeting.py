"""The greeting without sockets: who shares a token is admitted, and a proof is worth nothing elsewhere."""

import pytest
from connections import HUGE_HEADER, tls
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import ProtocolError, RefusedError
from headwater.wire.encryption import load
from headwater.wire.frames import encode
from headwater.wire.greeting import (
    NO_BINDING,
    Caller,
    Challenge,
    Greeting,
    HandshakeDecoder,
    Host,
    Proof,
    binding,
    printable,
)
from headwater.wire.handshake import Handshake

tokens = st.none() | st.text(min_size=16, max_size=20)
nonces = st.binary(min_size=32, max_size=32)
A, B = bytes(32), bytes([1]) * 32


def converse(caller, host):
    """Carry words between both until the caller says no more."""
    said = caller.begin()
    while said is not None:
        said = caller.receive(host.receive(said))


@given(tokens, nonces, nonces, nonces)
def test_both_sides_with_the_same_token_admit_each_other(token, mine, yours, bound):
    caller, host = Caller(token, mine, bound), Host(token, yours, bound)
    converse(caller, host)
    assert caller.done
    assert host.done


@given(tokens, tokens, nonces, nonces)
def test_different_tokens_never_admit(mine, yours, nonce, other):
    if mine == yours:
        return
    caller, host = Caller(mine, nonce, NO_BINDING), Host(yours, other, NO_BINDING)
    with pytest.raises(RefusedError):
        converse(caller, host)
    assert not caller.done
    assert not host.done


def proofs(caller_nonce=A, host_nonce=B, bound=NO_BINDING):
    """The caller's proof and the listener's of one conversation."""
    caller, host = Caller("t" * 16, caller_nonce, bound), Host("t" * 16, host_nonce, bound)
    proof = caller.receive(host.receive(caller.begin()))
    return proof, host.receive(proof)


def test_a_proof_holds_for_its_nonces_its_ends_and_its_role_only():
    made = [
        *proofs(),
        *proofs(caller_nonce=B, host_nonce=A),
        *proofs(caller_nonce=B),
        *proofs(bound=binding(b"listener", b"caller")),
        *proofs(bound=binding(b"caller", b"listener")),
    ]
    assert len({proof.mac for proof in made}) == len(made)


def test_a_listeners_proof_sent_back_is_refused():
    first, _ = proofs()
    caller = Caller("t" * 16, A, NO_BINDING)
    caller.begin()
    caller.receive(Challenge(B))
    with pytest.raises(RefusedError, match="only pretends"):
        caller.receive(first)  # its own


GREETED = [Greeting(A, True)]


@pytest.mark.parametrize(
    ("before", "word"),
    [([], Proof(A)), ([], Challenge(A)), (GREETED, Greeting(A, True)), (GREETED, Challenge(A))],
)
def test_a_listener_hears_nothing_out_of_turn(before, word):
    host = Host("t" * 16, B, NO_BINDING)
    for earlier in before:
        host.receive(earlier)
    with pytest.raises(ProtocolError, match="out of turn"):
        host.receive(word)


@given(st.lists(st.integers(1, 60), min_size=1))
def test_words_arrive_whole_however_they_are_cut(cuts):
    said = [Greeting(A, True), Challenge(B), Proof(A)]
    data, words, heard = b"".join(map(encode, said)), HandshakeDecoder(), []
    turn = 0
    while data:
        count = min(cuts[turn % len(cuts)], words.wanted)
        word = words.feed(data[:count])
        data, turn = data[count:], turn + 1
        if word is not None:
            heard.append(word)
    assert heard == said


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_is_no_frame_is_refused_with_its_first_wrong_byte(count):
    words = HandshakeDecoder()
    with pytest.raises(ProtocolError, match="is not a Headwater node"):
        words.feed((b"HWT"[: count - 1] + b"!")[:count])


def test_words_of_strangers_reach_a_terminal_harmless_and_short():
    assert printable("\x1b[31mred\x07\n" + "x" * 5000) == "?[31mred??" + "x" * 590


def test_proofs_are_compared_in_a_time_that_tells_nothing(monkeypatch):
    compared = []

    def compare_digest(one, other):
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare_digest)
    converse(Caller("t" * 16, A, NO_BINDING), Host("t" * 16, B, NO_BINDING))
    assert compared == [(32, 32)] * 2


def test_a_handshake_of_more_than_128_kb_is_refused_though_tls_would_take_more():
    """One first word, as long as TLS allows, in pieces as large as TLS allows."""
    host = Handshake(None, load(tls(), listening=True), None)
    hello = b"\x01" + (131_396).to_bytes(3, "big") + bytes(131_396)
    pieces = [hello[at : at + 16_384] for at in range(0, len(hello), 16_384)]
    with pytest.raises(ProtocolError, match="a handshake of more than 131072 bytes"):
        feed(host, b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces))


def test_a_word_that_announces_more_than_any_has_is_refused_before_it_came():
    with pytest.raises(ProtocolError, match="announces 4294967295 header bytes"):
        feed(Handshake(None, None, None), HUGE_HEADER)


def feed(side, data):
    """Give it all of these bytes, as many at a time as it takes."""
    while data:
        taken, data = data[: side.wanted], data[side.wanted :]
        side.receive(taken)
