"""Noticing what a program writes to parameters between steps.

Two traces are looked at. torch counts the in-place operations on a parameter (`copy_`, `load_state_dict`,
`nn.init`), exactly; what goes through `.data` or NumPy is not counted. So elements of each parameter that
lies in the window are compared with what they were: all of small ones, and of larger ones 256 and one in a
thousand, which a pass over a whole parameter cannot miss and a write to a few elements can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from headwater.torch.parameters import BoundParameter
from headwater.worker.local_model import LocalModel

_EACH, _ONE_IN = 256, 1024


class WriteWatch:
    """Of the parameters of one model; `exact`: what torch counted was a write whatever the elements say.

    Without `exact`, parameters that were written and written back (averaged weights that a validation swaps
    in) count as untouched.
    """

    def __init__(self, model: LocalModel, bounds: Sequence[BoundParameter], *, exact: bool) -> None:
        self._exact = exact
        self._bounds = list(bounds)
        self._vector = model.vector
        mapped = [bound for bound in self._bounds if bound.mapped]
        starts = {name: int(model.layout.starts[i]) for name, i in model.layout.index.items()}
        places = [starts[bound.name] + _sample(bound.parameter.numel()) for bound in mapped]
        self._places = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        self._owners = np.repeat(np.arange(len(mapped)), [len(part) for part in places])
        self._names = [bound.name for bound in mapped]
        self._before = np.empty(len(self._places), dtype=np.float32)
        self._now = np.empty_like(self._before)
        self._versions = [-1] * len(self._bounds)
        self.note()

    def note(self) -> None:
        """From now on, what differs from now was written."""
        self._versions = [bound.parameter._version for bound in self._bounds]
        np.take(self._vector, self._places, out=self._before, mode="clip")

    def written(self) -> list[str]:
        """The tensors that the program has written since the last `note`."""
        counted = [
            bound
            for bound, version in zip(self._bounds, self._versions, strict=True)
            if bound.parameter._version != version
        ]
        names = {bound.name for bound in counted if _differs(bound) or (bound.mapped and self._exact)}
        np.take(self._vector, self._places, out=self._now, mode="clip")
        moved = self._before.view(np.int32) != self._now.view(np.int32)
        if moved.any():
            names.update(self._names[i] for i in np.unique(self._owners[moved]))
        return [bound.name for bound in self._bounds if bound.name in names]


def _sample(elements: int) -> NDArray[np.int64]:
    """Places of elements that are compared: the first, the last, and others evenly between them."""
    count = min(elements, _EACH + elements // _ONE_IN)
    return np.linspace(0, max(elements - 1, 0), count).astype(np.int64)


def _differs(bound: BoundParameter) -> bool:
    """Whether a parameter with memory of its own is not what the servers gave it."""
    return not bound.mapped and not torch.equal(
        bound.parameter.detach().cpu(), bound.value.to(bound.parameter.dtype)
    )
