"""Channels: frames arrive whole, in order and once, whatever the sockets do; descriptors never leak."""

import contextlib
import os
import socket
import threading
import time

import numpy as np
import pytest
from connections import DEADLINE, channels, running, sockets
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater.errors import (
    ConnectionLostError,
    ProtocolError,
    RefusedError,
    StalledError,
)
from headwater.messages import Answer, Ask, Pull, Refused, Waiting
from headwater.wire.channel import Channel, Outgoing
from headwater.wire.exchange import exchange
from headwater.wire.frames import Limits, encode

PULL = Pull(number=1, models=(0,), have=4)
ANSWER = Answer(number=1, version=5)


@pytest.fixture(params=["unix", "tcp", "tls"])
def kind(request):
    return request.param


@pytest.fixture
def pair(kind):
    with channels(kind) as pair:
        yield pair


@pytest.fixture(params=["unix", "tcp"])
def wires(request):
    """A bare socket, and a channel at its other end."""
    with sockets(request.param) as (bare, other):
        channel = Channel(other)
        yield bare, channel
        channel.close()


def room(array):
    """Return a `place` that takes every payload into `array`."""
    return lambda message, length: [array]


def frame_of(values, request=0):
    """Return a whole frame with `values` as payload."""
    return encode(PULL, request=request, payload_length=values.nbytes) + values.tobytes()


# ── one frame after the other ───────────────────────────────────────────────────────────────────


def test_frames_arrive_equal_and_in_order(pair):
    sender, receiver = pair
    sender.send(PULL, request=7)
    sender.send(ANSWER, request=2**64 - 1)
    first, second = receiver.receive(timeout=DEADLINE), receiver.receive()
    assert (first.message, first.request, first.payload_length, first.descriptors) == (PULL, 7, 0, [])
    assert (second.message, second.request) == (ANSWER, 2**64 - 1)


def test_a_payload_lands_in_the_arrays_it_was_asked_for(pair):
    sender, receiver = pair
    values = np.arange(12, dtype=np.float32)
    target = [np.zeros((2, 2), np.float32), np.zeros(0, np.float32), memoryview(np.zeros(8, np.float32))]
    asked = []

    def place(message, length):
        asked.append((message, length))
        return target

    sender.send(PULL, buffers=[values[:5], values[5:5], values[5:].reshape(7, 1)])
    received = receiver.receive(place)
    assert asked == [(PULL, 48)]
    assert received.payload_length == 48
    assert np.array_equal(np.concatenate([target[0].ravel(), np.asarray(target[2])]), values)


def test_many_arrays_larger_than_the_buffers_arrive_equal(pair):
    sender, receiver = pair
    values = np.arange(3_000_000, dtype=np.float32)
    target = np.zeros_like(values)
    with running(lambda: sender.send(PULL, buffers=np.array_split(values, 300), timeout=DEADLINE)):
        receiver.receive(lambda message, length: np.array_split(target, 170), timeout=DEADLINE)
    assert np.array_equal(target, values)


def test_a_header_larger_than_the_read_ahead_arrives_between_small_ones(pair):
    sender, receiver = pair
    large = Waiting(number=1, reason="x" * 300_000)

    def send():
        for message in (PULL, large, ANSWER, large, large, PULL):
            sender.send(message, timeout=DEADLINE)

    with running(send):
        for message in (PULL, large, ANSWER, large, large, PULL):
            assert receiver.receive(timeout=DEADLINE).message == message


def test_a_frame_may_be_cut_at_every_byte(wires):
    bare, channel = wires
    values = np.arange(16, dtype=np.float32)
    frame = frame_of(values, request=3)
    for cut in range(1, len(frame)):
        target = np.zeros_like(values)
        bare.sendall(frame[:cut])
        with pytest.raises(TimeoutError):
            channel.receive(room(target), timeout=0)
        bare.sendall(frame[cut:])
        assert channel.receive(room(target), timeout=DEADLINE).request == 3
        assert np.array_equal(target, values)


@examples(60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.lists(st.integers(1, 90), min_size=1, max_size=30),
)
def test_a_stream_may_be_cut_anywhere(lengths, cuts):
    payloads = [np.arange(length, dtype=np.float32) + index for index, length in enumerate(lengths)]
    stream = b"".join(frame_of(values, request) for request, values in enumerate(payloads))
    arrived = []

    def place(message, length):
        arrived.append(np.zeros(length // 4, np.float32))
        return [arrived[-1]]

    with sockets("unix") as (bare, other):
        channel = Channel(other)
        requests = []
        for cut in [*cuts, len(stream)]:
            bare.sendall(stream[:cut])
            stream = stream[cut:]
            with contextlib.suppress(TimeoutError):
                while True:
                    requests.append(channel.receive(place, timeout=0).request)
        channel.close()
    assert requests == list(range(len(payloads)))
    assert all(map(np.array_equal, arrived, [values for values in payloads if values.size]))


def test_threads_that_send_at_once_do_not_mix_their_frames(pair):
    sender, receiver = pair
    count, senders = 40, 4

    def send(index):
        for number in range(count):
            sender.send(Ask(), request=index, buffers=[np.full(9000 + number, index, np.float32)])

    seen = [0] * senders
    with running(*[lambda index=index: send(index) for index in range(senders)]):
        for _ in range(count * senders):
            arrived = []
            received = receiver.receive(
                lambda message, length, arrived=arrived: (
                    arrived.append(np.empty(length // 4, np.float32)) or arrived
                ),
                timeout=DEADLINE,
            )
            assert (arrived[0] == received.request).all()
            assert arrived[0].size == 9000 + seen[received.request]
            seen[received.request] += 1
    assert seen == [count] * senders


def test_a_channel_is_read_and_written_by_two_threads_at_once_at_both_ends(pair):
    count, values = 6, np.arange(1_000_000, dtype=np.float32)

    def send(channel):
        for number in range(count):
            channel.send(PULL, request=number, buffers=[values + number], timeout=DEADLINE)

    def receive(channel):
        got = np.zeros_like(values)
        for number in range(count):
            assert channel.receive(room(got), timeout=DEADLINE).request == number
            assert np.array_equal(got, values + number)

    with running(*[lambda side=side, do=do: do(side) for side in pair for do in (send, receive)]):
        pass


# ── ends ────────────────────────────────────────────────────────────────────────────────────────


def test_the_end_between_two_frames_is_none(pair):
    sender, receiver = pair
    sender.send(PULL)
    sender.close()
    assert receiver.receive(timeout=DEADLINE).message == PULL
    assert receiver.receive(timeout=DEADLINE) is None
    assert receiver.receive(timeout=DEADLINE) is None


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_the_end_inside_a_frame_is_a_lost_connection(kind):
    values = np.ones(16, np.float32)
    frame = frame_of(values)
    for cut in (1, 27, 28, 40, len(frame) - 64, len(frame) - 1):
        with sockets(kind) as (bare, other):
            channel = Channel(other)
            bare.sendall(frame[:cut])
            bare.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionLostError, match=channel.peer):
                channel.receive(room(np.empty_like(values)), timeout=DEADLINE)
            with pytest.raises(ConnectionLostError, match="nothing more can be read"):
                channel.receive(timeout=DEADLINE)
            channel.close()


def test_closing_wakes_a_blocked_reader(pair):
    channel, other = pair
    entered = threading.Event()
    result = []

    def read():
        entered.set()
        result.append(channel.receive())

    with running(read):
        entered.wait(DEADLINE)
        channel.close()
    assert result == [None]
    assert channel.fileno() == -1
    assert other.receive(timeout=DEADLINE) is None
    channel.close()


def test_closing_wakes_a_blocked_sender(pair):
    channel, _ = pair
    entered = threading.Event()

    def send():
        entered.set()
        with pytest.raises(ConnectionLostError):
            channel.send(PULL, buffers=[np.zeros(20_000_000, np.float32)])

    with running(send):
        entered.wait(DEADLINE)
        channel.close()
    assert channel.fileno() == -1


def test_a_connection_that_is_closed_while_its_end_is_told_keeps_no_descriptor():
    class Interrupted(socket.socket):
        """Is closed by another thread while this one tells the peer that nothing more comes."""

        def shutdown(self, how):
            if how == socket.SHUT_WR:
                in_turn = threading.Thread(target=channel.close)
                in_turn.start()
                in_turn.join(DEADLINE)
            super().shutdown(how)

    here, there = socket.socketpair()
    with there, Interrupted(fileno=here.detach()) as stream:
        channel = Channel(stream)
        channel.finish()
        assert stream.fileno() == -1


def test_sending_to_nobody_is_a_lost_connection(pair):
    channel, other = pair
    other.close()
    with pytest.raises(ConnectionLostError):
        channel.send(PULL, buffers=[np.zeros(20_000_000, np.float32)])  # TCP learns of it on the way
    with pytest.raises(ConnectionLostError, match="closed"):
        channel.send(PULL)


@pytest.mark.parametrize("how", ["send", "try_send"])
def test_the_last_words_of_a_peer_are_read_after_nothing_could_be_sent_to_it(how):
    here, there = socket.socketpair()
    channel, other = Channel(here), Channel(there)
    try:
        channel.send(PULL)  # which the other never reads
        other.send(PULL)
        other.close()
        for _ in range(2):
            with pytest.raises(ConnectionLostError):
                getattr(channel, how)(PULL)
        assert channel.receive(timeout=DEADLINE).message == PULL
        with pytest.raises(ConnectionLostError):  # as the other has not read all
            channel.receive(timeout=DEADLINE)
    finally:
        channel.close()


def test_a_peer_that_takes_nothing_ends_the_connection_after_the_timeout(pair):
    channel, _ = pair
    large = [np.zeros(20_000_000, np.float32)]
    with pytest.raises(ConnectionLostError, match=r"took nothing for 0\.05 s"):
        channel.send(PULL, buffers=large, timeout=0.05)
    with pytest.raises(ConnectionLostError, match="closed"):
        channel.send(PULL)


def test_a_timeout_is_over_in_time_also_while_bytes_trickle_in(wires):
    bare, channel = wires
    frame = encode(Waiting(number=1, reason="x" * 1000))
    stop = threading.Event()

    def trickle():
        for at in range(len(frame) - 1):
            bare.sendall(frame[at : at + 1])
            if stop.wait(0.002):
                return bare.sendall(frame[at + 1 :])
        return None

    with running(trickle):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=channel.peer):
            channel.receive(timeout=0.1)
        assert time.monotonic() - began > 0.09
        stop.set()
        assert len(channel.receive(timeout=DEADLINE).message.reason) == 1000


# ── what breaks the protocol ────────────────────────────────────────────────────────────────────


def test_what_is_no_frame_is_refused_and_ends_the_reading_only(wires):
    bare, channel = wires
    bare.sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
    with pytest.raises(ProtocolError, match="not a Headwater node"):
        channel.receive(timeout=DEADLINE)
    with pytest.raises(ConnectionLostError, match="not a Headwater node"):
        channel.receive(timeout=DEADLINE)
    channel.send(Refused(error="ProtocolError", reason="no frame"))
    assert b"no frame" in bare.recv(1000)


def test_a_payload_nobody_asked_for_is_refused(pair):
    sender, receiver = pair
    sender.send(PULL, buffers=[np.zeros(4, np.float32)])
    with pytest.raises(ProtocolError, match="Pull with 16 payload bytes, expected none"):
        receiver.receive(timeout=DEADLINE)


def test_a_payload_of_another_size_is_refused_before_it_is_stored(pair):
    sender, receiver = pair
    target = np.zeros(5, np.float32)
    sender.send(PULL, buffers=[np.ones(4, np.float32)])
    with pytest.raises(ProtocolError, match="16 payload bytes, expected 20"):
        receiver.receive(room(target), timeout=DEADLINE)
    assert not target.any()


def test_an_error_of_place_reaches_the_caller(pair):
    sender, receiver = pair
    sender.send(PULL, buffers=[np.ones(4, np.float32)])

    def place(message, length):
        raise ProtocolError(f"model {message.models[0]} is not here")

    with pytest.raises(ProtocolError, match="model 0 is not here"):
        receiver.receive(place, timeout=DEADLINE)


def test_limits_are_those_of_the_receiver(kind):
    with channels(kind, Limits(header=50, payload=64)) as (sender, receiver):
        sender.send(PULL, buffers=[np.zeros(16, np.float32)])
        assert receiver.receive(room(np.zeros(16, np.float32)), timeout=DEADLINE).payload_length == 64
        sender.send(PULL, buffers=[np.zeros(17, np.float32)])
        with pytest.raises(ProtocolError, match="68 payload bytes"):
            receiver.receive(room(np.zeros(17, np.float32)), timeout=DEADLINE)


# ── descriptors ─────────────────────────────────────────────────────────────────────────────────


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_descriptors_arrive_with_their_own_frame(pipe):
    with channels("unix") as (sender, receiver):
        assert sender.can_pass_descriptors
        sender.send(PULL, request=1)
        sender.send(PULL, request=2, descriptors=pipe[1:])
        sender.send(PULL, request=3, descriptors=pipe, buffers=[np.ones(3, np.float32)])
        sender.send(PULL, request=4)
        received = [receiver.receive(room(np.zeros(3, np.float32)), timeout=DEADLINE) for _ in range(4)]
    assert [len(one.descriptors) for one in received] == [0, 1, 2, 0]
    os.write(received[1].descriptors[0], b"here")
    assert os.read(received[2].descriptors[0], 4) == b"here"
    for one in received:
        for descriptor in one.descriptors:
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)


def test_tcp_passes_no_descriptors():
    with channels("tcp") as (sender, _):
        assert not sender.can_pass_descriptors
    with sockets("tcp") as (bare, other):
        channel = Channel(other)
        bare.sendall(encode(PULL, flags=1))
        with pytest.raises(ProtocolError, match="announced 1 descriptors, 0 came"):
            channel.receive(timeout=DEADLINE)
        channel.close()


@pytest.mark.parametrize(
    ("announced", "sent", "reason"),
    [
        (0, 1, "announced 0 descriptors, 1 came"),
        (2, 1, "announced 2"),
        (1, 2, "announced 1"),
        (2, 3, "more than 2"),
    ],
)
def test_descriptors_other_than_announced_are_closed_and_refused(pipe, announced, sent, reason):
    before = open_descriptors()
    with sockets("unix") as (bare, other):
        channel = Channel(other, Limits(descriptors=2))
        socket.send_fds(bare, [encode(PULL, flags=announced)], [pipe[0]] * sent)
        with pytest.raises(ProtocolError, match=reason):
            channel.receive(timeout=DEADLINE)
        assert open_descriptors() == before + 2
        channel.close()
    assert open_descriptors() == before


def test_descriptors_of_a_frame_that_is_refused_or_never_ends_are_closed(pipe):
    before = open_descriptors()
    with channels("unix") as (sender, receiver):
        sender.send(PULL, descriptors=pipe, buffers=[np.zeros(1, np.float32)])
        with pytest.raises(ProtocolError):
            receiver.receive(timeout=DEADLINE)
        assert open_descriptors() == before + 2
    frame = frame_of(np.zeros(4, np.float32))
    for cut in (3, 20, len(frame) - 1):
        with sockets("unix") as (bare, other):
            channel = Channel(other)
            socket.send_fds(bare, [encode(PULL, payload_length=16, flags=1)[:cut]], [pipe[0]])
            with pytest.raises(TimeoutError):
                channel.receive(room(np.zeros(4, np.float32)), timeout=0)
            channel.close()
    assert open_descriptors() == before


def test_a_channel_that_takes_no_descriptors_closes_them_unseen(pipe):
    before = open_descriptors()
    with sockets("unix") as (bare, other):
        channel = Channel(other, Limits(descriptors=0))
        socket.send_fds(bare, [encode(PULL)], [pipe[0]])
        assert channel.receive(timeout=DEADLINE).descriptors == []
        channel.close()
    assert open_descriptors() == before


# ── exchange ────────────────────────────────────────────────────────────────────────────────────


def echo(channel, buffer):
    """Answer each frame with its own payload, after saying that it will take a while."""
    while (received := channel.receive(room(buffer), timeout=DEADLINE)) is not None:
        for descriptor in received.descriptors:
            os.close(descriptor)
        channel.send(Waiting(number=1, reason="busy"), request=received.request, timeout=DEADLINE)
        values = [buffer] if received.payload_length else ()
        channel.send(ANSWER, request=received.request, buffers=values, timeout=DEADLINE)


@contextlib.contextmanager
def echoing(kind, count, elements):
    """Give `count` channels whose other ends echo in threads."""
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(channels(kind)) for _ in range(count)]
        buffers = [np.zeros(elements, np.float32) for _ in pairs]
        echoes = [
            lambda pair=pair, buffer=buffer: echo(pair[1], buffer)
            for pair, buffer in zip(pairs, buffers, strict=True)
        ]
        with running(*echoes):
            yield [pair[0] for pair in pairs]
            for pair in pairs:
                pair[0].close()


def is_answer(index, received):
    return isinstance(received.message, Answer)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("elements", [0, 256, 1_500_000])
def test_exchange_sends_and_receives_on_all_channels(kind, count, elements):
    sent = [np.arange(elements, dtype=np.float32) + 100 * index for index in range(count)]
    got = [np.zeros(elements, np.float32) for _ in range(count)]
    frames = [Outgoing(PULL, np.array_split(values, 5)) for values in sent]
    with echoing(kind, count, elements) as workers:
        for request in (1, 2):
            heard = []

            def on_received(index, received, heard=heard):
                heard.append((index, received.request, type(received.message)))
                return is_answer(index, received)

            exchange(
                workers, frames, on_received, lambda index, message, length: [got[index]], DEADLINE, request
            )
            expected = [(index, request, said) for index in range(count) for said in (Answer, Waiting)]
            assert sorted(heard, key=lambda one: (one[0], one[2].__name__)) == expected
    assert all(map(np.array_equal, got, sent))


def test_both_sides_may_write_more_than_the_buffers_hold_at_once(kind):
    """Each peer sends its megabytes before it reads a byte: only reading while writing gets through."""
    values = np.arange(2_000_000, dtype=np.float32)
    got = [np.zeros_like(values) for _ in range(3)]
    theirs = [np.zeros_like(values) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(channels(kind)) for _ in range(3)]

        def talk_first(index):
            pairs[index][1].send(ANSWER, buffers=[values + index], timeout=DEADLINE)
            assert pairs[index][1].receive(room(theirs[index]), timeout=DEADLINE).request == 5

        with running(*[lambda index=index: talk_first(index) for index in range(3)]):
            frames = [Outgoing(PULL, [values - index]) for index in range(3)]
            ours = [pair[0] for pair in pairs]
            exchange(ours, frames, is_answer, lambda index, message, length: [got[index]], DEADLINE, 5)
    for index in range(3):
        assert np.array_equal(got[index], values + index)
        assert np.array_equal(theirs[index], values - index)


@pytest.mark.parametrize("count", [1, 2])
def test_exchange_names_who_has_not_answered_by_the_deadline(kind, count):
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(channels(kind)) for _ in range(count)]
        for _, server in pairs[1:]:
            server.send(ANSWER)
        pairs[0][1].send(Waiting(number=1, reason="others"))
        ours = [pair[0] for pair in pairs]
        silent = ours[0].peer
        with pytest.raises(StalledError) as caught:
            exchange(ours, [Outgoing(PULL)] * count, is_answer, lambda *_: (), 0.05, 1)
        assert str(caught.value) == f"no answer from {silent} within 0.05 s"


@pytest.mark.parametrize("count", [1, 2])
def test_exchange_names_who_closed_before_it_answered(kind, count):
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(channels(kind)) for _ in range(count)]
        ours = [pair[0] for pair in pairs]

        def leave():
            pairs[-1][1].receive(timeout=DEADLINE)
            pairs[-1][1].close()

        with running(leave), pytest.raises(ConnectionLostError, match=ours[-1].peer):
            exchange(ours, [Outgoing(PULL)] * count, is_answer, lambda *_: (), DEADLINE, 1)


def test_the_last_words_of_a_peer_that_stops_reading_are_heard(kind):
    with channels(kind) as (worker, server):
        said = []

        def refuse():
            with pytest.raises(ProtocolError):
                server.receive(timeout=DEADLINE)
            server.send(Refused(error="ProtocolError", reason="no such model"))
            server._stream.shutdown(socket.SHUT_RDWR)  # nobody reads the rest

        def on_received(index, received):
            said.append(received.message.reason)
            raise RefusedError(received.message.reason)

        frame = Outgoing(PULL, [np.zeros(5_000_000, np.float32)])
        with running(refuse), pytest.raises(RefusedError, match="no such model"):
            exchange([worker], [frame], on_received, lambda *_: (), DEADLINE, 1)
        assert said == ["no such model"]


def test_a_frame_of_the_next_exchange_is_kept_for_it(pair):
    worker, server = pair
    for number in (1, 2):
        server.send(Answer(number=number, version=number))
    versions = []

    def on_received(index, received):
        versions.append(received.message.version)
        return True

    for request in (1, 2):
        exchange([worker], [Outgoing(PULL)], on_received, lambda *_: (), DEADLINE, request)
    assert versions == [1, 2]


def test_exchange_passes_descriptors_with_small_and_large_frames(pipe):
    values = np.ones(500_000, np.float32)
    with channels("unix") as (worker, server):

        def answer():
            for _ in range(2):
                received = server.receive(room(np.empty_like(values)), timeout=DEADLINE)
                os.write(received.descriptors[0], b"x")
                os.close(received.descriptors[0])
                server.send(ANSWER)

        with running(answer):
            for buffers in ([], [values]):
                frame = Outgoing(PULL, buffers, pipe[1:])
                exchange([worker], [frame], is_answer, lambda *_: (), DEADLINE, 1)
    assert os.read(pipe[0], 10) == b"xx"


def test_closing_wakes_a_blocked_exchange(kind):
    with channels(kind) as (first, one), channels(kind) as (second, _):

        def close():
            one.receive(timeout=DEADLINE)
            second.close()

        with running(close), pytest.raises(ConnectionLostError, match=second.peer):
            exchange([first, second], [Outgoing(PULL)] * 2, is_answer, lambda *_: (), DEADLINE, 1)
        assert second.fileno() == -1
