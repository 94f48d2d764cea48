"""Shared memory of one worker that servers on the same machine read gradients from and write parameters to.

A window is an anonymous file (`headwater.wire.shared_memory`). Its first half holds gradients, the second
parameters, both as float32.

Windows are not fenced by messages: who may touch them when is the business of the exchange.
"""

from __future__ import annotations

import os
import weakref
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ProtocolError
from headwater.wire.fork import close_in_child
from headwater.wire.shared_memory import Mapping, check_file, filled_file

Floats: TypeAlias = NDArray[np.float32]

_ITEM = 4  # bytes of a float32
_GRAIN = 1024  # elements: what ranges are cut at, 4096 bytes


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
        self._adopt(filled_file(self.size))
        self._mapping = Mapping(self.descriptor, 0, self.size)
        values = self._mapping.bytes().view(np.float32)
        self.gradients: Floats = values[:elements]
        self.parameters: Floats = values[elements:]
        close_in_child(self)

    shared = True
    """Other processes can map it."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What travels to give it to another process."""
        return (self.descriptor,)

    def renew(self) -> None:
        """Put the same content into a new file, mapped over the same addresses; `generation` grows by 1.

        Arrays and tensors stay valid. Who mapped the old file keeps it, and sees nothing that is
        written from now on; nor does anything it writes appear here. No other thread may use the
        window meanwhile. Needs the memory twice for as long as the old file is mapped anywhere.
        """
        assert self.descriptor >= 0, "renew after release"
        descriptor = filled_file(self.size, self._mapping)
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
            check_file(descriptor, size)
            length = (stop - start) * _ITEM
            self.gradients = _map_floats(descriptor, start * _ITEM, length)
            self.parameters = _map_floats(descriptor, (elements + start) * _ITEM, length)
        finally:
            os.close(descriptor)


def _map_floats(descriptor: int, offset: int, size: int) -> Floats:
    return Mapping(descriptor, offset, size).bytes().view(np.float32)


def _check_range(size: int, elements: int, start: int, stop: int) -> None:
    if size != 2 * elements * _ITEM:
        raise ProtocolError(
            f"a window of {size} bytes, expected {2 * elements * _ITEM} for twice {elements} float32"
        )
    if not 0 <= start <= stop <= elements:
        raise ProtocolError(f"elements [{start}, {stop}) lie outside a window of {elements}")
    if start % _GRAIN or stop % _GRAIN or elements % _GRAIN:
        raise ProtocolError(f"elements [{start}, {stop}) of {elements} are not all multiples of {_GRAIN}")
