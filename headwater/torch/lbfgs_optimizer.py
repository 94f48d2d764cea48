"""L-BFGS on the sum of all workers' losses, as torch's optimizer of that name is used.

Invariants: those of `headwater.worker.lbfgs_run`; a parameter without a gradient has a gradient of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch

from headwater.errors import ConfigurationError, UsageError
from headwater.machines.lbfgs import LBFGS as Settings
from headwater.machines.lbfgs import Report
from headwater.spec.amounts import text
from headwater.spec.rules import SGD
from headwater.torch.binding import Binding
from headwater.torch.parameters import find_parameters, tied_names, wait_for_copies
from headwater.torch.tables import TrainedTables
from headwater.worker import Worker
from headwater.worker.lbfgs_run import LBFGSRun, ModelCarrier, finite_loss, prepare
from headwater.worker.model_spec import check_weight


class LBFGS(torch.optim.Optimizer):
    """Minimises the sum (or weighted mean) of all workers' losses over the parameters of `module`.

    `step(closure)` takes up to `max_iter` iterations, as `torch.optim.LBFGS` does: closure clears the
    gradients, computes this worker's part of the loss, calls backward and returns the loss. All declared
    workers call `step` together; all get the same values and stop at the same evaluation. For the
    optimum to be that of all data, the loss must be a sum over samples (a mean needs `weight`): nobody can
    see whether it is.

    The curvature is remembered in `2 · history_size + 8` vectors on the servers, each as large as the
    parameters. Arguments are those of torch, and so are the points at which losses are evaluated, but for
    rounding. Construction blocks until all workers have come to it.

    Attributes:
        report: of the last step: f, ‖g‖, step length, evaluations, why it stopped, and which condition its
            last line search failed; None before.

    Raises:
        ConfigurationError: an impossible argument, a module with tables, or nothing to train.
        RegistrationError: a float64 parameter, or another model of that name.
    """

    def __init__(
        self,
        worker: Worker,
        module: torch.nn.Module,
        lr: float = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 10,
        line_search_fn: Literal["strong_wolfe"] | None = "strong_wolfe",
        curvature: float = 0.9,
        *,
        name: str = "model",
    ) -> None:
        settings = Settings(
            lr,
            max_iter,
            max_eval,
            tolerance_grad,
            tolerance_change,
            history_size,
            line_search_fn,
            curvature,
        )
        if not isinstance(worker, Worker):
            raise ConfigurationError(f"LBFGS(worker, module): got {worker!r} as worker")
        if not isinstance(module, torch.nn.Module):
            raise ConfigurationError(f"LBFGS(worker, module): got a {type(module).__name__} as module")
        name = text("name", name)
        module = getattr(module, "_orig_mod", module)
        if TrainedTables(module):
            raise ConfigurationError("LBFGS is for dense parameters: rows of tables have no common vector")
        trained = find_parameters(module)
        if not trained:
            raise ConfigurationError("LBFGS: the module has no parameter that needs a gradient")
        known = Binding.known(worker, name, trained)
        values = {one: parameter.detach() for one, parameter in trained.items()}
        aliases = tied_names(module, trained)
        self._model = worker.model(name, values, SGD(lr=1.0), aliases=aliases, nonfinite="off")
        self._binding = known or Binding(worker, self._model, module, trained)
        prepare(self._model, settings)
        self.report: Report | None = None
        defaults = {field: getattr(settings, field) for field in Settings.__dataclass_fields__}
        super().__init__(list(trained.values()), defaults)
        self._binding.belong_to(self, watched=True)

    def step(self, closure: Callable[[], Any] | None = None, *, weight: float | None = None) -> torch.Tensor:  # type: ignore[override]
        """Up to `max_iter` iterations; blocks until all workers have made them.

        Args:
            closure: computes this worker's loss anew, and its gradients.
            weight: what this worker's loss counts in the weighted mean that is then minimised, such as the
                samples that it is the mean of. All workers pass one, or none does.

        Returns:
            the loss at the parameters that it began with, of all workers together: a float64 scalar.

        Raises:
            UsageError: there is no closure.
            StalledError: other workers are somewhere else in their programs, or have finished; names them.
        """
        if closure is None:
            raise UsageError("LBFGS.step needs a closure that computes the loss and its gradients anew")
        self._binding.check(self)
        weight = None if weight is None else check_weight(weight)
        if weight == 0:
            raise ConfigurationError(
                "LBFGS.step: weight=0: leave the worker out, or give it a part of the data"
            )
        run = LBFGSRun(ModelCarrier(self._model, lambda: self._evaluate(closure), weight))
        group = self.param_groups[0]
        settings = Settings(**{name: group[name] for name in Settings.__dataclass_fields__})
        self.report = run.step(settings)
        return torch.tensor(self.report.first_loss, dtype=torch.float64)

    def _evaluate(self, closure: Callable[[], Any]) -> float:
        with torch.enable_grad():
            loss = closure()
        finite = True
        present = [bound for bound in self._binding.bounds.values() if bound.parameter.grad is not None]
        hosts = [bound.to_host() for bound in present]
        wait_for_copies(present)
        for bound, host in zip(present, hosts, strict=True):
            finite &= bound.stage(host)
        for name, bound in self._binding.bounds.items():
            if bound.parameter.grad is None:
                self._model.gradients[name][...] = 0
        return finite_loss(loss, finite)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible once it is constructed: L-BFGS has one group, of all parameters."""
        if self.param_groups:
            self._refuse()
        super().add_param_group(param_group)

    def _refuse(self) -> NoReturn:
        raise UsageError("LBFGS has one parameter group, of all parameters of its module")
