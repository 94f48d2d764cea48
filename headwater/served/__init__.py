"""Nodes that are started one by one, by whatever scheduler there is, and find together by themselves."""

from headwater.served.cluster import ServedCluster
from headwater.served.server import ServedServer
from headwater.served.worker import ServedWorker

__all__ = ["ServedCluster", "ServedServer", "ServedWorker"]
