"""Metrics of followers, as they tell the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from headwater.messages import ClusterStatistics, FollowerProgress
from headwater.observe.metric import Metric, Read, Sample, plain


def _each(value: Callable[[ClusterStatistics, FollowerProgress], float]) -> Read:
    def read(statistics: ClusterStatistics) -> Iterator[Sample]:
        for follower in statistics.followers:
            yield (str(follower.member),), value(statistics, follower)

    return read


FOLLOWER_METRICS: tuple[Metric, ...] = (
    Metric(
        "headwater_followers",
        "gauge",
        "",
        "Followers of models and tables that are there.",
        plain(lambda s: len(s.followers)),
    ),
    Metric(
        "headwater_follower_age_seconds",
        "gauge",
        "seconds",
        "Time since a follower was told that what it shows is the newest version.",
        _each(lambda s, follower: follower.age),
        ("member",),
    ),
    Metric(
        "headwater_follower_lag_commits",
        "gauge",
        "commits",
        "Commits that what a follower shows is behind the log.",
        _each(lambda s, follower: max(0, s.version - follower.version)),
        ("member",),
    ),
    Metric(
        "headwater_follower_versions",
        "counter",
        "",
        "Versions that a follower has shown.",
        _each(lambda s, follower: follower.installed),
        ("member",),
    ),
    Metric(
        "headwater_follower_received_bytes",
        "counter",
        "bytes",
        "Parameters and rows that a follower has received.",
        _each(lambda s, follower: follower.received),
        ("member",),
    ),
)
