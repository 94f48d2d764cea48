"""Headwater, a parameter server: `run` a training function, or start a `Cluster` and join it."""

from __future__ import annotations

import importlib
from types import ModuleType

from headwater import errors, kvstore
from headwater.checkpoint import load_checkpoint
from headwater.cluster import Cluster, connect
from headwater.data import Csv, Files, Parquet
from headwater.engines import RayEngine
from headwater.messages import ClusterStatistics, StepResult
from headwater.run import RunResult, run
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
    Lion,
    RMSprop,
    RowwiseAdagrad,
    Rule,
    Yogi,
)
from headwater.spec.schedules import Constant, Cosine, Linear, Schedule, StepDecay
from headwater.spec.sync import Asynchronous, Mode, StaleSynchronous, Synchronous
from headwater.weights import load_weights
from headwater.wire.security import TLS
from headwater.worker import Worker, WorkerStatistics
from headwater.worker.model import Model
from headwater.worker.model_spec import Group
from headwater.worker.pending_step import PendingStep
from headwater.worker.table import Table

__version__ = "0.1.0"

__all__ = [
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
    "Cluster",
    "ClusterStatistics",
    "Constant",
    "Cosine",
    "Csv",
    "Files",
    "Ftrl",
    "Group",
    "LeastRecentlyUsed",
    "Linear",
    "Lion",
    "Mode",
    "Model",
    "Normal",
    "Parquet",
    "PendingStep",
    "RMSprop",
    "RayEngine",
    "RowwiseAdagrad",
    "Rule",
    "RunResult",
    "Schedule",
    "StaleSynchronous",
    "StepDecay",
    "StepResult",
    "Synchronous",
    "Table",
    "TruncatedNormal",
    "Uniform",
    "Worker",
    "WorkerStatistics",
    "Yogi",
    "Zeros",
    "connect",
    "errors",
    "initializers",
    "kvstore",
    "load_checkpoint",
    "load_weights",
    "register",
    "run",
]


def __getattr__(name: str) -> ModuleType:
    """`headwater.torch` and `headwater.jax` are imported when first named: they are optional, and slow to."""
    if name in ("torch", "jax"):
        return importlib.import_module(f"headwater.{name}")
    raise AttributeError(f"module 'headwater' has no attribute {name!r}")
