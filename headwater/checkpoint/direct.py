"""Writing a local file past the page cache.

Through the cache every byte is copied to memory that the system must find first, and that others lose; a
training that shares the machine pays for it. Where a file system has no such way, files are written as usual.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_BLOCK = 4096
"""Offsets, lengths and addresses of direct writes are multiples of what the disk says, which divides this."""

_BUFFER = 4 << 20
"""Bytes written at a time: enough that a disk is busy, and few enough to stay in cache."""


class DirectSink:
    """A new file at `path`; complete, and on the disk, after `finish`.

    Raises:
        OSError: the file cannot be made, or later written.
    """

    def __init__(self, path: Path) -> None:
        self._file = _create(path)
        self._memory = mmap.mmap(-1, _BUFFER)  # begins at a page
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._filled = self._size = 0

    def write(self, data: memoryview, /) -> int:
        """Take some of `data`; returns how much."""
        taken = min(len(data), _BUFFER - self._filled)
        end = self._filled + taken
        np.copyto(self._buffer[self._filled : end], np.frombuffer(data[:taken], np.uint8))
        self._filled, self._size = end, self._size + taken
        if end == _BUFFER:
            self._flush()
        return taken

    def finish(self) -> None:
        """Write what is left; blocks until all is durable."""
        if self._filled:
            self._filled += -self._filled % _BLOCK
            self._flush()
            os.ftruncate(self._file, self._size)
        os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _flush(self) -> None:
        left = memoryview(self._memory)[: self._filled]
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(self._file):
                    raise
                _write_as_usual(self._file)  # this file system opens files so, but cannot write them
        self._filled = 0


@contextmanager
def direct(path: Path) -> Iterator[DirectSink]:
    """A new file, durable when the block ends. Raises OSError."""
    sink = DirectSink(path)
    try:
        yield sink
        sink.finish()
    finally:
        sink.close()


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _write_as_usual(file: int) -> None:
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
