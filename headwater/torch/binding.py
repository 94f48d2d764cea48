"""A module's parameters on the memory of a model, whichever optimizer steps them.

Invariants:
- One name is one memory: a binding belongs to the optimizer that was made last for the same parameters, and
  no other parameters ever come onto its memory.
- Parameters are written only inside a step or a pull, and autograd is told.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from headwater.errors import RegistrationError, UsageError
from headwater.torch.parameters import BoundParameter, wait_for_copies
from headwater.worker import Worker
from headwater.worker.model import Model

Parameters = Mapping[str, torch.nn.Parameter]


class Binding:
    """The adapter of `model`: its tensors are the parameters of `module` that need a gradient.

    Attributes:
        bounds: by tensor name.
    """

    def __init__(self, model: Model, module: torch.nn.Module, trained: Parameters) -> None:
        self.model = model
        self.bounds = {
            name: BoundParameter(module, name, parameter, model.gradients[name], model.parameters[name])
            for name, parameter in trained.items()
        }
        self._owner: weakref.ref[torch.optim.Optimizer] | None = None
        self._hooks: list[RemovableHandle] = []
        model.adapter = self
        self.values_arrived()

    # ── whose it is ─────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def known(worker: Worker, name: str, trained: Parameters) -> Binding | None:
        """The binding of the model of this name, if the worker has such a model: it has these parameters.

        Raises:
            RegistrationError: the model has other parameters; says what to do.
        """
        model = worker.models.get(name)
        if model is None:
            return None
        binding = model.adapter
        if isinstance(binding, Binding) and binding._has(trained):
            return binding
        raise RegistrationError(
            f"model {name!r} of this worker has other parameters, which this module would replace: pass "
            f"name=… to the DistributedOptimizer of each module"
        )

    def _has(self, trained: Parameters) -> bool:
        return self.bounds.keys() == trained.keys() and all(
            bound.parameter is trained[name] for name, bound in self.bounds.items()
        )

    def belong_to(self, owner: torch.optim.Optimizer, watched: bool) -> None:
        """From now on only this optimizer may use it; `watched`: gradients go to the window as they come."""
        _remove(self._hooks)
        self._owner = weakref.ref(owner)
        if watched:
            self._hooks += [bound.watch() for bound in self.bounds.values() if bound.mapped]
        weakref.finalize(owner, _remove, list(self._hooks))

    @property
    def owner(self) -> torch.optim.Optimizer | None:
        """The optimizer that may use it; None where that is gone."""
        return None if self._owner is None else self._owner()

    def check(self, user: torch.optim.Optimizer) -> None:
        """Refuse another optimizer than the owner, and parameters that are not where construction left them.

        Raises:
            UsageError: says which, and what to do.
        """
        if self.owner is not user:
            raise UsageError(
                f"another DistributedOptimizer was made for the parameters of model {self.model.name!r} "
                f"after this one and has taken the model over: use that one"
            )
        for bound in self.bounds.values():
            bound.check()

    # ── values ──────────────────────────────────────────────────────────────────────────────────

    def values_arrived(self) -> None:
        """Complete what the servers wrote into the window: copies, and word to autograd."""
        bounds = list(self.bounds.values())
        wait_for_copies(bounds)
        for bound in bounds:
            bound.load()
        increment_version([bound.parameter for bound in bounds])

    def assign(self, names: Sequence[str]) -> None:
        """Set the servers' values of these tensors to the parameters'; blocks for an exchange."""
        for name in names:
            self.bounds[name].store()
        self.model.assign_local(names)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
