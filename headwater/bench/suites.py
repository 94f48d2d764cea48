"""The suites of `headwater bench` by name."""

from __future__ import annotations

from collections.abc import Callable

from headwater.bench.dense import measure_dense
from headwater.bench.figures import Effort, Figure
from headwater.bench.follow import measure_follow
from headwater.bench.kernels import measure_kernels
from headwater.bench.latency import measure_latency
from headwater.bench.memory import measure_memory
from headwater.bench.observe import measure_observe
from headwater.bench.predictions import measure_predictions
from headwater.bench.programs import measure_programs
from headwater.bench.real_models import measure_models
from headwater.bench.safety import measure_safety
from headwater.bench.soak import measure_soak
from headwater.bench.splits import measure_splits
from headwater.bench.steps import measure_steps
from headwater.bench.table import measure_lookup, measure_table
from headwater.bench.table_training import measure_table_training
from headwater.bench.wire import measure_tcp, measure_tls

SUITES: dict[str, Callable[[Effort], list[Figure]]] = {
    "dense": measure_dense,
    "follow": measure_follow,
    "latency": measure_latency,
    "observe": measure_observe,
    "tcp": measure_tcp,
    "tls": measure_tls,
    "kernels": measure_kernels,
    "memory": measure_memory,
    "models": measure_models,
    "predictions": measure_predictions,
    "programs": measure_programs,
    "safety": measure_safety,
    "soak": measure_soak,
    "splits": measure_splits,
    "steps": measure_steps,
    "lookup": measure_lookup,
    "table": measure_table,
    "rows": measure_table_training,
}
