"""Anonymous shared memory: files without a name, mapped where arrays of them live.

A memfd is gone with its last user, also after kill -9. It is sealed against shrinking, and whoever is
given one checks that before it maps anything: a file that shrank under a mapping would kill the process with
SIGBUS.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import weakref
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from headwater.errors import EnvironmentFailure, ProtocolError

Bytes: TypeAlias = NDArray[np.uint8]

_MAP_FIXED = 0x10
_MAP_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)
_UNWRITABLE = 0x08 | 0x10  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE
_FIXED = 0x01 | 0x02 | 0x04  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_ssize_t,
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@functools.cache
def windows_possible() -> bool:
    """Tell whether this system can make windows at all."""
    try:
        os.close(_new_file(0))
    except (AttributeError, OSError):
        return False
    return True


class Mapping:
    """Bytes [offset, offset + size) of a file in memory, for as long as an array made from it lives.

    NumPy keeps the object whose `__array_interface__` it read as the array's base, so the finalizer
    runs after the last array is gone. (mmap.mmap would keep a duplicate of the descriptor, and
    cannot map over given addresses.)
    """

    def __init__(
        self, descriptor: int, offset: int, size: int, *, filled: bool = True, writable: bool = True
    ) -> None:
        """`filled`: have the system give it pages now; without, it does when they are first used."""
        self.size = size
        self._writable = writable
        self.address = 0
        if size:
            lead = offset % mmap.PAGESIZE  # nothing where pages have 4096 bytes
            start = _map(descriptor, offset - lead, lead + size, filled=filled, writable=writable)
            weakref.finalize(self, _libc.munmap, start, lead + size).atexit = False
            self.address = start + lead
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (self.address, not writable),
        }

    def bytes(self) -> Bytes:
        """Return all of it as uint8[size], writable unless it was made otherwise."""
        return np.asarray(self) if self.size else np.empty(0, np.uint8)

    def write(self, descriptor: int) -> None:
        """Write all of it to a file, from offset 0."""
        data = memoryview(cast(Any, self.bytes())).cast("B") if self.size else b""
        written = 0
        while written < self.size:
            written += os.pwrite(descriptor, data[written:], written)

    def replace(self, descriptor: int) -> None:
        """Map another file of the same size, from offset 0, over the same addresses."""
        if self.size:
            _map(descriptor, 0, self.size, self.address)


def _map(
    descriptor: int,
    offset: int,
    size: int,
    address: int | None = None,
    *,
    filled: bool = True,
    writable: bool = True,
) -> int:
    """Map a shared range of a file, over `address` where one is given."""
    flags = mmap.MAP_SHARED | (_MAP_POPULATE if filled else 0) | (0 if address is None else _MAP_FIXED)
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    start: int = _libc.mmap(address, size, access, flags, descriptor, offset)
    if start == _FAILED:
        number = ctypes.get_errno()
        raise EnvironmentFailure(f"cannot map {size} bytes of a window: {os.strerror(number)}")
    return start


def growing_file() -> int:
    """Return the descriptor of an anonymous file without content, that can grow and never shrink.

    Raises:
        EnvironmentFailure: the system has no such files.
    """
    try:
        return _new_file(0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except (AttributeError, OSError) as error:
        raise EnvironmentFailure(f"cannot make memory that processes share: {error}") from error


def _new_file(size: int, seals: int = _FIXED) -> int:
    """Return the descriptor of an anonymous file that can, but for other seals, neither shrink nor grow."""
    descriptor = os.memfd_create("headwater-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def filled_file(size: int, content: Mapping | None = None) -> int:
    """Return the descriptor of a new file of `size` bytes: zeros, or a copy of `content`."""
    descriptor = -1
    try:
        descriptor = _new_file(size)
        if content is not None:
            content.write(descriptor)
        elif size:
            # Faster than faulting each page in, and too little memory is an error here, no signal later.
            os.posix_fallocate(descriptor, 0, size)
    except BaseException as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, AttributeError | OSError):
            raise EnvironmentFailure(f"cannot make a window of {size} bytes: {error}") from error
        raise
    return descriptor


def check_file(descriptor: int, size: int) -> None:
    """Refuse a file that could shrink: reading past its end would kill this process.

    Raises:
        ProtocolError: not a memfd of that size with the seals it must have.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"a window must be a memfd, got another file: {error}") from error
    if not seals & fcntl.F_SEAL_SHRINK or seals & _UNWRITABLE:
        raise ProtocolError(f"a window must be sealed against shrinking, not writing; got seals {seals:#x}")
    actual = os.fstat(descriptor).st_size
    if actual < size:
        raise ProtocolError(f"a window of {size} bytes was announced, the file has {actual}")
