"""What a model's codecs make of its gradients on their way up, and of its values on their way down.

Invariants:
- What servers get of a gradient is what its bytes stand for, whether they travel or lie in a window.
- The bytes of a step are made once: a repeat sends the same ones.
- What they lose is kept here and added to the tensor's next gradient. It belongs to this incarnation; no
  checkpoint has it, and a step that was dropped brings nothing of it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.kernels.codecs import decode, encode, represent
from headwater.spec.codecs import Codec
from headwater.spec.layout import Layout

Array = NDArray[np.float32]


class _Piece(NamedTuple):
    start: int
    stop: int
    data: NDArray[np.uint8]


class CodedGradients:
    """Gradients of one model; `cuts`: the servers' ranges of its vector.

    Attributes:
        lost: float32[elements], what the last bytes of each tensor did not say; None before the first.
        taken: bytes of all steps so far.
    """

    def __init__(self, codec: Codec, layout: Layout, cuts: Sequence[tuple[int, int]]) -> None:
        self.lost: Array | None = None
        self.taken = 0
        self._codec = codec
        self._layout = layout
        self._cuts = cuts
        self._pieces: list[list[_Piece]] = [[] for _ in cuts]

    def encode(self, mask: bytes, gradients: Array) -> None:
        """Make the bytes of the tensors in `mask`, and their gradients what these stand for, in place.

        Blocks for some passes over the tensors.
        """
        if self.lost is None:
            self.lost = np.zeros(self._layout.elements, dtype=np.float32)
        self._pieces = [[] for _ in self._cuts]
        for tensor in np.flatnonzero(self._layout.unmask(mask)):
            low, high = int(self._layout.starts[tensor]), int(self._layout.stops[tensor])
            if low < high:
                self._encode(low, high, gradients, self.lost)

    def _encode(self, low: int, high: int, gradients: Array, lost: Array) -> None:
        parts = [
            (server, max(low, start), min(high, stop))
            for server, (start, stop) in enumerate(self._cuts)
            if max(low, start) < min(high, stop)
        ]
        total = lost[low:high]
        with np.errstate(invalid="ignore", over="ignore"):  # with nonfinite="off" anything may come
            total += gradients[low:high]
        coded = encode(self._codec, total, low, [stop - low for _, _, stop in parts])
        for (server, start, stop), data in zip(parts, coded, strict=True):
            decode(self._codec, data, start, gradients[start:stop])
            self._pieces[server].append(_Piece(start, stop, data))
            self.taken += len(data)

    def outgoing(self, model: int, server: int) -> tuple[tuple[m.Coded, ...], list[Any]]:
        """What follows a step to a server that shares no memory, and its description."""
        pieces = self._pieces[server]
        described = tuple(m.Coded(model, start, stop, len(data)) for start, stop, data in pieces)
        return described, [data for _, _, data in pieces]


class CodedValues:
    """Values of one model, as `codec` represents them, in `parameters`; `cuts`: the servers' ranges."""

    def __init__(self, codec: Codec, parameters: Array, cuts: Sequence[tuple[int, int]]) -> None:
        self._codec = codec
        self._parameters = parameters
        self._cuts = cuts
        self._coming: dict[int, NDArray[np.uint8]] = {}

    def incoming(self, server: int) -> list[Any]:
        """Where a server's bytes go."""
        start, stop = self._cuts[server]
        self._coming[server] = np.empty(self._codec.size(start, stop - start), dtype=np.uint8)
        return [self._coming[server]]

    def arrived(self) -> None:
        """All servers have answered: make the values what their bytes stand for, written here or not."""
        coming, self._coming = self._coming, {}
        for server, (start, stop) in enumerate(self._cuts):
            values = self._parameters[start:stop]
            if server in coming:
                decode(self._codec, coming[server], start, values)
            else:
                represent(self._codec, values, start)
