"""What a `DistributedOptimizer` refuses to be made of, with what to pass instead."""

from __future__ import annotations

from typing import Any

import torch

from headwater.errors import ConfigurationError
from headwater.spec.rules import Rule
from headwater.worker import Worker


def check_arguments(worker: Any, module: Any) -> None:
    """Raise ConfigurationError unless these are a worker and a module; says what to pass."""
    if not isinstance(worker, Worker):
        raise ConfigurationError(
            f"DistributedOptimizer takes the worker first, got {type(worker).__name__}: pass "
            f"DistributedOptimizer(worker, module, rule)"
        )
    if not isinstance(module, torch.nn.Module):
        raise ConfigurationError(
            f"DistributedOptimizer takes the module itself, got {type(module).__name__}: pass "
            f"DistributedOptimizer(worker, net, rule) where torch's optimizers take net.parameters(); "
            f"parameters with settings of their own go into groups=[{{'params': …, 'lr': …}}]"
        )


def check_periods(worker: Worker, rule: Rule | None, push_every: int, pull_every: int) -> bool:
    """Whether there are steps on the local copy alone.

    Raises:
        ConfigurationError: the periods are impossible, here or at all.
    """
    if push_every == pull_every == 1:
        return False
    if worker.mode.rounds:
        raise ConfigurationError(
            f"push_every={push_every}, pull_every={pull_every} need sync='async' or 'ssp:N': synchronous "
            f"workers have one version, which local steps would leave"
        )
    if not hasattr(rule, "lr"):
        raise ConfigurationError(f"push_every and pull_every need a rule with lr, got {rule!r}")
    return True
