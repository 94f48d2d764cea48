"""Nodes that are started one by one, by whatever scheduler there is, and find together by themselves."""

from headwater.standalone.cluster import StandaloneCluster
from headwater.standalone.follower_process import StandaloneFollower
from headwater.standalone.server import StandaloneServer
from headwater.standalone.worker import StandaloneWorker

__all__ = ["StandaloneCluster", "StandaloneFollower", "StandaloneServer", "StandaloneWorker"]
