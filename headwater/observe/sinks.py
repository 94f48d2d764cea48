"""Where `log_to=` of `run` and `Cluster` writes what workers log: TensorBoard, JSON lines, CSV, W&B, MLflow.

A sink has two methods, so one of your own is a few lines:

    class Print:
        def write(self, points: Sequence[Point]) -> None:
            for point in points:
                print(point.version, point.rank, point.metrics)

        def close(self) -> None: ...

`write` gets the points as they come, a few times a second, all in one thread; `close` is called once. What a
sink raises stops no training: it is logged once, and the sink gets the next points all the same.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol, runtime_checkable

from headwater.errors import ConfigurationError
from headwater.observe.history import Point
from headwater.spec.amounts import path as path_of
from headwater.spec.words import option

__all__ = ["Csv", "Jsonl", "LogSink", "Mlflow", "Point", "TensorBoard", "Wandb"]


@runtime_checkable
class LogSink(Protocol):
    """Takes what workers log."""

    def write(self, points: Sequence[Point]) -> None:
        """Take points, in the order in which workers told them."""

    def close(self) -> None:
        """Write what is left; nothing follows."""


class _File:
    """A text file that is appended to; each call's lines are there at once for whoever reads it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = path_of("the path of a sink", path)
        try:
            directory = os.path.dirname(os.path.abspath(path))
            os.makedirs(directory, exist_ok=True)
            self._file: IO[str] = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - it is kept
        except OSError as error:
            raise ConfigurationError(f"log_to: cannot write to {path}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Jsonl(_File):
    """A line of JSON for each point: time, generation, version, step, rank, metrics. Appends to `path`.

    NaN and infinity, which JSON has no numbers for, are the texts "NaN", "Infinity" and "-Infinity", which
    Python's `float` and pandas read.

    Raises:
        ConfigurationError: the file cannot be written.
    """

    def write(self, points: Sequence[Point]) -> None:
        """Append lines."""
        for one in points:
            line = {
                "time": one.time,
                "generation": one.generation,
                "version": one.version,
                "step": one.step,
                "rank": one.rank,
                "metrics": {name: _number(value) for name, value in one.metrics.items()},
            }
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class CsvLog(_File):
    """A row for each value: time, generation, version, step, rank, name, value. Appends to `path`.

    NaN and infinity are `nan`, `inf` and `-inf`.

    Raises:
        ConfigurationError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._rows = csv.writer(self._file)
        if not self._file.tell():
            self._rows.writerow(["time", "generation", "version", "step", "rank", "name", "value"])

    def write(self, points: Sequence[Point]) -> None:
        """Append rows."""
        for one in points:
            where = (repr(one.time), one.generation, one.version, one.step, one.rank)
            for name, value in one.metrics.items():
                self._rows.writerow([*where, name, repr(value)])
        self._file.flush()


Csv = CsvLog
"""The name for users; `headwater.Csv` reads."""


class TensorBoard:
    """TensorBoard's event files: a run `worker-N` in `directory` for each worker, versions along the axis.

    Needs the package `tensorboard`.

    Raises:
        ConfigurationError: it is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = path_of("TensorBoard: directory", directory)
        self._writer = _imported("tensorboard.summary", "tensorboard").Writer
        self._writers: dict[int, Any] = {}

    def write(self, points: Sequence[Point]) -> None:
        """Add scalars."""
        for one in points:
            writer = self._writers.get(one.rank)
            if writer is None:
                where = os.path.join(self._directory, f"worker-{one.rank}")
                writer = self._writers[one.rank] = self._writer(where)
            for name, value in one.metrics.items():
                writer.add_scalar(name, value, one.version, wall_time=one.time)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


class Wandb:
    """A run of Weights & Biases, with each metric as `worker-N/name` over `version`.

    Needs the package `wandb`. `options`: as of `wandb.init`, such as `project`, `name`, `config`, `mode`.

    Raises:
        ConfigurationError: it is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._run = _imported("wandb", "wandb").init(**options)
        self._run.define_metric("version")
        self._run.define_metric("*", step_metric="version")

    def write(self, points: Sequence[Point]) -> None:
        """Log them."""
        for one in points:
            named = {f"worker-{one.rank}/{name}": value for name, value in one.metrics.items()}
            self._run.log({**named, "version": one.version, "generation": one.generation})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Mlflow:
    """A run of MLflow, with each metric as `worker-N/name`; its step is the version.

    Needs the package `mlflow` or `mlflow-skinny`.

    Args:
        uri: of the tracking server, or a database; None: what MLflow takes by itself.
        experiment: its name; made where there is none.
        name: of the run; None: MLflow makes one up.

    Raises:
        ConfigurationError: it is not installed.
    """

    def __init__(
        self, uri: str | None = None, *, experiment: str = "headwater", name: str | None = None
    ) -> None:
        library = _imported("mlflow", "mlflow-skinny")
        self._metric = library.entities.Metric
        self._client = library.MlflowClient(uri)
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._run = self._client.create_run(number, run_name=name).info.run_id

    def write(self, points: Sequence[Point]) -> None:
        """Log them, in batches of a thousand, which is MLflow's limit."""
        metrics = [
            self._metric(f"worker-{one.rank}/{name}", value, round(one.time * 1000), one.version)
            for one in points
            for name, value in one.metrics.items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics[start : start + 1000])

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)


_BY_NAME: dict[str, Callable[[str], LogSink]] = {"tensorboard": TensorBoard, "jsonl": Jsonl, "csv": Csv}


def sink_of(text: str) -> LogSink:
    """What `--log-to KIND:PATH` means.

    Raises:
        ConfigurationError: another kind, or no path.
    """
    kind, colon, path = text.partition(":")
    if kind not in _BY_NAME or not colon or not path:
        kinds = ", ".join(f"{name}:PATH" for name in _BY_NAME)
        raise ConfigurationError(f"{option('log_to')}: got {text!r}, expected one of {kinds}")
    return _BY_NAME[kind](path)


def _imported(module: str, package: str) -> Any:
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as error:
        raise ConfigurationError(f"log_to needs the package {package}: pip install {package}") from error
