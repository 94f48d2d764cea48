"""The coordinator node and what it consists of."""

from headwater.nodes.coordinator.node import CoordinatorNode
from headwater.nodes.coordinator.settings import ClusterSettings

__all__ = ["ClusterSettings", "CoordinatorNode"]
