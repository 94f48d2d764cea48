"""Training JAX programs: pytrees of parameters on the servers."""

from __future__ import annotations

from headwater.jax.outer_trees import OuterOptimizer
from headwater.jax.trained_trees import DistributedOptimizer

__all__ = ["DistributedOptimizer", "OuterOptimizer"]
