"""Training JAX programs: pytrees of parameters on the servers."""

from __future__ import annotations

from headwater.jax.lbfgs_trees import LBFGS
from headwater.jax.outer_trees import OuterOptimizer
from headwater.jax.trained_trees import DistributedOptimizer

__all__ = ["LBFGS", "DistributedOptimizer", "OuterOptimizer"]
