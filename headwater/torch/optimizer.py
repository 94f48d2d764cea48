"""The optimizer that stands in a torch loop: its step is the worker's step.

Invariants:
- A step sends what `parameter.grad` is at that moment, wherever it came from; None is not sent.
- The servers write parameters only inside `step`, `flush` and `pull_parameters`, and autograd is told.
- What the program writes to parameters is assigned to the servers with the next step.
- Nothing is sent, and the turn is not taken, when a step raises UsageError.
- Gradients of tables leave in the same exchange; each is sent once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from headwater.errors import ConfigurationError, UsageError
from headwater.loggers import logger
from headwater.messages import StepResult
from headwater.spec.amounts import shown as told
from headwater.spec.amounts import text, whole
from headwater.spec.rules import Rule
from headwater.torch.binding import Binding, check_frozen
from headwater.torch.buffers import BufferMode, SharedBuffers, check_mode
from headwater.torch.groups import make_groups, send_settings, show_settings, shown
from headwater.torch.optimizer_arguments import check_arguments, check_periods
from headwater.torch.parameters import BoundParameter, find_parameters, tied_names, wait_for_copies
from headwater.torch.saved_state import RULE, UPDATES, to_tensors
from headwater.torch.saved_state import read as read_saved
from headwater.torch.tables import TrainedTables, report_nonfinite
from headwater.worker import Worker
from headwater.worker.model import Model
from headwater.worker.model_spec import (
    Group,
    NonFinite,
    check_clip_norm,
    check_merge,
    check_nonfinite,
    check_weight,
)
from headwater.worker.table import Table

_log = logger("headwater.torch")


class DistributedOptimizer(torch.optim.Optimizer):
    """Trains `module` on the servers: `step` pushes gradients and pulls parameters.

    Construction registers the model; all workers then have the initial values of the lowest rank. It
    blocks until that one has declared them. Made again for the same parameters, under the same name, it
    takes the model over with the new settings, and the earlier one refuses use. Parameters that need no
    gradient then are no part of it and must be equal on all workers by the user's doing. Afterwards:

    - float32 parameters on the CPU lie in memory shared with the servers, and so do their gradients: keep
      a gradient beyond the next backward with `clone()` where you took a view of it. Parameters of a GPU,
      of float16 or bfloat16 stay where they are; the servers hold float32 values of them.
    - A change of `param_groups`, as torch's schedulers make, travels with the next step. In every mode those
      of the lowest rank count that trains this model and whose data has not ended, and after each step all
      show what the servers used; of a server-side schedule that is the rate of that update.
    - A `torch.amp.GradScaler` that finds infinity makes the step an empty turn.
    - Each table that an `Embedding` or `EmbeddingBag` of the module looks up in has a group of its own,
      after those of the parameters, with the settings of the table's rule and its name under "table".
      Its "params" are, from backward to step, stand-ins that carry the gradients of rows. A step sends
      these once: they do not go on adding up where nobody calls `zero_grad`, which forgets them.

    Args:
        worker: joined, used by this thread.
        module: its parameters are trained; on its device and of its dtype from here on.
        rule: what the servers do with a gradient of a parameter; may be left out where there are only tables.
        name: of the model.
        groups: dicts as torch's, with parameters or names under "params" and other settings of `rule`;
            all other parameters have `rule` itself and come first in `param_groups`.
        push_every, pull_every: steps between pushes of the accumulated gradients and between reads, with
            p −= lr · g on the local copy in each step (Dean et al. 2012, DistBelief, n_push and n_fetch).
        clip_norm: largest norm of the gradient of all parameters together, as the servers combined it from
            all workers; a larger one is scaled down before the rule gets it. Rows of tables do not count, and
            are not scaled. As in `Worker.model`.
        merge: how the gradients of all workers become one: "mean", "sum", "rda", "median", "trimmed:F", or
            None for what the mode's `reduce` says, as rows of tables are combined. As in `Worker.model`.
        codec, values_codec: how gradients and values travel, as in `Worker.model`; buffers and rows of tables
            do not follow them.
        buffers: "rank0", "mean" or "local", see `SharedBuffers`.
        nonfinite: what a NaN or infinite gradient does: "raise", "skip" (an empty turn) or "off".

    Attributes:
        result: of the last step that was sent; None before.

    Raises:
        ConfigurationError: an impossible argument.
        RegistrationError: nothing to train, a float64 parameter, another model of that name, or one that has
            other parameters of this worker.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        worker: Worker,
        module: torch.nn.Module,
        rule: Rule | None = None,
        *,
        name: str = "model",
        groups: Sequence[Mapping[str, Any]] | None = None,
        push_every: int = 1,
        pull_every: int = 1,
        clip_norm: float | None = None,
        merge: str | None = None,
        codec: str | None = None,
        values_codec: str | None = None,
        buffers: BufferMode = "rank0",
        nonfinite: NonFinite = "raise",
    ) -> None:
        module = getattr(module, "_orig_mod", module)  # what torch.compile wraps: names must not depend on it
        check_arguments(worker, module)
        check_mode(buffers)
        check_nonfinite(nonfinite)
        clip_norm = check_clip_norm(clip_norm)
        check_merge(merge, worker.workers)
        if worker.mode.late == "carry":
            raise ConfigurationError(
                f"sync={worker.sync!r}: a DistributedOptimizer sends the gradients that parameters have now, "
                f"and cannot carry late ones over: leave out late=carry, or use Model.push and Worker.step"
            )
        push_every, pull_every = whole("push_every", push_every), whole("pull_every", pull_every)
        if groups is not None and not isinstance(groups, list | tuple):
            raise ConfigurationError(f"groups must be a list of dicts as torch's, got {told(groups)}")
        name = text("name", name)
        self._accumulates = check_periods(worker, rule, push_every, pull_every)
        trained = find_parameters(module)
        self._every = [one for one, _ in module.named_parameters()]
        self._frozen = {one: p for one, p in module.named_parameters() if not p.requires_grad}
        self._tables = TrainedTables(module)
        tables_only = bool(self._tables) and not trained
        if tables_only and clip_norm is not None:
            raise ConfigurationError(
                f"clip_norm={clip_norm} is for parameters, and this module has rows of tables only: clip "
                f"them in the training loop, by nn.utils.clip_grad_norm_ over the optimizer's groups"
            )
        self._groups = [] if tables_only else make_groups(module, trained, rule, groups or ())
        known = None if tables_only else Binding.known(worker, name, trained)
        if known is not None and isinstance(known.owner, DistributedOptimizer):
            known.owner._check_nothing_is_held_back()
        shared = SharedBuffers.known(worker, module, f"{name}.buffers", buffers)
        self._worker = worker
        self._push_every, self._pull_every = push_every, pull_every
        self._nonfinite = nonfinite
        self._taken = 0
        self._accrued: set[str] = set()
        self.result: StepResult | None = None
        aliases = tied_names(module, trained)
        how = {"clip_norm": clip_norm, "merge": merge, "codec": codec, "values_codec": values_codec}
        self._model = None if tables_only else self._register(name, trained, aliases, rule, how)
        self._buffers = shared or SharedBuffers(worker, module, f"{name}.buffers", buffers)
        self._models = [model for model in (self._model, self._buffers.model) if model is not None]
        self._binding = known or (Binding(worker, self._model, module, trained) if self._model else None)
        self._bounds: Mapping[str, BoundParameter] = {} if self._binding is None else self._binding.bounds
        if self._binding is not None:
            self._binding.belong_to(self, watched=not self._accumulates)
        self._look = _before_first_forward(module, self) if self._joined_late() else None
        self._fixed = False
        defaults = {} if rule is None else shown(rule)
        own = [
            {"params": [trained[one] for one in group.names], "param_names": group.names, **group.shown}
            for group in self._groups
        ]
        super().__init__([*own, *self._tables.groups(defaults)], defaults)
        self._fixed = True

    def _register(
        self,
        name: str,
        trained: Mapping[str, torch.nn.Parameter],
        aliases: Mapping[str, str],
        rule: Rule | None,
        how: Mapping[str, Any],
    ) -> Model:
        assert rule is not None  # make_groups refuses None
        values = {one: parameter.detach() for one, parameter in trained.items()}
        own = [Group(group.names, group.rule) for group in self._groups if group.index]
        model = self._worker.model(
            name,
            values,
            rule,
            groups=own,
            aliases=aliases,
            nonfinite=self._nonfinite,
            **how,
        )
        model.local.settings.governs = True
        if model.local.settings.first is not None:
            for group in self._groups:
                if group.index is not None:
                    group.joined(model.local.settings)
        return model

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible: a model's tensors are fixed when it is registered.

        Raises:
            UsageError: always, once constructed.
        """
        if self._fixed:
            raise UsageError(
                "add_param_group: a model's tensors are fixed; pass groups=… when you make the "
                "DistributedOptimizer, or make another one with another name"
            )
        self.param_groups.append(param_group)  # torch's own method would import its compiler: a second

    def state_dict(self) -> dict[str, Any]:
        """Parameter groups as torch gives them, and the rule's state on the servers by tensor name.

        Blocks for an exchange. Each tensor has `step` and the rule's state vectors under torch's names;
        rows of tables and their states stay where they are.
        """
        model = self._model
        state = {} if model is None else to_tensors(model.state())
        own = {} if model is None else {UPDATES: model.local.settings.updates, RULE: model.rules[0].name}
        with self._tables.hidden():
            return {**super().state_dict(), "state": state, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings and the rule's state, its counts too, on the servers; blocks for an exchange.

        Takes what `state_dict` gave, and the state dict of torch's optimizer of the same rule: the next steps
        are those that would have followed it. All ranks load the same, which counts once, or one of them
        alone. Rows of tables and their states stay as they are.

        A program that joined a model after its first update, because it was started again or resumed, has
        the state that training had reached: what it loads before its first step is not taken, with a warning.

        Raises:
            ConfigurationError: it does not fit the groups or the rule; names what.
            GradientError: a state that does not fit a tensor; names both.
            UsageError: another rank loaded something else.
        """
        saved = read_saved(state_dict, self._groups, self._tables.parameter_groups(), self._every)
        if self._joined_late():
            assert self._model is not None
            _log.warning(
                "model %r has had %d updates before this program joined it and goes on with its state: the "
                "state dict that the program loads before its first step is not taken",
                *(self._model.name, self._model.local.settings.updates),
            )
            return
        if self._model is not None and self._accrued:
            raise UsageError("load_state_dict: gradients are held back for the next push: call flush() first")
        if self._model is not None:
            self._model.local.load_state(saved.tensors, saved.updates, self._worker.steps)
        with self._tables.hidden():
            groups = super().state_dict()["param_groups"]
            loaded = [{**group, **settings} for group, settings in zip(groups, saved.settings, strict=True)]
            super().load_state_dict({"state": {}, "param_groups": loaded})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or make them zeros, which the next step then sends; rows' are forgotten."""
        self._tables.discard()
        for bound in self._bounds.values():
            grad = bound.parameter.grad
            bound.parameter.grad = None if set_to_none or grad is None else grad.detach_().zero_()

    # ── the step ────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, weight: float = 1.0) -> Any:
        """End the turn: send the gradients there are, get the new values; blocks as the mode says.

        Returns what `closure` returns, which is called first, or None. Without any gradient it is this
        worker's turn all the same.

        `weight`: what the gradients count in the mean over all workers, as in `Worker.step`. The mean loss
        of a batch of n samples with `weight=n` makes uneven batches count like one large batch. With 0
        the gradients are dropped, finite or not.

        Raises:
            ConfigurationError: `weight` is negative, not finite or no number.
            NonFiniteError: a gradient holds NaN or infinity, with `nonfinite="raise"`.
            UsageError: a parameter was moved or replaced, or a gradient is sparse; names it.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        weight = check_weight(weight)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check()
        self._send_settings()
        pushed = [bound for bound in self._bounds.values() if bound.parameter.grad is not None]
        overflowed = self._unscale(pushed)
        if self._accumulates:
            self._step_locally(pushed, overflowed or not weight)  # each commit is of one worker alone
        else:
            self._step_together(pushed, overflowed, weight)
        return loss

    def _step_together(self, pushed: Sequence[BoundParameter], overflowed: bool, weight: float) -> None:
        if not weight:
            self._tables.discard()
        elif overflowed:
            self._skip()
        else:
            self._stage(pushed)
        self.result = self._worker.step(read=self._models, weight=weight)
        self._show_settings()

    def _stage(self, pushed: Sequence[BoundParameter]) -> None:
        """Have the next step carry all gradients, or none where one is not finite."""
        stages = self._worker.stages
        began = stages.now()
        hosts = [bound.to_host() for bound in pushed]
        wait_for_copies(pushed)
        bad = [bound.name for bound, host in zip(pushed, hosts, strict=True) if not bound.stage(host)]
        bad_tables = self._tables.write()
        stages.pushed(began)
        if (bad or bad_tables) and self._nonfinite != "off":
            self._report_nonfinite(bad, bad_tables)
            self._tables.discard()
        else:
            self._carry([bound.name for bound in pushed])

    def _report_nonfinite(self, names: Sequence[str], tables: Sequence[Table]) -> None:
        if names:
            assert self._model is not None
            self._model.local.report_nonfinite(names)
        report_nonfinite(tables, self._nonfinite)

    def _skip(self) -> None:
        if self._model is not None:
            self._model.local.skip()
        self._tables.skip()

    def _carry(self, names: Collection[str], accrued: bool = False, buffers: bool = True) -> None:
        """Have the next step carry these tensors, the rows that were written, and with them the buffers."""
        rows = self._tables.carry(accrued)
        for name in names:
            assert self._model is not None
            self._model.local.carry(name)
        if buffers and (rows or names):
            self._buffers.carry()

    def _unscale(self, pushed: Sequence[BoundParameter]) -> bool:
        """Undo the scale that a GradScaler left on the gradients; whether it found infinity."""
        if float(getattr(self, "found_inf", 0.0)):
            return True
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            inverse = 1.0 / float(scale)
            for bound in pushed:
                assert bound.parameter.grad is not None
                bound.parameter.grad.mul_(inverse)
            self._tables.unscale(inverse)
        return False

    def _send_settings(self) -> None:
        if self._model is not None:
            send_settings(self._model, self._groups, self.param_groups)
        self._tables.send_settings(self.param_groups[len(self._groups) :])

    def _show_settings(self) -> None:
        """Have `param_groups` show what the servers used."""
        if self._model is not None:
            show_settings(self._model, self._groups, self.param_groups)
        self._tables.show_settings(self.param_groups[len(self._groups) :])

    # ── steps on the local copy (DistBelief) ────────────────────────────────────────────────────

    def _step_locally(self, pushed: Sequence[BoundParameter], overflowed: bool) -> None:
        """Add the gradients to what is to be pushed, descend on the local copy, push and read when due."""
        if self._binding is not None:
            self._binding.before_read()
        if overflowed or not self._accrue(pushed):
            self._tables.discard()
        self._taken += 1
        push, pull = self._taken % self._push_every == 0, self._taken % self._pull_every == 0
        if push:
            self._push_accrued(read=pull)
        elif pull:
            self.pull_parameters()

    def _accrue(self, pushed: Sequence[BoundParameter]) -> bool:
        """Take all gradients over and descend, or none where one is not finite; whether it did."""
        hosts = [bound.to_host() for bound in pushed]
        wait_for_copies(pushed)
        bad = [
            bound.name
            for bound, host in zip(pushed, hosts, strict=True)
            if not bound.is_finite(host, add=bound.name in self._accrued)
        ]
        bad_tables = self._tables.not_finite()
        if (bad or bad_tables) and self._nonfinite != "off":
            if self._nonfinite == "raise":
                self._report_nonfinite(bad, bad_tables)
            return False
        for bound, host in zip(pushed, hosts, strict=True):
            bound.stage(host, add=bound.name in self._accrued)
            self._accrued.add(bound.name)
        self._tables.accrue()
        self._descend()
        if self._binding is not None:
            self._binding.wrote()
        return True

    def _descend(self) -> None:
        """p −= lr · g, of parameters; rows are read anew in every forward"""
        for group in self.param_groups[: len(self._groups)]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-float(group["lr"]))

    def _push_accrued(self, read: bool) -> None:
        bad_tables = self._tables.write(accrued=True)
        if self._nonfinite != "off":
            self._report_nonfinite([], bad_tables)
        self._carry(self._accrued, accrued=True, buffers=read)
        self._accrued.clear()
        self.result = self._worker.step(read=self._models if read else False)
        self._show_settings()

    @torch.no_grad()
    def flush(self) -> None:
        """Send the gradients that `push_every` still holds back and read; blocks as a step.

        Does nothing where nothing is held back.
        """
        if self._accrued or self._tables.accrued:
            self._check()
            self._push_accrued(read=True)

    def _joined_late(self) -> bool:
        """Whether the model was trained before this program joined it, and has not stepped since."""
        return self._model is not None and self._model.local.settings.first is not None

    def _restore(self) -> None:
        """Replace what a program has loaded that joined a trained model, before it computes with that."""
        if self._binding is not None and self._joined_late():
            self._binding.before_read()
        if self._look is not None:
            self._buffers.discard_changes()
            self._look.remove()
            self._look = None

    def _check_nothing_is_held_back(self) -> None:
        if self._accrued or self._tables.accrued:
            raise UsageError(
                "this DistributedOptimizer holds gradients back for its next push, which another one for the "
                "same parameters would lose: call its flush() first"
            )

    # ── values ──────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def pull_parameters(self) -> None:
        """Get the servers' current parameters and buffers into the module; blocks for an exchange each.

        After a barrier, this is how every worker evaluates the same version.
        """
        self._check()
        if self._binding is not None:
            self._binding.before_pull()
        self._buffers.discard_changes()
        for model in self._models:
            model.local.changed_here()
            model.pull()

    @torch.no_grad()
    def push_parameters(self) -> None:
        """Set the servers' parameters and buffers to the module's, a version each; blocks for them.

        For one worker to call, after `module.load_state_dict` for example; the others see it with their
        next step. The rule's state stays.
        """
        self._check()
        if self._binding is not None:
            self._binding.assign()
        self._buffers.push()

    def _check(self) -> None:
        self._tables.check()
        if self._binding is not None:
            self._binding.check(self)
        check_frozen(self._worker, self._frozen)


def _before_first_forward(module: torch.nn.Module, optimizer: DistributedOptimizer) -> RemovableHandle:
    mine = weakref.ref(optimizer)

    def restore(*_: object) -> None:
        found = mine()
        if found is not None:
            found._restore()

    return module.register_forward_pre_hook(restore)
