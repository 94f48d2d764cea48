"""Which connections are given up: those where the peer's machine acknowledges nothing, and no others."""

import struct

import pytest
from connections import channels

from headwater.wire.liveness import PeerLiveness, is_unanswered


def info(*, retransmits=0, probes=0, unacked=0, quiet_ms=5000):
    """As Linux's tcp_info begins."""
    return struct.pack("=2x2B20xI28xI", retransmits, probes, unacked, quiet_ms)


@pytest.mark.parametrize(
    ("told", "unanswered"),
    [
        (info(), False),
        (info(unacked=3), False),  # on its way
        (info(unacked=3, retransmits=1), True),
        (info(unacked=3, retransmits=4, quiet_ms=10), False),  # a bad line, but somebody answers
        (info(probes=1), False),  # the peer has no room, and is just being asked again
        (info(probes=2), True),
        (info(probes=2, quiet_ms=10), False),
        (info(retransmits=2), False),
    ],
)
def test_what_is_sent_again_and_not_acknowledged_is_unanswered(told, unanswered):
    assert is_unanswered(told) == unanswered


def test_a_channel_is_given_up_after_a_whole_silence_and_not_after_pieces_of_one():
    silent, lively = info(unacked=1, retransmits=2), info()
    with channels("tcp") as (channel, other):
        life = PeerLiveness(20.0)
        assert [life.is_over(channel, silent, now) for now in (0.0, 10.0, 19.0)] == [False] * 3
        assert not life.is_over(channel, lively, 20.0)
        assert [life.is_over(channel, silent, now) for now in (21.0, 40.0, 41.0)] == [False, False, True]
        assert not life.is_over(other, silent, 41.0)


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls"])
def test_a_channel_whose_peer_lives_stays(kind):
    with channels(kind) as pair:
        life = PeerLiveness(0.0)
        for now in range(100):
            life.look(pair, float(now))
        assert all(channel.fileno() >= 0 for channel in pair)
        assert bool(pair[0].acknowledgements()) == (kind != "unix")
        pair[0].keep_alive(30.0)
        pair[0].close()
        pair[0].keep_alive(30.0)
        assert pair[0].acknowledgements() == b""
