"""The coordinator node and what it consists of."""

from headwater.runtime.coordinator.node import CoordinatorNode
from headwater.runtime.coordinator.settings import ClusterSettings

__all__ = ["ClusterSettings", "CoordinatorNode"]
