"""Headwater, a parameter server: `run` a training function, or start a `Cluster` and join it.

A name is imported when it is first used: `import headwater` costs nothing, and neither does a command that
needs little of it. `headwater.torch` and `headwater.jax` need those libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headwater import errors

if TYPE_CHECKING:  # the same as `_HOMES`, for type checkers and editors
    from headwater import data as data
    from headwater import jax as jax
    from headwater import kvstore as kvstore
    from headwater import torch as torch
    from headwater.checkpoint import load_checkpoint
    from headwater.cluster import Cluster, connect
    from headwater.comparison import Comparison, compare
    from headwater.data import Csv, Files, Parquet
    from headwater.driver import RunResult, run
    from headwater.engines import RayEngine
    from headwater.follower import Change, Follower, FollowerStatistics, TableChange, ValueRun, View, follow
    from headwater.follower.publisher import publish
    from headwater.machines.lbfgs import LBFGS, Report
    from headwater.messages import ClusterStatistics, Progress, StepResult
    from headwater.minimization import Minimum, minimize
    from headwater.observe import sinks
    from headwater.observe.history import History
    from headwater.spec import initializers
    from headwater.spec.initializers import Normal, TruncatedNormal, Uniform, Zeros
    from headwater.spec.lifetime import AfterCount, AfterSteps, LeastRecentlyUsed
    from headwater.spec.registry import register
    from headwater.spec.rules import (
        SGD,
        Accumulate,
        Adagrad,
        Adam,
        AdamW,
        Assign,
        Ftrl,
        Lamb,
        Lion,
        RMSprop,
        RowwiseAdagrad,
        Rule,
        Yogi,
    )
    from headwater.spec.schedules import Constant, Cosine, Linear, Schedule, StepDecay
    from headwater.spec.sync import Asynchronous, Mode, StaleSynchronous, Synchronous
    from headwater.spec.version import Version
    from headwater.weights import load_weights
    from headwater.wire.security import TLS
    from headwater.worker import Worker, WorkerStatistics
    from headwater.worker.model import Model
    from headwater.worker.model_spec import Group
    from headwater.worker.pending_step import PendingStep
    from headwater.worker.table import Table

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "SGD",
    "TLS",
    "Accumulate",
    "Adagrad",
    "Adam",
    "AdamW",
    "AfterCount",
    "AfterSteps",
    "Assign",
    "Asynchronous",
    "Change",
    "Cluster",
    "ClusterStatistics",
    "Comparison",
    "Constant",
    "Cosine",
    "Csv",
    "Files",
    "Follower",
    "FollowerStatistics",
    "Ftrl",
    "Group",
    "History",
    "Lamb",
    "LeastRecentlyUsed",
    "Linear",
    "Lion",
    "Minimum",
    "Mode",
    "Model",
    "Normal",
    "Parquet",
    "PendingStep",
    "Progress",
    "RMSprop",
    "RayEngine",
    "Report",
    "RowwiseAdagrad",
    "Rule",
    "RunResult",
    "Schedule",
    "StaleSynchronous",
    "StepDecay",
    "StepResult",
    "Synchronous",
    "Table",
    "TableChange",
    "TruncatedNormal",
    "Uniform",
    "ValueRun",
    "Version",
    "View",
    "Worker",
    "WorkerStatistics",
    "Yogi",
    "Zeros",
    "compare",
    "connect",
    "errors",
    "follow",
    "initializers",
    "kvstore",
    "load_checkpoint",
    "load_weights",
    "minimize",
    "publish",
    "register",
    "run",
    "sinks",
]

_SUBMODULES = ("data", "jax", "kvstore", "torch")
_HOMES = {
    "checkpoint": ("load_checkpoint",),
    "cluster": ("Cluster", "connect"),
    "comparison": ("Comparison", "compare"),
    "data": ("Csv", "Files", "Parquet"),
    "driver": ("RunResult", "run"),
    "engines": ("RayEngine",),
    "follower.publisher": ("publish",),
    "follower": ("Change", "Follower", "FollowerStatistics", "TableChange", "ValueRun", "View", "follow"),
    "machines.lbfgs": ("LBFGS", "Report"),
    "messages": ("ClusterStatistics", "Progress", "StepResult"),
    "minimization": ("Minimum", "minimize"),
    "observe": ("sinks",),
    "observe.history": ("History",),
    "spec": ("initializers",),
    "spec.initializers": ("Normal", "TruncatedNormal", "Uniform", "Zeros"),
    "spec.lifetime": ("AfterCount", "AfterSteps", "LeastRecentlyUsed"),
    "spec.registry": ("register",),
    "spec.rules": (
        "SGD",
        "Accumulate",
        "Adagrad",
        "Adam",
        "AdamW",
        "Assign",
        "Ftrl",
        "Lamb",
        "Lion",
        "RMSprop",
        "RowwiseAdagrad",
        "Rule",
        "Yogi",
    ),
    "spec.schedules": ("Constant", "Cosine", "Linear", "Schedule", "StepDecay"),
    "spec.sync": ("Asynchronous", "Mode", "StaleSynchronous", "Synchronous"),
    "spec.version": ("Version",),
    "weights": ("load_weights",),
    "wire.security": ("TLS",),
    "worker": ("Worker", "WorkerStatistics"),
    "worker.model": ("Model",),
    "worker.model_spec": ("Group",),
    "worker.pending_step": ("PendingStep",),
    "worker.table": ("Table",),
}
"""Module → the public names that it defines."""
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a wrong name is told by type checkers too

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f"headwater.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module 'headwater' has no attribute {name!r}")
        module = importlib.import_module(f"headwater.{_MODULES[name]}")
        if not hasattr(module, name):  # a module of that package, which nobody has imported yet
            importlib.import_module(f"{module.__name__}.{name}")
        globals()[name] = value = getattr(module, name)
        return value


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES]
