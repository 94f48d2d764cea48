"""A torch module's loss and gradients at values that come and go as arrays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from headwater.errors import GradientError
from headwater.torch.parameters import find_parameters
from headwater.worker.lbfgs_run import finite_loss
from headwater.worker.model import Model


class ModuleEvaluation:
    """Of a copy of `module`: `loss(module, samples)` gives a scalar, on which backward is called."""

    def __init__(self, module: torch.nn.Module, loss: Callable[[Any, Any], Any]) -> None:
        self._module = copy.deepcopy(module)
        self._loss = loss
        self._trained = find_parameters(self._module)

    def values(self) -> dict[str, torch.Tensor]:
        """Of the parameters that need a gradient, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def __call__(self, model: Model, samples: Any) -> float:
        """Compute the loss at the model's values; all gradients are in its window afterwards.

        Raises:
            GradientError: the loss is no scalar that depends on the parameters.
        """
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(torch.from_numpy(model.parameters[name]))
        self._module.zero_grad()
        with torch.enable_grad():
            value = self._loss(self._module, samples)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise GradientError(f"loss gave {value!r}, expected a scalar that depends on the parameters")
        value.backward()  # type: ignore[no-untyped-call]
        finite = True
        for name, parameter in self._trained.items():
            view = torch.from_numpy(model.gradients[name])
            view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            finite &= bool(torch.isfinite(view).all())
        return finite_loss(value, finite)
