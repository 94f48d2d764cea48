"""A module's parameters on the memory of a model, whichever optimizer steps them.

Invariants:
- One name is one memory: a binding belongs to the optimizer that was made last for the same parameters, and
  no other parameters ever come onto its memory.
- The servers write parameters only inside a step or a pull, and autograd is told.
- What the program writes to them leaves before the next step's answer overwrites it; it is one entry of the
  log, also where all ranks write the same.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from headwater.errors import RegistrationError, UsageError
from headwater.loggers import logger
from headwater.torch.parameters import BoundParameter, wait_for_copies
from headwater.torch.watch import WriteWatch
from headwater.worker import Worker
from headwater.worker.model import Model
from headwater.worker.model_spec import named

_log = logger("headwater.torch")

Parameters = Mapping[str, torch.nn.Parameter]


class Binding:
    """The adapter of `model`: its tensors are the parameters of `module` that need a gradient.

    Attributes:
        bounds: by tensor name.
    """

    def __init__(self, worker: Worker, model: Model, module: torch.nn.Module, trained: Parameters) -> None:
        self.model = model
        self.bounds = {
            name: BoundParameter(module, name, parameter, model.gradients[name], model.parameters[name])
            for name, parameter in trained.items()
        }
        self._worker = worker
        self._written = 0
        self._owner: weakref.ref[torch.optim.Optimizer] | None = None
        self._hooks: list[RemovableHandle] = []
        model.local.adapter = self
        self._watch = WriteWatch(model.local, list(self.bounds.values()), exact=worker.mode.rounds)
        self.after_read()

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
        binding = model.local.adapter
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
                f"another optimizer was made for the parameters of model {self.model.name!r} "
                f"after this one and has taken the model over: use that one"
            )
        for bound in self.bounds.values():
            bound.check()

    # ── values ──────────────────────────────────────────────────────────────────────────────────

    def after_read(self) -> None:
        """Complete what the servers wrote into the window: copies, and word to autograd."""
        bounds = list(self.bounds.values())
        wait_for_copies(bounds)
        for bound in bounds:
            bound.load()
        increment_version([bound.parameter for bound in bounds])
        self._watch.note()

    def before_read(self) -> None:
        """Assign what the program has written since the last answer; blocks for an exchange if it has.

        Raises:
            UsageError: another rank wrote something else; names the parameters.
        """
        names = self._watch.written()
        if not names or self._restored(names):
            return
        level = logging.INFO if self._written else logging.WARNING
        self._written += 1
        _log.log(
            level,
            "model %r: what the program wrote to %s since its last step is assigned to the servers",
            *(self.model.name, named(names)),
        )
        for name in names:
            self.bounds[name].store()
        try:
            self.model.local.assign(names, self._worker.steps)
        except UsageError as error:
            raise UsageError(f"the program wrote to {named(names)}: {error}") from error
        self._watch.note()

    def before_pull(self) -> None:
        """Say what of the program's writes a pull, which was asked for, is about to replace."""
        if names := self._watch.written():
            _log.warning(
                "model %r: what the program wrote to %s since its last step is replaced by the servers' "
                "values: push_parameters() makes the module's values the servers'",
                *(self.model.name, named(names)),
            )

    def _restored(self, names: Sequence[str]) -> bool:
        """Whether the program joined a model that goes on with its values: then they are there again.

        A program that is started again loads what it loaded in the beginning, which is not to undo training.
        """
        first = self.model.local.settings.first
        if first is None:
            return False
        _log.warning(
            "model %r has had %d updates before this program joined it and goes on with its values: what the "
            "program wrote to %s before its first step is not taken; push_parameters() makes it the servers'",
            *(self.model.name, self.model.local.settings.updates, named(names)),
        )
        self.model.local.changed_here()
        self.model.pull()
        return True

    def assign(self) -> None:
        """Set the servers' values of all tensors to the parameters'; blocks for an exchange."""
        for bound in self.bounds.values():
            bound.store()
        self.model.local.assign(list(self.bounds))
        self._watch.note()

    def wrote(self) -> None:
        """What the parameters are now is not the program's doing."""
        self._watch.note()


def is_bound(worker: Worker, parameter: torch.nn.Parameter) -> bool:
    """Whether a DistributedOptimizer of this worker trains the parameter."""
    bindings = (model.local.adapter for model in worker.models.values())
    return any(
        bound.parameter is parameter
        for binding in bindings
        if isinstance(binding, Binding) and binding.owner is not None
        for bound in binding.bounds.values()
    )


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def check_frozen(worker: Worker, frozen: Parameters) -> None:
    """Refuse to go on where a parameter is to be trained that was frozen when its optimizer was made.

    Raises:
        UsageError: there is one that no other optimizer trains; names it.
    """
    for name, parameter in frozen.items():
        if parameter.requires_grad and not is_bound(worker, parameter):
            raise UsageError(
                f"parameter {name!r} needs a gradient now, but was frozen when the DistributedOptimizer "
                f"was made and would not be trained: make the optimizer while it needs one and freeze it "
                f"afterwards, or make another DistributedOptimizer for it with another name"
            )
