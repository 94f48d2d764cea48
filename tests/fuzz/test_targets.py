"""The fuzz targets hold on what hypothesis makes of random bytes and of changed frames."""

import msgspec
import pytest
from connections import tls
from fuzz.targets import SEEDS, TARGETS, handshake
from hypothesis import example, given
from hypothesis import strategies as st

from examples import examples
from headwater.messages import Answer, Join, Progress, Refused, Step
from headwater.wire.encryption import load
from headwater.wire.frames import encode
from headwater.wire.greeting import Accepted, Challenge, Greeting, Proof

MESSAGES = [
    Join("worker", None, 7, "host", ("tcp:h:1",)),
    Step(1, 1, 0, (), (), True),
    Answer(1, 5, sums={"loss": 0.5}),
    Progress(1, 0, 5, 5, 5, 10, 0.1, 0.2, {0: 5}, {"loss": 1.0}),
    Refused("RefusedError", "no"),
    Greeting(bytes(32), True),
    Challenge(bytes(32)),
    Proof(bytes(32)),
    Accepted(),
]


@st.composite
def changed_frames(draw):
    """Some valid frames with some bytes changed, or cut off."""
    frames = b"".join(encode(one) for one in draw(st.lists(st.sampled_from(MESSAGES), max_size=4)))
    data = bytearray(frames)
    for at, byte in draw(st.dictionaries(st.integers(0, 200), st.integers(0, 255), max_size=4)).items():
        if at < len(data):
            data[at] = byte
    return bytes(data[: draw(st.integers(0, len(data)))])


anything = st.one_of(st.binary(max_size=300), changed_frames())


@pytest.mark.parametrize("name", TARGETS)
@examples(150)
@given(data=anything)
def test_bytes_of_strangers_raise_errors_of_ours_only(name, data):
    TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_fuzzing_starts_from_holds(name, seed):
    TARGETS[name](seed)


@pytest.fixture(scope="module")
def identity():
    return {listening: load(tls(), listening=listening) for listening in (True, False)}


@examples(100)
@example(data=b"\x16\x03\x01\xff\xff" + bytes(200_000))
@given(data=st.one_of(anything, anything.map(lambda tail: b"\x16\x03\x01\x00\xff\x01" + tail)))
def test_bytes_of_strangers_raise_errors_of_ours_only_with_tls(identity, data):
    handshake(data, identity)


leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))


@st.composite
def changed_messages(draw):
    """A message in which some fields hold something else, or are missing, or are too many."""
    fields = msgspec.to_builtins(draw(st.sampled_from(MESSAGES[:5])))
    for name in draw(st.lists(st.sampled_from([*fields, "unknown"]), max_size=2)):
        fields[name] = draw(trees)
    return fields


@examples(200)
@given(trees | changed_messages())
def test_any_messagepack_as_a_message_raises_errors_of_ours_only(tree):
    TARGETS["message"](msgspec.msgpack.encode(tree))
