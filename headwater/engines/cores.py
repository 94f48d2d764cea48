"""How many cores this process may use: those it is bound to, and what its control groups grant it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_cores(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """At least 1. A machine's number of cores says nothing in a container, or under a scheduler.

    Args:
        groups: where the system shows control groups.
        own: which ones this process is in, as /proc/self/cgroup says.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(int(quota) for quota in _quotas(groups, own))]))


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """Cores that each control group above this process grants, where one is limited."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for all
            for folder in _upwards(groups, path):
                yield from _quota(folder / "cpu.max")
        elif "cpu" in controllers.split(","):
            for tree in (groups / controllers, groups / "cpu"):
                for folder in _upwards(tree, path):
                    yield from _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _upwards(tree: Path, path: str) -> Iterator[Path]:
    """The folder of a control group, and those of all above it. Inside a container only some are there."""
    folder = tree / path.lstrip("/")
    yield folder
    while folder != tree:
        folder = folder.parent
        yield folder


def _quota(*files: Path) -> Iterator[float]:
    """quota / period as files have them: both in one, or one in each; nothing where there is no limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()[:2]
        if int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return  # "max", or -1, or no such file
