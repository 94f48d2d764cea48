"""Training PyTorch modules: an optimizer whose step pushes gradients and pulls parameters."""

from __future__ import annotations

from headwater.torch.optimizer import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
