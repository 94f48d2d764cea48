"""L-BFGS on the sum of all workers' losses, over a pytree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import jax
import numpy as np

from headwater.errors import ConfigurationError
from headwater.jax.trained_trees import DistributedOptimizer
from headwater.machines.lbfgs import LBFGS as Settings
from headwater.machines.lbfgs import Report
from headwater.spec.rules import SGD
from headwater.worker import Worker
from headwater.worker.lbfgs_run import LBFGSRun, ModelCarrier, finite_loss, prepare
from headwater.worker.model_spec import check_weight

__all__ = ["LBFGS"]

Tree = TypeVar("Tree")


class LBFGS(Generic[Tree]):
    """Minimises the sum (or weighted mean) of all workers' losses over a pytree of parameters.

    As `headwater.torch.LBFGS`, for functions of JAX: all declared workers call `step` together, get the same
    values and stop at the same evaluation. For the optimum to be that of all data, losses must be sums
    over samples, or means with `weight`. Construction blocks until all workers have come to it.

    Attributes:
        params: the tree that was returned last, at first the initial values.
        report: of the last step; None before.

    Raises:
        ConfigurationError: an impossible argument.
        RegistrationError: as `DistributedOptimizer`.
    """

    def __init__(
        self,
        worker: Worker,
        params: Tree,
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
        self._settings = Settings(
            lr,
            max_iter,
            max_eval,
            tolerance_grad,
            tolerance_change,
            history_size,
            line_search_fn,
            curvature,
        )
        self._tree = DistributedOptimizer(worker, params, SGD(lr=1.0), name=name, nonfinite="off")
        self.report: Report | None = None
        prepare(self._tree.model, self._settings)

    @property
    def params(self) -> Tree:
        return self._tree.params

    def step(self, loss_and_grad: Callable[[Tree], tuple[Any, Any]], *, weight: float | None = None) -> Tree:
        """Up to `max_iter` iterations; blocks until all workers have made them; returns the new parameters.

        Args:
            loss_and_grad: given parameters, this worker's loss and its gradients, a tree like the parameters,
                as `jax.value_and_grad` makes it. A leaf that is missing counts as zeros.
            weight: what this worker's loss counts in the weighted mean that is then minimised. All workers
                pass one, or none does.

        Raises:
            GradientError: gradients that the parameters do not have.
            StalledError: other workers are somewhere else in their programs, or have finished; names them.
        """
        self._tree._check_owner()
        weight = None if weight is None else check_weight(weight)
        if weight == 0:
            raise ConfigurationError("LBFGS.step: weight=0: every worker must have a part of the data")
        run = LBFGSRun(ModelCarrier(self._tree.model, lambda: self._evaluate(loss_and_grad), weight))
        self.report = run.step(self._settings)
        self._tree.params = self._tree._read()
        return self.params

    def _evaluate(self, loss_and_grad: Callable[[Tree], tuple[Any, Any]]) -> float:
        model = self._tree.model
        loss, grads = loss_and_grad(self._tree._read())
        with jax.transfer_guard("allow"):
            found = model.local.checked(self._tree._by_name(grads))
        for name, view in model.gradients.items():
            view[...] = found.get(name, 0)
        return finite_loss(loss, all(bool(np.isfinite(view).all()) for view in model.gradients.values()))
