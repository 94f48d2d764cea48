"""Where servers find the gradients of members, and where they write parameters for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Staging:
    """Where one member's gradients are read and its parameters written, for this server's range.

    Both are float32[stop - start]. In a window they are two places that the member shares; for a
    member elsewhere they are one private buffer, read before it is written.
    """

    gradients: Array
    parameters: Array
    gradients_at: int = field(init=False)
    parameters_at: int = field(init=False)

    def __post_init__(self) -> None:
        # Asking NumPy for an address costs as much as a small pull's whole pass.
        object.__setattr__(self, "gradients_at", self.gradients.ctypes.data)
        object.__setattr__(self, "parameters_at", self.parameters.ctypes.data)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One member's gradients for a model: where they are and which tensors they cover (bool[tensors]).

    `place`: of its step among those of the commit.
    """

    staging: Staging
    carried: NDArray[np.bool_]
    place: int = 0
