"""Readers beside training: a follower keeps a copy of models and tables, and shows one version at a time."""

from headwater.follower.changes import Change, TableChange, ValueRun
from headwater.follower.public import Follower, follow
from headwater.follower.statistics_of import FollowerStatistics
from headwater.follower.view import View

__all__ = ["Change", "Follower", "FollowerStatistics", "TableChange", "ValueRun", "View", "follow"]
