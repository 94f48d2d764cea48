"""Chunks of memory that a server and its standby share and use again: who has which, and what is refused."""

import gc
import os

import numpy as np
import pytest

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.chunks import GivenChunks, TakenChunks
from headwater.runtime.payload import MappedMemory

SMALLEST = MappedMemory.smallest_chunk


@pytest.fixture
def memory():
    return MappedMemory(lambda conn: None)


def introduced(given, memory, taken):
    """Have the other side map what it does not know yet, as it does when descriptors came."""
    for send in given.introduce(1):
        assert isinstance(send.message, m.Chunk)
        came = [os.dup(*send.descriptors)]
        taken.add(send.message.chunk, memory.given_chunk(came, send.message.size))
        assert not came


def test_what_the_giver_writes_is_what_the_other_side_reads(memory):
    given, taken = GivenChunks(memory), TakenChunks()
    number, chunk = given.take(100_000)
    introduced(given, memory, taken)
    chunk[:] = np.arange(100_000) % 251
    assert np.array_equal(taken.part(number, 100_000), chunk)
    assert given.introduce(1) == [], "it is given once"


def test_a_chunk_is_used_again_only_once_it_was_given_back(memory):
    given = GivenChunks(memory)
    first, _ = given.take(SMALLEST)
    second, chunk = given.take(SMALLEST)
    assert first != second
    chunk[:] = 7
    given.give_back(first)
    assert given.take(SMALLEST - 1)[0] == first
    assert given.take(SMALLEST)[0] not in (first, second)
    assert (chunk == 7).all()


def test_a_chunk_that_is_smaller_than_announced_is_refused(memory):
    given = GivenChunks(memory)
    given.take(SMALLEST)
    ((_, message, _, _, (file,)),) = given.introduce(1)
    with pytest.raises(ProtocolError):
        memory.given_chunk([os.dup(file)], 2 * message.size)


@pytest.mark.parametrize("given", [[], [1, 2]])
def test_a_chunk_comes_with_one_descriptor(memory, given):
    with pytest.raises(ProtocolError, match="expected 1"):
        memory.given_chunk(given, SMALLEST)


def test_more_of_a_chunk_than_there_is_and_chunks_that_nobody_gave_are_refused(memory):
    given, taken = GivenChunks(memory), TakenChunks()
    number, _ = given.take(SMALLEST)
    introduced(given, memory, taken)
    assert len(taken.part(number, SMALLEST)) == SMALLEST
    with pytest.raises(ProtocolError, match=f"has {SMALLEST} bytes"):
        taken.part(number, SMALLEST + 1)
    with pytest.raises(ProtocolError, match="is not known"):
        taken.part(number + 1, 1)


def test_what_waits_to_be_sent_keeps_its_descriptor_open(memory):
    """Else its number could be another file's by then."""
    given = GivenChunks(memory)
    given.take(SMALLEST)
    (send,) = given.introduce(1)
    given.release()
    os.fstat(int(send.descriptors[0].descriptor))
    descriptor = send.descriptors[0].descriptor
    del send
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)


@pytest.mark.parametrize("sealed", [False, True], ids=["can shrink", "is a file"])
def test_memory_that_could_shrink_under_the_reader_is_refused(memory, sealed, tmp_path):
    if sealed:
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    else:
        descriptor = os.memfd_create("chunk", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SMALLEST)
    with pytest.raises(ProtocolError):
        memory.given_chunk([descriptor], SMALLEST)
    with pytest.raises(OSError):
        os.fstat(descriptor)  # it is the callee's from the call on
