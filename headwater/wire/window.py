"""Shared memory of one worker that servers on the same machine read gradients from and write parameters to.

A window is an anonymous file (memfd): it has no name and is gone with its last user, also after
kill -9. Its first half holds gradients, the second parameters, both as float32. It is sealed
against shrinking, and a server checks that before it maps anything: a file that shrank under a
mapping would kill the server with SIGBUS.

Windows are not fenced by messages: who may touch them when is the business of the exchange.
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
from headwater.wire.fork import close_in_child

Floats: TypeAlias = NDArray[np.float32]

_ITEM = 4  # bytes of a float32
_GRAIN = 1024  # elements: what ranges are cut at, 4096 bytes
_MAP_FIXED = 0x10
_MAP_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)
_UNWRITABLE = 0x08 | 0x10  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE
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


class Window:
    """The worker's side: a window of two times `elements` float32, populated when made.

    Arrays made from it, and tensors made from those, keep the memory mapped for as long as they
    live; `release` and the end of the Window only give up the descriptor.

    Attributes:
        gradients: float32[elements], writable.
        parameters: float32[elements], writable.
        generation: counts `renew`, from 0.
        size: bytes of the file.
        descriptor: of the file, for passing it on; -1 once released.

    Raises:
        EnvironmentFailure: the system has no memory for it, or no such files.
    """

    def __init__(self, elements: int) -> None:
        assert elements in range(0, elements + 1, _GRAIN), elements
        self.size = 2 * elements * _ITEM
        self.generation = 0
        self._adopt(_filled_file(self.size))
        self._mapping = _Mapping(self.descriptor, 0, self.size)
        values = self._mapping.floats()
        self.gradients: Floats = values[:elements]
        self.parameters: Floats = values[elements:]
        close_in_child(self)

    def renew(self) -> None:
        """Put the same content into a new file, mapped over the same addresses; `generation` grows by 1.

        Arrays and tensors stay valid. Who mapped the old file keeps it, and sees nothing that is
        written from now on; nor does anything it writes appear here. No other thread may use the
        window meanwhile. Needs the memory twice for as long as the old file is mapped anywhere.
        """
        assert self.descriptor >= 0, "renew after release"
        descriptor = _filled_file(self.size, self._mapping)
        try:
            self._mapping.replace(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self.release()
        self._adopt(descriptor)
        self.generation += 1

    def release(self) -> None:
        """Close the descriptor; may be called twice. The memory stays while any array of it lives."""
        self.descriptor = -1
        self._close()

    def close_descriptors(self) -> None:
        """Close the descriptor in a forked child; its mapping stays."""
        self.release()

    def _adopt(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)


class WindowView:
    """The server's side: elements [start, stop) of a window given by a peer, populated when made.

    Owns `descriptor` from the call on and closes it in every case. The memory stays mapped while any
    array of it lives.

    Args:
        descriptor: what came with the peer's message.
        size: bytes the peer says the window has.
        elements: of each half, as the model has them; a multiple of 1024.
        start, stop: of this server's range; multiples of 1024.

    Attributes:
        gradients: float32[stop − start], writable.
        parameters: float32[stop − start], writable.

    Raises:
        ProtocolError: not a file of that size sealed against shrinking, or a range outside of it.
        EnvironmentFailure: the system would not map it.
    """

    gradients: Floats
    parameters: Floats

    def __init__(self, descriptor: int, *, size: int, elements: int, start: int, stop: int) -> None:
        try:
            _check_range(size, elements, start, stop)
            _check_file(descriptor, size)
            length = (stop - start) * _ITEM
            self.gradients = _map_floats(descriptor, start * _ITEM, length)
            self.parameters = _map_floats(descriptor, (elements + start) * _ITEM, length)
        finally:
            os.close(descriptor)


class _Mapping:
    """Bytes [offset, offset + size) of a file in memory, for as long as an array made from it lives.

    NumPy keeps the object whose `__array_interface__` it read as the array's base, so the finalizer
    runs after the last array is gone. (mmap.mmap would keep a duplicate of the descriptor, and
    cannot map over given addresses.)
    """

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self.size = size
        self.address = 0
        if size:
            lead = offset % mmap.PAGESIZE  # nothing where pages have 4096 bytes
            start = _map(descriptor, offset - lead, lead + size)
            weakref.finalize(self, _libc.munmap, start, lead + size).atexit = False
            self.address = start + lead
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "<f4",
            "shape": (size // _ITEM,),
            "data": (self.address, False),
        }

    def floats(self) -> Floats:
        """Return all of it as float32[size / 4], writable."""
        return np.asarray(self) if self.size else np.empty(0, np.float32)

    def write(self, descriptor: int) -> None:
        """Write all of it to a file, from offset 0."""
        data = memoryview(cast(Any, self.floats())).cast("B") if self.size else b""
        written = 0
        while written < self.size:
            written += os.pwrite(descriptor, data[written:], written)

    def replace(self, descriptor: int) -> None:
        """Map another file of the same size, from offset 0, over the same addresses."""
        if self.size:
            _map(descriptor, 0, self.size, self.address)


def _map_floats(descriptor: int, offset: int, size: int) -> Floats:
    return _Mapping(descriptor, offset, size).floats()


def _map(descriptor: int, offset: int, size: int, address: int | None = None) -> int:
    """Map a shared, populated, writable range of a file, over `address` where one is given."""
    flags = mmap.MAP_SHARED | _MAP_POPULATE | (0 if address is None else _MAP_FIXED)
    start: int = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, offset)
    if start == _FAILED:
        number = ctypes.get_errno()
        raise EnvironmentFailure(f"cannot map {size} bytes of a window: {os.strerror(number)}")
    return start


def _new_file(size: int) -> int:
    """Return the descriptor of an anonymous file that can neither shrink nor grow."""
    descriptor = os.memfd_create("headwater-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _filled_file(size: int, content: _Mapping | None = None) -> int:
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


def _check_range(size: int, elements: int, start: int, stop: int) -> None:
    if size != 2 * elements * _ITEM:
        raise ProtocolError(
            f"a window of {size} bytes, expected {2 * elements * _ITEM} for twice {elements} float32"
        )
    if not 0 <= start <= stop <= elements:
        raise ProtocolError(f"elements [{start}, {stop}) lie outside a window of {elements}")
    if start % _GRAIN or stop % _GRAIN or elements % _GRAIN:
        raise ProtocolError(f"elements [{start}, {stop}) of {elements} are not all multiples of {_GRAIN}")


def _check_file(descriptor: int, size: int) -> None:
    """Refuse a file that could shrink: reading past its end would kill this process."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"a window must be a memfd, got another file: {error}") from error
    if not seals & fcntl.F_SEAL_SHRINK or seals & _UNWRITABLE:
        raise ProtocolError(f"a window must be sealed against shrinking, not writing; got seals {seals:#x}")
    actual = os.fstat(descriptor).st_size
    if actual < size:
        raise ProtocolError(f"a window of {size} bytes was announced, the file has {actual}")
