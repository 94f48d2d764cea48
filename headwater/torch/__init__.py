"""Training PyTorch modules: an optimizer that steps on the servers, and modules whose rows are there."""

from __future__ import annotations

from headwater.torch.bag import EmbeddingBag
from headwater.torch.collection import EmbeddingBagCollection, EmbeddingBagConfig, pull_rows
from headwater.torch.embedding import Embedding
from headwater.torch.lbfgs_optimizer import LBFGS
from headwater.torch.optimizer import DistributedOptimizer
from headwater.torch.outer import OuterOptimizer

__all__ = [
    "LBFGS",
    "DistributedOptimizer",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "OuterOptimizer",
    "pull_rows",
]
