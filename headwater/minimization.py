"""Minimise a function of all data with L-BFGS, its evaluations in portions: Sandblaster's schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.data.fetch import fetch, length_of
from headwater.driver import run
from headwater.errors import ConfigurationError, GradientError, UsageError
from headwater.loggers import logger
from headwater.machines.lbfgs import LBFGS, Report
from headwater.spec.amounts import whole
from headwater.spec.rules import SGD
from headwater.worker import Worker
from headwater.worker.lbfgs_run import finite_loss
from headwater.worker.model import Model
from headwater.worker.portion_loop import PortionLoss, compute, minimise

_log = logger("headwater")

_MODEL = "parameters"
Loss: TypeAlias = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Minimum:
    """Where `minimize` has ended.

    Attributes:
        parameters: name → float32 array.
        report: f, ‖g‖, iterations, evaluations, and why it stopped.
        computed: by worker, portions that it computed, copies among them.
        copies: how many of those counted for nothing, because another worker's came first.
        seconds: from the first worker's start to the last one's end.
    """

    parameters: dict[str, NDArray[np.float32]]
    report: Report
    computed: tuple[int, ...]
    copies: int
    seconds: float


def minimize(
    loss: Loss,
    params: Any,
    *,
    data: Any,
    portions: int = 64,
    workers: int = 4,
    servers: int = 2,
    backup: bool = True,
    method: LBFGS | None = None,
    **options: Any,
) -> Minimum:
    """Minimise the sum of `loss` over all of `data`; blocks until `method` has stopped.

    Each evaluation is cut into portions, much smaller than a worker's share. A free worker gets the next one,
    and once all are handed out a copy of one that is not finished; the first finished copy of each counts,
    and gradients are added in the order of portions. So slow workers, copies and deaths change no bit of the
    result, and a worker that stands still costs the time of about one portion. Workers that die are
    started again, as `run` does it. One process more than `workers` decides what is evaluated; when that one
    dies, all ends.

    Args:
        loss: called with (params, samples), for the samples of a portion. With a dict of arrays it
            returns (loss, gradients), gradients as a dict of the same names, as `jax.value_and_grad` gives
            it; with a torch module the loss, on which backward is called. It must be a sum over samples: a
            mean over a portion converges to another optimum, and nothing can tell.
        params: name → array, or a torch module, which is left as it is: the result has the parameters.
        data: arrays, a tuple of arrays, or anything with `__len__` and `__getitem__`; portions are ranges.
        portions: of one evaluation.
        workers: processes that compute.
        backup: whether copies are handed out.
        method: by default `LBFGS(max_iter=100)`.
        options: of `run`: engine, replicas, restarts, deadline (longer than an evaluation), ….

    Raises:
        ConfigurationError: an impossible argument, such as fewer portions than workers; nothing was started.
        WorkerError: `loss` raised in a worker.
    """
    method = LBFGS(max_iter=100) if method is None else method
    portions, workers = whole("minimize: portions", portions), whole("minimize: workers", workers)
    _check(loss, params, data, portions, workers, backup, method)
    if "sync" in options:
        raise ConfigurationError("minimize has a schedule of its own: leave out sync")

    def train(worker: Worker) -> Report | int:
        parameters, evaluation = _evaluation_of(params, loss)
        model = worker.model(_MODEL, parameters, SGD(lr=1.0), nonfinite="off")
        if worker.rank < workers:
            return compute(model, _portion_loss(model, evaluation, data))
        if worker.restarted:
            raise UsageError("minimize: the process that decides what is evaluated died: begin anew")
        return minimise(model, method, portions, backup)

    result = run(train, workers=workers + 1, servers=servers, sync="async", **options)
    *computed, report = result.values
    copies = sum(computed) - report.evaluations * portions
    found = result.parameters[_MODEL]
    return Minimum(found, report, tuple(computed), max(copies, 0), result.seconds)


def _check(loss: Any, params: Any, data: Any, portions: int, workers: int, backup: Any, method: Any) -> None:
    if not callable(loss):
        raise ConfigurationError(f"minimize: loss is {loss!r}, expected a function of (params, samples)")
    if not isinstance(params, Mapping) and not hasattr(params, "named_parameters"):
        raise ConfigurationError(
            f"minimize: params are a {type(params).__name__}, expected a dict of arrays or a torch module"
        )
    if portions < workers:
        raise ConfigurationError(
            f"minimize: {portions} portions for {workers} workers leave some with nothing to do: take "
            f"several times as many portions as workers"
        )
    length = length_of(data)
    if portions > length:
        raise ConfigurationError(f"minimize: {portions} portions of {length} samples: take fewer portions")
    if not isinstance(backup, bool):
        raise ConfigurationError(f"minimize: backup must be True or False, got {backup!r}")
    if not isinstance(method, LBFGS):
        raise ConfigurationError(f"minimize: method must be an LBFGS(…), got {method!r}")


Evaluate: TypeAlias = Callable[[Model, Any], float]
"""Computes the loss of samples, and leaves all gradients in the model's window."""


def _evaluation_of(params: Any, loss: Loss) -> tuple[Mapping[str, Any], Evaluate]:
    """Initial values by name, and how a portion is evaluated."""
    if isinstance(params, Mapping):
        return params, lambda model, samples: _of_arrays(model, loss, samples)
    from headwater.torch.evaluation import ModuleEvaluation

    module = ModuleEvaluation(params, loss)
    return module.values(), module


def _of_arrays(model: Model, loss: Loss, samples: Any) -> float:
    values = {name: view.copy() for name, view in model.parameters.items()}
    found = loss(values, samples)
    if not isinstance(found, Sequence) or len(found) != 2 or not isinstance(found[1], Mapping):
        raise GradientError(f"loss gave {type(found).__name__}, expected (loss, dict of gradients)")
    gradients = model.local.checked(found[1])
    for name, view in model.gradients.items():
        view[...] = gradients.get(name, 0)
    return finite_loss(found[0], all(bool(np.isfinite(view).all()) for view in model.gradients.values()))


def _portion_loss(model: Model, evaluation: Evaluate, data: Any) -> PortionLoss:
    length = length_of(data)

    def of_portion(index: int, count: int) -> float:
        samples = np.arange(length * index // count, length * (index + 1) // count)
        return evaluation(model, fetch(data, samples))

    return of_portion
