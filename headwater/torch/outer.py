"""Training far apart: an ordinary optimizer steps here, and now and then what it changed is a step there.

The module's parameters keep memory of their own, which the user's optimizer writes. What the servers do with
the changes, and when they travel, is the business of `headwater.worker.local_steps`.

Invariants:
- Between outer steps only the inner optimizer writes parameters; what a program writes is refused.
- The inner optimizer's state, a compiled module and autograd's graph see parameters change in place only.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from headwater.errors import ConfigurationError, UsageError
from headwater.messages import StepResult
from headwater.spec.rules import Rule
from headwater.torch.buffers import BufferMode, SharedBuffers, check_mode
from headwater.torch.optimizer import DistributedOptimizer
from headwater.torch.parameters import find_parameters, tied_names
from headwater.worker import Worker
from headwater.worker.local_steps import Array, FragmentClaim, LocalSteps, OuterPlan, Weighing
from headwater.worker.model_spec import NonFinite, check_nonfinite, check_weight, named


class OuterOptimizer:
    """The outer of two optimizers: sends what the inner one changed, every so many steps of it.

        inner = torch.optim.AdamW(net.parameters(), 3e-4)
        rule = hw.SGD(0.7, momentum=0.9, nesterov=True)
        outer = hw.torch.OuterOptimizer(worker, net, inner, rule, every=24)
        ...
        loss.backward(); inner.step(); outer.step(); inner.zero_grad()

    With `sync` this is DiLoCo (Douillard et al. 2023), and with `hw.SGD(1.0)` federated averaging (McMahan et
    al. 2017), with Adam or Yogi FedAdam and FedYogi (Reddi et al. 2021); with `async` asynchronous local SGD;
    with `sync:quorum=K,grace=…,late=carry` Decoupled DiLoCo. See docs/local-steps.md.

    After `every` local steps the change of the parameters since the servers last gave them goes out as a
    gradient, and what the servers make of all changes takes the parameters' place. The module begins with the
    values of the servers. Frozen parameters stay, tied ones travel once. `torch.compile` and
    `torch.amp.GradScaler` work on the module and the inner optimizer as they do by themselves.

    Args:
        worker: joined, used by this thread.
        module: its parameters that need a gradient are trained, on its device and of its dtype.
        inner: an optimizer of torch over these parameters; it keeps its state.
        outer_rule: what the servers do with a change.
        every: local steps between two sends of a fragment, at least 1.
        fragments: sets of whole tensors of about equal size, sent in turn, at equal distances in `every`.
        merge, codec, values_codec: as in `Worker.model`.
        overlap: local steps for which a fragment is under way; less than `every // fragments`.
        blend: of the local parameters in what they become when a fragment is received, from 0 to 1.
        weight: what a change counts in a mean: "one"; "samples", what `step` was told since it was sent last;
            "tokens", tokens²/steps.
        name: of the model; with several fragments, of `NAME.0`, `NAME.1`, …
        buffers: "mean", "rank0" or "local", as in `DistributedOptimizer`; they travel with every outer step.
        nonfinite: what parameters that are not finite do to a send: "raise", "skip" (an empty turn; the
            servers' values take their place) or "off".

    Raises:
        ConfigurationError: an impossible argument, or an inner optimizer over other parameters.
        RegistrationError: nothing to train, a float64 parameter, or another model of that name.
    """

    def __init__(
        self,
        worker: Worker,
        module: torch.nn.Module,
        inner: torch.optim.Optimizer,
        outer_rule: Rule,
        *,
        every: int = 24,
        fragments: int = 1,
        merge: str | None = "mean",
        codec: str | None = None,
        values_codec: str | None = None,
        overlap: int = 0,
        blend: float = 0.0,
        weight: Weighing = "one",
        name: str = "model",
        buffers: BufferMode = "mean",
        nonfinite: NonFinite = "raise",
    ) -> None:
        module = getattr(module, "_orig_mod", module)  # what torch.compile wraps: names must not depend on it
        _check_arguments(worker, module, inner)
        check_mode(buffers)
        check_nonfinite(nonfinite)
        trained = find_parameters(module)
        _check_inner(inner, trained)
        plan = OuterPlan(every, fragments, overlap, blend, weight, len(trained))
        self._counts = weight != "one"
        self._inner = inner
        self._frozen = {one: p for one, p in module.named_parameters() if not p.requires_grad}
        self._parameters = _Parameters(module, trained)
        self._claim = FragmentClaim()
        self._steps = LocalSteps(
            worker,
            self._parameters,
            {one: parameter.detach() for one, parameter in trained.items()},
            outer_rule,
            plan,
            name=name,
            merge=None if getattr(outer_rule, "always_sum", False) and merge == "mean" else merge,
            codec=codec,
            values_codec=values_codec,
            aliases=tied_names(module, trained),
            nonfinite=nonfinite,
            claim=self._claim,
        )
        self._claim.models = [fragment.model for fragment in self._steps.fragments]
        shared = SharedBuffers.known(worker, module, f"{name}.buffers", buffers)
        self._buffers = shared or SharedBuffers(worker, module, f"{name}.buffers", buffers)
        self._parameters.buffers = self._buffers
        if self._buffers.model is not None:
            self._steps.also = [self._buffers.model]
        self._hooks = _watch(inner, self._parameters)

    @property
    def result(self) -> StepResult | None:
        """Of the last outer step that was answered; None before."""
        return self._steps.result

    @property
    def fragments(self) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters of each fragment, in the order in which they are sent."""
        return tuple(fragment.names for fragment in self._steps.fragments)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def step(self, count: float | None = None) -> None:
        """Say that the inner optimizer has made a step; sends, and receives, what is due.

        Blocks as the mode says where a fragment is received; with `overlap` most of that time has passed.

        Args:
            count: samples or tokens that the step was computed from; needed where `weight` says so.

        Raises:
            ConfigurationError: no `count` where `weight` needs one, or an impossible one.
            NonFiniteError: a parameter to be sent is not finite, with `nonfinite="raise"`; nothing was sent.
            UsageError: parameters were written by hand, moved or unfrozen; names them. Nothing was sent.
            StalledError: no answer within the deadline; names whom it waited for; final for this worker.
            ClosedError: the worker has left.
        """
        if count is None and self._counts:
            raise ConfigurationError(
                "step: weight='samples' and 'tokens' need to know how many each local step was computed "
                "from: call step(len(batch))"
            )
        weighed = check_weight(0.0 if count is None else count)
        self._check()
        self._steps.step(weighed)
        self._parameters.note()

    @torch.no_grad()
    def finish(self) -> None:
        """Block for the fragment that is under way and take it over; nothing where there is none.

        Until then the worker's other calls (`barrier`, `sum`, tables) are refused. Raises as `step`.
        """
        self._steps.finish()
        self._parameters.note()

    @torch.no_grad()
    def flush(self) -> None:
        """Send what was not sent yet and take over what comes back; an outer step for each fragment.

        For all workers at one place of the program, such as the end. Raises as `step`.
        """
        self._check()
        self._steps.flush()
        self._parameters.note()

    # ── values ──────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def pull_parameters(self) -> None:
        """Get the servers' current parameters and buffers into the module; what was not sent is given up.

        After a barrier, this is how every worker evaluates the same version. Blocks for some exchanges.
        """
        self._steps.pull()
        self._buffers.discard_changes()
        if self._buffers.model is not None:
            self._buffers.model.local.changed_here()
            self._buffers.model.pull()
        self._parameters.note()

    @torch.no_grad()
    def push_parameters(self) -> None:
        """Set the servers' parameters and buffers to the module's, a version each; blocks for them.

        For one worker to call, after `module.load_state_dict` for example; the others see it when they
        receive next. The rule's state stays.
        """
        self._steps.push()
        self._buffers.push()
        self._parameters.note()

    # ── for resuming ────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, for this rank to save; all else is the servers'.

        What was trained since the last outer step is in no checkpoint: a program that goes on from one begins
        with the servers' values.
        """
        return {"inner": self._inner.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Have the inner optimizer go on with a state that `state_dict` returned.

        Raises:
            ConfigurationError: it is none.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"inner"}:
            raise ConfigurationError(
                "load_state_dict: expected what OuterOptimizer.state_dict() returned, with the key 'inner'"
            )
        self._inner.load_state_dict(dict(state_dict["inner"]))

    def _check(self) -> None:
        if lost := self._claim.lost:
            raise UsageError(
                f"another OuterOptimizer was made for model {lost!r} after this one and has taken it over: "
                f"use that one"
            )
        self._parameters.check()
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise UsageError(
                    f"parameter {name!r} needs a gradient now, but was frozen when the OuterOptimizer was "
                    f"made and would not be sent: make the optimizers while it needs one"
                )


class _Parameters:
    """The parameters of a module as `Local` ones; notices who else writes them.

    Attributes:
        buffers: travel with the parameters; None before there are any.
    """

    def __init__(self, module: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter]) -> None:
        self._module = module
        self._trained = dict(trained)
        self.buffers: SharedBuffers | None = None
        self._versions: list[int] = []
        self.note()

    def read(self, names: Sequence[str]) -> Mapping[str, Any]:
        """As `Local.read`; float32 on the CPU."""
        return {name: self._trained[name].detach().to("cpu", torch.float32).numpy() for name in names}

    def write(self, values: Mapping[str, Array]) -> None:
        """As `Local.write`."""
        with torch.no_grad():
            for name, value in values.items():
                self._trained[name].copy_(torch.from_numpy(value))
        self.note()

    def sending(self) -> None:
        """As `Local.sending`."""
        if self.buffers is not None:
            self.buffers.carry()

    def note(self) -> None:
        """What parameters are now is not the program's doing."""
        self._versions = [parameter._version for parameter in self._trained.values()]

    def refuse_writes(self) -> None:
        """Raise UsageError where the program has written to parameters since `note`; names them."""
        then = zip(self._trained.items(), self._versions, strict=True)
        written = [name for (name, parameter), version in then if parameter._version != version]
        if written:
            raise UsageError(
                f"the program wrote to {named(written)} since the last step of the inner optimizer, which "
                f"would go out as if it had been trained: write to parameters before the OuterOptimizer is "
                f"made; or in one worker, and call push_parameters(); pull_parameters() takes the servers' "
                f"values back"
            )

    def check(self) -> None:
        """Raise UsageError where a parameter was replaced or written by hand; names it."""
        found = dict(self._module.named_parameters())
        for name, parameter in self._trained.items():
            if found.get(name) is not parameter:
                raise UsageError(
                    f"parameter {name!r} of the module was replaced by another one, which would not be sent: "
                    f"replace parameters before the optimizers are made, or copy values with torch.no_grad() "
                    f"and copy_"
                )
        self.refuse_writes()


def _watch(inner: torch.optim.Optimizer, parameters: _Parameters) -> Sequence[RemovableHandle]:
    """Tell the inner optimizer's writes from others; the hooks keep nothing alive."""
    mine = weakref.ref(parameters)

    def before(*_: Any) -> None:
        found = mine()
        if found is not None:
            found.refuse_writes()

    def after(*_: Any) -> None:
        found = mine()
        if found is not None:
            found.note()

    return inner.register_step_pre_hook(before), inner.register_step_post_hook(after)


def _check_arguments(worker: Any, module: Any, inner: Any) -> None:
    """Raise ConfigurationError unless these are a worker, a module and an optimizer; says what to pass."""
    if not isinstance(worker, Worker) or not isinstance(module, torch.nn.Module):
        raise ConfigurationError(
            f"OuterOptimizer takes a worker and a module first, got {type(worker).__name__} and "
            f"{type(module).__name__}: pass OuterOptimizer(worker, module, inner, rule)"
        )
    if not isinstance(inner, torch.optim.Optimizer) or isinstance(inner, DistributedOptimizer):
        raise ConfigurationError(
            f"the inner optimizer must be one of torch's, which steps here, got {type(inner).__name__}"
        )


def _check_inner(inner: torch.optim.Optimizer, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """Raise ConfigurationError unless the inner optimizer has these parameters and no other."""
    own = [parameter for group in inner.param_groups for parameter in group["params"]]
    known = {id(parameter) for parameter in trained.values()}
    others = sum(id(parameter) not in known for parameter in own if parameter.requires_grad)
    if others:
        raise ConfigurationError(
            f"the inner optimizer has {others} parameters that are none of the module's, which would be "
            f"trained here alone: make it of module.parameters()"
        )
    mine = {id(parameter) for parameter in own}
    missing = [name for name, parameter in trained.items() if id(parameter) not in mine]
    if missing:
        raise ConfigurationError(
            f"the inner optimizer has no parameter {named(missing)} of the module, which would never "
            f"change: give it all parameters, or freeze these"
        )
