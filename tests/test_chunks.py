"""Chunks of memory that a server and its standby share and use again: who has which, and what is refused."""

import os

import numpy as np
import pytest

from headwater.errors import ProtocolError
from headwater.wire.chunks import SMALLEST, GivenChunks, TakenChunks


def mapped(given, taken, number):
    """Have the other side map a chunk, as it does when the descriptor has come over a connection."""
    descriptor, size = given.descriptor(number)
    taken.map(number, os.dup(descriptor), size)


def test_what_the_giver_writes_is_what_the_other_side_reads():
    given, taken = GivenChunks(), TakenChunks()
    number, memory = given.take(100_000)
    mapped(given, taken, number)
    memory[:] = np.arange(100_000) % 251
    assert np.array_equal(taken.part(number, 100_000), memory)
    given.close_descriptors()


def test_a_chunk_is_used_again_only_once_it_was_given_back():
    given = GivenChunks()
    first, _ = given.take(SMALLEST)
    second, memory = given.take(SMALLEST)
    assert first != second
    memory[:] = 7
    given.give_back(first)
    assert given.take(SMALLEST - 1)[0] == first
    assert given.take(SMALLEST)[0] not in (first, second)
    assert (memory == 7).all()
    given.close_descriptors()


def test_a_chunk_that_is_smaller_than_announced_is_refused():
    given, taken = GivenChunks(), TakenChunks()
    number, _ = given.take(SMALLEST)
    descriptor, size = given.descriptor(number)
    with pytest.raises(ProtocolError):
        taken.map(number, os.dup(descriptor), 2 * size)
    assert taken.part(number, 1) is None
    given.close_descriptors()


def test_more_of_a_chunk_than_there_is_and_chunks_that_nobody_gave_are_none():
    given, taken = GivenChunks(), TakenChunks()
    number, _ = given.take(SMALLEST)
    mapped(given, taken, number)
    assert len(taken.part(number, SMALLEST)) == SMALLEST
    assert taken.part(number, SMALLEST + 1) is None
    assert taken.part(number + 1, 1) is None
    given.close_descriptors()


@pytest.mark.parametrize("sealed", [False, True], ids=["can shrink", "is a file"])
def test_memory_that_could_shrink_under_the_reader_is_refused(sealed, tmp_path):
    if sealed:
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    else:
        descriptor = os.memfd_create("chunk", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SMALLEST)
    with pytest.raises(ProtocolError):
        TakenChunks().map(0, descriptor, SMALLEST)
    with pytest.raises(OSError):
        os.fstat(descriptor)  # it is the callee's from the call on
