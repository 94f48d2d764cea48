"""Metrics of the cluster as a whole, and of the steps that its workers take."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import headwater
from headwater.messages import ClusterStatistics
from headwater.observe import readings as of
from headwater.observe.metric import EVERYWHERE, HOST_LABELS, HOSTS, WORKERS, Metric, Sample, by_rank, plain
from headwater.spec.stages import COMMITS, SECONDS


def _versions(statistics: ClusterStatistics) -> Iterator[Sample]:
    yield (headwater.__version__, platform.python_version()), 1


CLUSTER_METRICS: tuple[Metric, ...] = (
    Metric(
        "headwater_build_info",
        "gauge",
        "info",
        "Versions of Headwater and Python; always 1.",
        _versions,
        ("version", "python"),
        EVERYWHERE,
    ),
    Metric(
        "headwater_uptime_seconds",
        "gauge",
        "seconds",
        "Time since the coordinator's process began.",
        plain(lambda s: s.uptime),
    ),
    Metric(
        "headwater_version",
        "gauge",
        "",
        "Number of commits in the log.",
        plain(lambda s: s.version),
        of=EVERYWHERE,
    ),
    Metric(
        "headwater_commits",
        "counter",
        "",
        "Commits in the log; begins where a resumed training does, and falls when training begins anew.",
        plain(lambda s: s.version),
        of=HOSTS,
    ),
    Metric(
        "headwater_generation",
        "gauge",
        "",
        "How often training began anew from a checkpoint.",
        plain(lambda s: s.generation),
    ),
    Metric("headwater_term", "gauge", "", "Number of the roster's last change.", plain(lambda s: s.term)),
    Metric(
        "headwater_declared",
        "gauge",
        "",
        "Workers and servers that the cluster was declared with.",
        of.declared,
        ("role",),
    ),
    Metric("headwater_members", "gauge", "", "Members now.", of.members, ("role",)),
    Metric(
        "headwater_member_silence_seconds",
        "gauge",
        "seconds",
        "Time since the coordinator heard of a member.",
        of.silence,
        HOST_LABELS,
    ),
    Metric(
        "headwater_members_waiting",
        "gauge",
        "",
        "Members that wait for somebody, or are waited for in vain.",
        of.waiting,
        ("role",),
    ),
    Metric(
        "headwater_members_joined",
        "counter",
        "",
        "Members that joined since the coordinator's process began.",
        lambda s: of.by_name(s.members.joined),
        ("role",),
    ),
    Metric(
        "headwater_members_lost",
        "counter",
        "",
        "Members that were declared dead since the coordinator's process began.",
        lambda s: of.by_name(s.members.lost),
        ("role",),
    ),
    Metric(
        "headwater_workers_finished",
        "gauge",
        "",
        "Declared workers that have done all their work.",
        plain(lambda s: len(s.finished)),
    ),
    Metric(
        "headwater_spares",
        "gauge",
        "",
        "Nodes that wait to become a server or standby.",
        plain(lambda s: s.spares),
    ),
    Metric(
        "headwater_unvisited_samples",
        "gauge",
        "samples",
        "Samples that a worker left and nobody took over.",
        plain(lambda s: sum(one.samples for one in s.unvisited)),
    ),
)

STEP_METRICS: tuple[Metric, ...] = (
    Metric(
        "headwater_steps",
        "counter",
        "",
        "Finished steps of all workers by what became of them: applied, late, carried or skipped.",
        of.steps,
        ("result",),
        WORKERS,
    ),
    Metric(
        "headwater_worker_steps",
        "counter",
        "",
        "Finished steps of a rank over all its incarnations.",
        by_rank(lambda t: sum(t.steps.values())),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_samples",
        "counter",
        "",
        "Samples that batches have handed out to a rank.",
        by_rank(lambda t: t.samples),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_worker_incarnations",
        "gauge",
        "",
        "Incarnations of a rank so far.",
        by_rank(lambda t: t.incarnations),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_staleness_commits",
        "histogram",
        "commits",
        "Commits between the version that a gradient was computed on and its own, of all steps.",
        of.staleness,
        of=WORKERS,
        bounds=COMMITS,
    ),
    Metric(
        "headwater_stage_seconds",
        "histogram",
        "seconds",
        "Time that a turn spent in a stage (data, compute, push, wait, pull), of all workers.",
        of.stages,
        ("stage",),
        WORKERS,
        SECONDS,
    ),
    Metric(
        "headwater_wait_seconds",
        "counter",
        "seconds",
        "Time that a rank spent in exchanges with the servers.",
        by_rank(lambda t: t.waiting),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_exposed_seconds",
        "counter",
        "seconds",
        "Time for which the cluster waited for this rank in this stage; adds up to the time of the steps.",
        of.exposed,
        ("rank", "stage"),
    ),
    Metric(
        "headwater_gradient_norm",
        "gauge",
        "",
        "Norm of the last commit's gradient, of models that are clipped or merged by lengths.",
        of.norms,
        ("model",),
        WORKERS,
    ),
    Metric(
        "headwater_nonfinite_steps",
        "counter",
        "",
        "Steps of a rank that were empty turns because a gradient held NaN or infinity.",
        by_rank(lambda t: t.steps.get("skipped", 0)),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_logged",
        "gauge",
        "",
        "What Worker.log was last told, by rank and name; at most 2,000 series.",
        of.logged,
        ("rank", "name"),
        WORKERS,
    ),
    Metric(
        "headwater_logged_dropped",
        "gauge",
        "",
        "Metrics of Worker.log that are not shown here, since there are too many.",
        plain(of.logged_dropped),
        of=WORKERS,
    ),
)
